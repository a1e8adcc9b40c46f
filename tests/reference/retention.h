// Retention in double, in plain loops, token by token: what every kernel is compared with. Depends on nothing.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

namespace reference {

/// A tensor of floats in any layout: element (a, b, c, d) is `of` of data[a * stride[0] + b * stride[1] + ...]. A stride of 0
/// repeats one element along its axis.
struct Strided {
    const float *data = nullptr;
    std::array<int64_t, 4> stride = {};
    double (*of)(double) = [](double x) { return x; };

    double operator()(int64_t a, int64_t b, int64_t c, int64_t d = 0) const {
        return of(data[a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]]);
    }
};

/// Heads of queries in groups: head h has keys, values, decay and state of head h / group, of Hk = H / group.
struct Inputs {
    int64_t B, T, H, K, V, group = 1;
    Strided q = {}, k = {}, v = {};  // [B, T, H, K], [B, T, Hk, K], [B, T, Hk, V]
    Strided log_decay = {};          // [B, T, Hk]
    Strided initial_state = {};      // [B, Hk, K, V]
    double scale = 1;
};

struct Result {
    std::vector<double> out, state;  // row-major [B, T, H, V] and [B, Hk, K, V]
};

///   S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t,   out_t = scale q_t S_t,   state = S_T
Result retention(const Inputs &in);

/// Of each element of retention(in): the root of the sum of the squares of its terms, scale q_id k_jd v_je and so on. That is
/// its size when the terms have random signs, whether or not they happen to cancel: what rounding errors are measured by.
Result spread(Inputs in);

}  // namespace reference

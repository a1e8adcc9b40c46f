// The types of q, k, v and out, by arithmetic alone: what generators/dtypes.h and the kernels are compared with.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace test {

/// 2^n, for -1022 <= n <= 1023. std::ldexp takes most of the time of tests.
inline double power_of_2(int n) {
    const uint64_t bits = (uint64_t)(n + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

struct Dtype {
    const char *name;  // as in cmake/kernels.cmake
    int digits;        // significant bits, the leading one included
    int least;         // the smallest normal number is 2^least
    int range;         // the largest number is just below 2^range

    bool operator==(const Dtype &other) const { return digits == other.digits; }

    /// The nearest number of the type, the even one of two that are as near; infinity beyond the largest.
    double round(double x) const {
        if (x == 0 || !std::isfinite(x)) return x;
        const double quantum = power_of_2(std::max(std::ilogb(x), least) - (digits - 1));
        const double rounded = std::nearbyint(x / quantum) * quantum;
        return std::abs(rounded) < power_of_2(range) ? rounded : std::copysign(infinity, x);
    }
    /// How far round(y) may be from y, for |y| <= |x|.
    double rounding_of(double x) const { return std::max(std::abs(x) * power_of_2(-digits), power_of_2(least - digits)); }
    /// Numbers from here on are rounded to infinity.
    double overflow() const { return power_of_2(range) - power_of_2(range - digits - 1); }

    // ---- Of 16 bits: sign, exponent, and the digits but for the leading one.

    double decode(uint16_t bits) const {
        const int fraction = bits & (unit() - 1), exponent = (bits & 0x7fff) / unit();
        const double sign = bits >> 15 ? -1 : 1;
        if (exponent == 0x7fff / unit()) return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * infinity;
        return sign *
               (exponent ? (unit() + fraction) * power_of_2(exponent - 1 + smallest()) : fraction * power_of_2(smallest()));
    }
    uint16_t encode(double x) const {
        const uint16_t sign = std::signbit(x) ? 0x8000 : 0, infinite = 0x7fff / unit() * unit();
        if (std::isnan(x)) return infinite | unit() / 2;
        const double y = std::abs(round(x));
        if (std::isinf(y)) return sign | infinite;
        if (y < power_of_2(least)) return sign | (int)(y * power_of_2(-smallest()));
        const int exponent = std::ilogb(y);
        return sign | ((exponent - least) * unit() + (int)(y * power_of_2(digits - 1 - exponent)));
    }

private:
    static constexpr double infinity = std::numeric_limits<double>::infinity();
    int unit() const { return 1 << (digits - 1); }
    int smallest() const { return least - (digits - 1); }  // its binary logarithm
};

constexpr Dtype f32 = {"f32", 24, -126, 128}, f16 = {"f16", 11, -14, 16}, bf16 = {"bf16", 8, -126, 128};
constexpr Dtype all_dtypes[] = {f32, f16, bf16};

}  // namespace test

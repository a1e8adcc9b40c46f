// Comparison with the reference.
#pragma once
#include "array.h"
#include "tolerance.h"

#include <gtest/gtest.h>

#include <cmath>
#include <sstream>

namespace test {

inline std::string text(const Index &index) {
    std::ostringstream s;
    s << "[";
    for (size_t n = 0; n < index.size(); n++) s << (n ? ", " : "") << index[n];
    s << "]";
    return s.str();
}

/// Every element of `got` lies within `share` of its spread and `absolute` from `want`, both row-major, and within one rounding
/// more if its type is not fp32.
inline void expect_close(const char *what, const Array &got, const std::vector<double> &want, const std::vector<double> &spread,
                         double share, const Dtype &dtype = f32, double absolute = 0) {
    Index where;
    double worst = 0, value = 0, expected = 0;
    size_t n = 0;
    each(got.shape, [&](const Index &i) {
        double allowed = share * spread[n] + absolute + tolerance::negligible, error = 0;
        const bool overflow = std::isinf(got(i)) && (got(i) > 0 ? want[n] : -want[n]) + allowed >= dtype.overflow();
        if (!(dtype == f32)) allowed += dtype.rounding_of(std::abs(want[n]) + allowed);
        if (!overflow) error = std::abs(got(i) - want[n]) / allowed;
        if (!(error <= worst)) where = i, worst = error, value = got(i), expected = want[n];
        if (std::isnan(error)) worst = std::numeric_limits<double>::infinity();
        n++;
    });
    EXPECT_LE(worst, 1) << what << text(where) << " is " << value << "; expected " << expected << ", to " << share
                        << " of its spread" << (dtype == f32 ? "" : " and rounded to ") << (dtype == f32 ? "" : dtype.name);
}

/// Root mean square of got - want, relative to that of want.
template<class A, class B>
double relative_rms(const std::vector<A> &got, const std::vector<B> &want) {
    double error = 0, square = 0;
    for (size_t n = 0; n < want.size(); n++) {
        error += ((double)got[n] - want[n]) * ((double)got[n] - want[n]);
        square += (double)want[n] * want[n];
    }
    return std::sqrt(error / square);
}

}  // namespace test

/// A suite of parametrized tests of every element of a container, by its name().
#define HOLDFAST_INSTANCES(Suite, ...) \
    INSTANTIATE_TEST_SUITE_P(, Suite, testing::ValuesIn(__VA_ARGS__), [](const auto &info) { return name(info.param); })

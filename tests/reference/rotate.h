// Rotation of a pair of features in double: what every kernel is compared with. Depends on nothing.
#pragma once
#include <cmath>
#include <complex>
#include <cstdint>

namespace reference {

/// exp(i theta position). Turning by theta times each 28 bits of the position, one after the other: theta has 24 bits, so that
/// all angles are exact in double, and the C library's cos and sin are right for any double.
inline std::complex<double> rotation(float theta, int64_t position) {
    std::complex<double> turned = 1;
    const uint64_t size = position < 0 ? 0 - (uint64_t)position : (uint64_t)position;
    for (int shift = 0; shift < 64; shift += 28) {
        const double part = (double)(size >> shift & 0xfffffff);
        const double angle = theta * part * (double)((uint64_t)1 << shift);
        turned *= std::complex<double>(std::cos(angle), std::sin(angle));
    }
    return position < 0 ? std::conj(turned) : turned;
}

}  // namespace reference

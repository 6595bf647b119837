// e^x in loops that vectorise, as std::exp does not. Included by batch.h alone.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY {
namespace {

/// Off by at most 1.5 units in the last place, 0 below -104, where float has none: x = n log 2 + r with |r| <= log(2) / 2, and
/// e^r = 1 + r + r^2 q(r), q fitted for the least relative error, 3.1e-9.
inline float exponential(float x) {
    constexpr float kLog2High = 0.6931152344F, kLog2Low = 3.19461849e-5F;  // the former in 12 bits: n times it is exact
    constexpr float kRound = 12582912;                                     // 1.5 * 2^23: adding it leaves no fraction
    x = x < -104 ? -104.F : x;
    x = x > 89 ? 89.F : x;
    const float n = (x * 1.44269504F + kRound) - kRound;
    const float r = (x - n * kLog2High) - n * kLog2Low;
    const float q = (((0.00138145F * r + 0.00836875F) * r + 0.04166839F) * r + 0.16666521F) * r + 0.49999994F;
    const auto power = static_cast<int32_t>(n), half = power / 2;  // 2^n itself may have no float
    const auto power_of_2 = [](int32_t e) { return std::bit_cast<float>((e + 127) << 23); };
    return (1 + (r + r * r * q)) * power_of_2(half) * power_of_2(power - half);
}

inline double exponential(double x) {
    return std::exp(x);
}

}  // namespace
}  // namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY

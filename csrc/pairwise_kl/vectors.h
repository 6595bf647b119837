// Vectors as wide as the CPU's, and e^x of them. Included by batch.h alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/lanes.h"

namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY {
namespace {

namespace lanes = fastclust::lanes::FASTCLUST_CAPABILITY;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRows = 4;
#else
constexpr int kVectorBytes = 16, kRows = 4;
#endif

/// Vectors of T, and of the integers of its size that comparisons give.
template <class T>
struct Simd {
    static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
    typedef T Vector __attribute__((vector_size(kVectorBytes), may_alias));
    using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef Integer Integers __attribute__((vector_size(kVectorBytes), may_alias));
};

/// to = e^from for `count` values, whole vectors. Of float: off by at most 1.5 units in the last place, 0 below -104, where
/// float has none; x = n log 2 + r with |r| <= log(2) / 2, and e^r = 1 + r + r^2 q(r), q fitted for the least relative error,
/// 3.1e-9. The library's e^x takes one value at a time.
inline void exponentials(const float* from, int64_t count, float* to) {
    using Vector = Simd<float>::Vector;
    using Integers = Simd<float>::Integers;
    constexpr float kLog2High = 0.6931152344F, kLog2Low = 3.19461849e-5F;  // the former in 12 bits: n times it is exact
    constexpr float kRound = 12582912;                                     // 1.5 * 2^23: adding it leaves no fraction
    const auto power_of_2 = [](const Integers& e) { return reinterpret_cast<Vector>((e + 127) << 23); };
    for (int64_t v = 0; v < count / Simd<float>::kLanes; ++v) {
        Vector x = reinterpret_cast<const Vector*>(from)[v];
        x = x < -104 ? Vector{} - 104 : x;
        x = x > 89 ? Vector{} + 89 : x;
        const Vector n = (x * 1.44269504F + kRound) - kRound;
        const Vector r = (x - n * kLog2High) - n * kLog2Low;
        const Vector q = (((0.0013814538F * r + 0.008368745F) * r + 0.04166839F) * r + 0.16666521F) * r + 0.49999994F;
        const Integers power = __builtin_convertvector(n, Integers), half = power / 2;  // 2^n itself may have no float
        reinterpret_cast<Vector*>(to)[v] = (1 + (r + r * r * q)) * power_of_2(half) * power_of_2(power - half);
    }
}

inline void exponentials(const double* from, int64_t count, double* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = std::exp(from[i]);
}

}  // namespace
}  // namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY

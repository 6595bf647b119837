// The rows as the score is taken of them, and that score: what decides neighbours, whatever filter ran before.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/lanes.h"
#include "common/parallel.h"
#include "common/products.h"
#include "knn/knn.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

namespace lanes = fastclust::lanes::FASTCLUST_CAPABILITY;
namespace products = fastclust::products::FASTCLUST_CAPABILITY;

template <class T>
struct Rows {
    int64_t count, depth;
    const T* data;  // (count, depth)

    const T* row(int64_t i) const { return data + i * depth; }
};

template <class T>
inline void prefetch_row(const T* row, int64_t depth) {
    constexpr int64_t kLine = 64 / sizeof(T), kMost = 8 * kLine;
    for (int64_t j = 0; j < depth && j < kMost; j += kLine) __builtin_prefetch(row + j);
}

/// The sum over `depth` features of term(a, b), in an order that depends on `depth` alone: equal rows give equal scores.
template <class T, class Term>
inline T reduce(const T* a, const T* b, int64_t depth, const Term& term) {
    using V = products::Vector<T>;
    constexpr int kLanes = products::kLanes<T>;
    typedef T Unaligned __attribute__((vector_size(products::kVectorBytes), may_alias, aligned(alignof(T))));
    V sums[4] = {};
    int64_t j = 0;
    for (; j + 4 * kLanes <= depth; j += 4 * kLanes)
        for (int v = 0; v < 4; ++v) {
            const V left = *reinterpret_cast<const Unaligned*>(a + j + v * kLanes);
            const V right = *reinterpret_cast<const Unaligned*>(b + j + v * kLanes);
            sums[v] += term(left, right);
        }
    for (; j + kLanes <= depth; j += kLanes) {
        const V left = *reinterpret_cast<const Unaligned*>(a + j);
        const V right = *reinterpret_cast<const Unaligned*>(b + j);
        sums[0] += term(left, right);
    }
    T tail = 0;
    for (; j < depth; ++j) tail += term(a[j], b[j]);
    const V total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return lanes::sum(total) + tail;
}

template <class T>
inline T score(Metric metric, const T* a, const T* b, int64_t depth) {
    if (metric != Metric::euclidean) return reduce(a, b, depth, [](auto u, auto v) { return u * v; });
    return T(-0.5) * reduce(a, b, depth, [](auto u, auto v) { return (u - v) * (u - v); });
}

/// By lanes: g++ makes no maximum of floats of its own account.
template <class T>
inline T largest_magnitude(const T* x, int64_t count) {
    constexpr int kLanes = products::kLanes<T>;
    T lanes[kLanes] = {}, largest = 0;
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes)
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) {
            const T magnitude = std::fabs(x[j + lane]);
            lanes[lane] = lanes[lane] > magnitude ? lanes[lane] : magnitude;
        }
    for (const T magnitude : lanes) largest = largest > magnitude ? largest : magnitude;
    for (; j < count; ++j) {
        const T magnitude = std::fabs(x[j]);
        largest = largest > magnitude ? largest : magnitude;
    }
    return largest;
}

/// x divided by its norm; a zero row stays zero. Scaled by its largest entry first: the squares neither overflow nor vanish.
template <class T>
inline void normalise(const T* x, int64_t depth, T* out) {
    const T largest = largest_magnitude(x, depth);
    if (largest == T(0)) {
        for (int64_t j = 0; j < depth; ++j) out[j] = 0;
        return;
    }
    int exponent;
    std::frexp(largest, &exponent);
    // Two factors, since 2^-exponent alone overflows where x is subnormal.
    const T half = std::ldexp(T(1), -exponent / 2), rest = std::ldexp(T(1), -exponent - -exponent / 2);
    for (int64_t j = 0; j < depth; ++j) out[j] = x[j] * half * rest;
    const T norm = std::sqrt(reduce(out, out, depth, [](auto u, auto v) { return u * v; }));
    for (int64_t j = 0; j < depth; ++j) out[j] /= norm;
}

/// The power of two e for which 2^-e x has entries of about one, or 0 where x is of ordinary size already.
template <class T>
inline int common_exponent(T largest) {
    if (largest == T(0)) return 0;
    int exponent;
    std::frexp(largest, &exponent);
    return exponent > -20 && exponent < 20 ? 0 : exponent;
}

/// x as the metric scores it: normalised for cosine, times 2^-exponent for the others (a copy only where it differs from x).
template <class T>
inline Rows<T> prepare(Metric metric, const T* x, int64_t count, int64_t depth, int exponent, const Context& context) {
    if (metric != Metric::cosine && exponent == 0) return {count, depth, x};
    T* out = context.scratch<T>(count * depth);
    parallel_for(0, count, 4096 / depth + 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            if (metric == Metric::cosine)
                normalise(x + i * depth, depth, out + i * depth);
            else
                for (int64_t j = 0; j < depth; ++j) out[i * depth + j] = std::ldexp(x[i * depth + j], -exponent);
        }
    });
    return {count, depth, out};
}

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

// Tiles of kBlock x kBlock ordered pairs of rows with different labels: the products that decide which are within the margin,
// and their hinge. Included by pairwise_kl_cpu.cpp alone.
#pragma once

#include "pairwise_kl/within.h"

namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY {
namespace {

/// out (kRows, 2 vectors) = A (kRows, depth) with rows a_row apart times B (depth, 2 vectors) with rows kBlock apart, all in
/// registers.
template <class T>
inline void product(const T* a, int64_t a_row, const T* b, int64_t depth, T* out) {
    using Vector = typename Simd<T>::Vector;
    constexpr int kLanes = Simd<T>::kLanes, kVectors = 2;
    Vector sum[kRows][kVectors] = {};
    for (int64_t d = 0; d < depth; ++d) {
        Vector right[kVectors];
        for (int v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const Vector*>(b + d * kBlock + v * kLanes);
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r * a_row + d] * right[v];
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector*>(out + r * kBlock + v * kLanes) = sum[r][v];
}

/// tile_ij = sum_k p_ik log p_jk.
template <class T>
void multiply(const Sorted<T>& s, int64_t i_block, int64_t j_block, T* tile) {
    constexpr int kColumns = 2 * Simd<T>::kLanes;
    const T *p = s.p + i_block * kBlock * s.width, *log_p = s.transposed + j_block * s.k * kBlock;
    for (int column = 0; column < kBlock; column += kColumns)
        for (int row = 0; row < kBlock; row += kRows)
            product(p + row * s.width, s.width, log_p + column, s.k, tile + row * kBlock + column);
}

template <class T>
bool same_group(const Sorted<T>& s, int64_t i_block, int64_t j_block) {
    const auto *i = s.group + i_block * kBlock, *j = s.group + j_block * kBlock;
    return i[0] == i[kBlock - 1] && j[0] == j[kBlock - 1] && i[0] == j[0];
}

/// Whether the blocks have a label in common.
template <class T>
bool share_group(const Sorted<T>& s, int64_t i_block, int64_t j_block) {
    const auto *i = s.group + i_block * kBlock, *j = s.group + j_block * kBlock;
    return i[0] <= j[kBlock - 1] && j[0] <= i[kBlock - 1];
}

/// Which pairs are within the margin by their products, and the sum of [m - KL_ij]+ over them.
template <class T>
double hinge(const Sorted<T>& s, int64_t i_block, int64_t j_block, const T* tile, Within& within) {
    using Vector = typename Simd<T>::Vector;
    constexpr int kLanes = Simd<T>::kLanes, kVectors = kBlock / kLanes;
    const auto* limit = reinterpret_cast<const Vector*>(s.limit + j_block * kBlock);
    const auto* groups = reinterpret_cast<const typename Simd<T>::Integers*>(s.group + j_block * kBlock);
    const bool mixed = share_group(s, i_block, j_block);
    Vector sums[kVectors] = {};
    for (int i = 0; i < kBlock; ++i) {
        const T entropy = s.entropy[i_block * kBlock + i];
        const auto group = s.group[i_block * kBlock + i];
        const auto* row = reinterpret_cast<const Vector*>(tile + i * kBlock);
        uint64_t bits = 0;
        for (int v = 0; v < kVectors; ++v) {
            Vector left = limit[v] - (entropy - row[v]);
            if (mixed) left = groups[v] == group ? Vector{} : left;
            sums[v] += left > 0 ? left : Vector{};
            bits |= above<T>(left, Vector{}) << v * kLanes;
        }
        within.row[i] = bits;
    }
    double total = 0;
    for (const Vector& sum : sums) total += static_cast<double>(lanes::sum(sum));
    return total;
}

/// The sum of [m - KL_ij]+ over the tile, and which pairs are in it.
template <class T>
double product_tile(const Sorted<T>& s, int64_t i_block, int64_t j_block, Within& within) {
    alignas(64) T tile[kPairs];
    multiply(s, i_block, j_block, tile);
    return hinge(s, i_block, j_block, tile, within);
}

}  // namespace
}  // namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY

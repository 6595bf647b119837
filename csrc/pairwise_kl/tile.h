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

/// Columns of the block at j that have the label of row i, one bit each.
template <class T>
uint64_t alike(const Sorted<T>& s, int64_t i, int64_t j) {
    if (i >= s.b) return 0;
    const auto below = [&](int64_t end) {
        return end <= j ? 0 : end - j >= kBlock ? ~uint64_t{0} : (uint64_t{1} << (end - j)) - 1;
    };
    return below(s.first[s.group[i] + 1]) & ~below(s.first[s.group[i]]);
}

template <class T>
bool same_group(const Sorted<T>& s, int64_t i_block, int64_t j_block) {
    const int64_t i = i_block * kBlock, j = j_block * kBlock;
    const int32_t group = s.group[i];
    return s.group[i + kBlock - 1] == group && s.group[j] == group && s.group[j + kBlock - 1] == group;
}

/// Which pairs are within the margin by their products, and the sum of [m - KL_ij]+ over them.
template <class T>
double hinge(const Sorted<T>& s, int64_t i_block, int64_t j_block, T* tile, Within& within) {
    using Vector = typename Simd<T>::Vector;
    constexpr int kLanes = Simd<T>::kLanes, kVectors = kBlock / kLanes;
    const auto* limit = reinterpret_cast<const Vector*>(s.limit + j_block * kBlock);
    Vector sums[kVectors] = {};
    for (int i = 0; i < kBlock; ++i) {
        for (uint64_t bits = alike(s, i_block * kBlock + i, j_block * kBlock); bits != 0; bits &= bits - 1)
            tile[i * kBlock + std::countr_zero(bits)] = kLogZero<T>;
        const T entropy = s.entropy[i_block * kBlock + i];
        const auto* row = reinterpret_cast<const Vector*>(tile + i * kBlock);
        uint64_t bits = 0;
        for (int v = 0; v < kVectors; ++v) {
            const Vector left = limit[v] - (entropy - row[v]);
            sums[v] += left > 0 ? left : Vector{};
            bits |= lane_bits(left > 0) << v * kLanes;
        }
        within.row[i] = bits;
    }
    double total = 0;
    for (const Vector& sum : sums)
        for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(sum[lane]);
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

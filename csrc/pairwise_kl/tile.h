// Tiles of kBlock x kBlock ordered pairs of rows with different labels: the products that they are made of, and their hinge.
// Included by pairwise_kl_cpu.cpp alone.
#pragma once

#include "pairwise_kl/batch.h"

namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY {
namespace {

/// A[r][d] = a[r * row + d * depth].
template <class T>
struct Strided {
    const T* a;
    int64_t row, depth;
};

/// out (kRows, kVectors) (+)= A (kRows, depth) B (depth, kVectors vectors), all in registers.
template <class T, int kVectors, bool kAdd>
inline void product(const Strided<T>& a, const T* b, int64_t b_row, int64_t depth, T* out, int64_t out_row) {
    using Vector = typename Simd<T>::Vector;
    constexpr int kLanes = Simd<T>::kLanes;
    Vector sum[kRows][kVectors] = {};
    for (int64_t d = 0; d < depth; ++d) {
        Vector right[kVectors];
        for (int v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const Vector*>(b + d * b_row + v * kLanes);
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v) sum[r][v] += a.a[r * a.row + d * a.depth] * right[v];
    }
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
            auto* at = reinterpret_cast<Vector*>(out + r * out_row + v * kLanes);
            *at = kAdd ? *at + sum[r][v] : sum[r][v];
        }
    }
}

/// The same for kBlock rows of A and any number of whole vectors of B.
template <class T, bool kAdd>
void block_product(const Strided<T>& a, const T* b, int64_t width, int64_t b_row, int64_t depth, T* out, int64_t out_row) {
    constexpr int kLanes = Simd<T>::kLanes;
    for (int64_t column = 0; column < width; column += 2 * kLanes) {
        for (int row = 0; row < kBlock; row += kRows) {
            const Strided<T> rows{a.a + row * a.row, a.row, a.depth};
            T* to = out + row * out_row + column;
            if (width - column > kLanes)
                product<T, 2, kAdd>(rows, b + column, b_row, depth, to, out_row);
            else
                product<T, 1, kAdd>(rows, b + column, b_row, depth, to, out_row);
        }
    }
}

template <class T>
bool same_group(const Sorted<T>& s, int64_t i_block, int64_t j_block) {
    const int64_t i = i_block * kBlock, j = j_block * kBlock;
    const int32_t group = s.group[i];
    return s.group[i + kBlock - 1] == group && s.group[j] == group && s.group[j + kBlock - 1] == group;
}

/// Turns sum_k p_ik log p_jk in `tile` into [KL_ij < m] for i of one block and j of another, 0 for pairs of equal labels.
/// Returns the sum of [m - KL_ij]+ over the tile; rows[i] is how many pairs of row i count.
template <class T>
double hinge(const Sorted<T>& s, int64_t i_block, int64_t j_block, T* tile, T* rows) {
    const int64_t j_first = j_block * kBlock;
    double total = 0;
    for (int i = 0; i < kBlock; ++i) {
        const T entropy = s.entropy[i_block * kBlock + i];
        const int32_t group = s.group[i_block * kBlock + i];
        T* row = tile + i * kBlock;
        T sum = 0, count = 0;
        T margins[kBlock];
        for (int j = 0; j < kBlock; ++j) {
            const T left = s.limit[j_first + j] - (entropy - row[j]);
            const bool counts = (left > 0) & (s.group[j_first + j] != group);
            margins[j] = counts ? left : T(0);
            row[j] = counts ? T(1) : T(0);
        }
        for (int j = 0; j < kBlock; ++j) {
            sum += margins[j];
            count += row[j];
        }
        rows[i] = count;
        total += static_cast<double>(sum);
    }
    return total;
}

/// Fills `tile` and `rows` as hinge() does.
template <class T>
double hinge_tile(const Sorted<T>& s, int64_t i_block, int64_t j_block, T* tile, T* rows) {
    const Strided<T> p{s.p + i_block * kBlock * s.width, s.width, 1};
    block_product<T, false>(p, s.transposed + j_block * kBlock, kBlock, s.padded, s.k, tile, kBlock);
    return hinge(s, i_block, j_block, tile, rows);
}

}  // namespace
}  // namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY

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
/// Returns the sum of [m - KL_ij]+ over the tile; counts[i] is how many pairs of row i are within the margin.
template <class T>
double hinge(const Sorted<T>& s, int64_t i_block, int64_t j_block, T* tile, int32_t* counts) {
    const T* limit = s.limit + j_block * kBlock;
    const int32_t* groups = s.group + j_block * kBlock;
    alignas(64) T sums[kBlock] = {};  // one per column: a single running sum would not vectorise
    for (int i = 0; i < kBlock; ++i) {
        const T entropy = s.entropy[i_block * kBlock + i];
        const int32_t group = s.group[i_block * kBlock + i];
        T* row = tile + i * kBlock;
        int32_t count = 0;
        for (int j = 0; j < kBlock; ++j) {
            const T left = limit[j] - (entropy - row[j]);
            const bool within = (left > 0) & (groups[j] != group);
            sums[j] += within ? left : T(0);
            row[j] = within ? T(1) : T(0);
            count += within;
        }
        counts[i] = count;
    }
    double total = 0;
    for (const T sum : sums) total += static_cast<double>(sum);
    return total;
}

/// Fills `tile` and `counts` as hinge() does.
template <class T>
double hinge_tile(const Sorted<T>& s, int64_t i_block, int64_t j_block, T* tile, int32_t* counts) {
    const Strided<T> p{s.p + i_block * kBlock * s.width, s.width, 1};
    block_product<T, false>(p, s.transposed + j_block * s.k * kBlock, kBlock, kBlock, s.k, tile, kBlock);
    return hinge(s, i_block, j_block, tile, counts);
}

template <class T>
void add_row(const T* from, int64_t width, T* to) {
    for (int64_t c = 0; c < width; ++c) to[c] += from[c];
}

/// Adds M B to `left` (M the tile, B a block of log p; null: not wanted) and M' A to `right` (A a block of p). Few ones in the
/// tile, as late in a training, are taken one by one.
template <class T>
void add_tile_products(const T* tile, const int32_t* counts, const T* a, const T* b, int64_t width, T* left, T* right) {
    int64_t ones = 0;
    for (int i = 0; i < kBlock; ++i) ones += counts[i];
    if (ones > kBlock * kBlock / 8) {
        block_product<T, true>({tile, 1, kBlock}, a, width, width, kBlock, right, width);
        if (left != nullptr) block_product<T, true>({tile, kBlock, 1}, b, width, width, kBlock, left, width);
        return;
    }
    for (int i = 0; i < kBlock; ++i) {
        if (counts[i] == 0) continue;
        int32_t columns[kBlock + 1], found = 0;
        for (int32_t j = 0; j < kBlock; ++j) {
            columns[found] = j;
            found += tile[i * kBlock + j] != 0;
        }
        for (int32_t c = 0; c < found; ++c) {
            add_row(a + i * width, width, right + columns[c] * width);
            if (left != nullptr) add_row(b + columns[c] * width, width, left + i * width);
        }
    }
}

}  // namespace
}  // namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY

// Tiles of kBlock x kBlock ordered pairs of rows with different labels: the products that they are made of, and their hinge.
// Included by pairwise_kl_cpu.cpp alone.
#pragma once

#include <bit>

#include "pairwise_kl/batch.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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

/// to += sign * from.
template <class T>
void add_row(const T* from, T sign, int64_t width, T* to) {
    for (int64_t c = 0; c < width; ++c) to[c] += sign * from[c];
}

/// Which of kBlock values are `value`, one bit each.
template <class T>
uint64_t equal_bits(const T* values, T value) {
    uint64_t bits = 0;
    for (int j = 0; j < kBlock; ++j) bits |= uint64_t(values[j] == value) << j;
    return bits;
}

#if defined(__AVX512F__)
inline uint64_t equal_bits(const float* values, float value) {
    uint64_t bits = 0;
    for (int j = 0; j < kBlock; j += 16)
        bits |= uint64_t(_mm512_cmp_ps_mask(_mm512_load_ps(values + j), _mm512_set1_ps(value), _CMP_EQ_OQ)) << j;
    return bits;
}
#endif

/// A block of p or log p with the sum of its rows, and where rows of the other kind add up: for each of kBlock rows, and for
/// all of them alike.
template <class T>
struct Side {
    const T *rows, *sum;
    T *to, *to_all;  // null: not wanted
};

/// Adds sign B_j to row i of a, and sign A_i to row j of b, for each entry (i, j) of the tile that is `value`.
template <class T>
void add_entries(const T* tile, T value, T sign, int64_t width, const Side<T>& a, const Side<T>& b) {
    for (int i = 0; i < kBlock; ++i)
        for (uint64_t bits = equal_bits(tile + i * kBlock, value); bits != 0; bits &= bits - 1) {
            const int j = std::countr_zero(bits);
            add_row(a.rows + i * width, sign, width, b.to + j * width);
            if (a.to != nullptr) add_row(b.rows + j * width, sign, width, a.to + i * width);
        }
}

/// Adds M B to a's rows, where those are wanted, and M' A to b's (M the tile, A a block of p, B one of log p). Few ones in the
/// tile, as late in a training, are taken one by one; few zeros are taken away from the sums over all. With probabilities of 0
/// the latter would cancel what stands for their logarithms.
template <class T>
void add_tile_products(const T* tile, const int32_t* counts, bool has_zero, int64_t width, const Side<T>& a, const Side<T>& b) {
    constexpr int64_t kEntries = kBlock * kBlock, kFew = kEntries / 8;
    int64_t ones = 0;
    for (int i = 0; i < kBlock; ++i) ones += counts[i];
    if (ones <= kFew) {
        if (ones > 0) add_entries(tile, T(1), T(1), width, a, b);
    } else if (kEntries - ones <= kFew && !has_zero) {
        add_row(a.sum, T(1), width, b.to_all);
        if (a.to != nullptr) add_row(b.sum, T(1), width, a.to_all);
        if (ones < kEntries) add_entries(tile, T(0), T(-1), width, a, b);
    } else {
        block_product<T, true>({tile, 1, kBlock}, a.rows, width, width, kBlock, b.to, width);
        if (a.to != nullptr) block_product<T, true>({tile, kBlock, 1}, b.rows, width, width, kBlock, a.to, width);
    }
}

}  // namespace
}  // namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY

// Which pairs of a tile are within the margin, one bit each, and sums of the rows that the bits select.
// Included by pairwise_kl_cpu.cpp alone.
#pragma once

#include <bit>

#include "common/intrinsics.h"
#include "pairwise_kl/batch.h"

namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY {
namespace {

static_assert(kBlock == 64, "a row of a tile is one word");

/// Bit j of row[i]: [KL_ij < m and labels differ], for i of one block and j of another.
struct Within {
    uint64_t row[kBlock];

    int64_t count() const {
        int64_t ones = 0;
        for (const uint64_t bits : row) ones += std::popcount(bits);
        return ones;
    }
};

/// The lanes in which a > b, lane 0 lowest.
template <class T>
inline uint64_t above(const typename Simd<T>::Vector& a, const typename Simd<T>::Vector& b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ);
    else
        return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), _CMP_GT_OQ);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
        return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(a > b)));
    else
        return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(a > b)));
#else
    const auto truth = a > b;
    uint64_t bits = 0;
    for (int lane = 0; lane < Simd<T>::kLanes; ++lane) bits |= static_cast<uint64_t>(truth[lane] & 1) << lane;
    return bits;
#endif
}

/// Swaps the upper right and the lower left of each square of 2 kSize x 2 kSize, then goes on in its quarters; `left` are the
/// columns of left halves.
template <int kSize>
inline void swap_squares(uint64_t* row, uint64_t left) {
    for (int square = 0; square < kBlock; square += 2 * kSize)
        for (int i = square; i < square + kSize; ++i) {
            const uint64_t swapped = (row[i] >> kSize ^ row[i + kSize]) & left;
            row[i + kSize] ^= swapped;
            row[i] ^= swapped << kSize;
        }
    if constexpr (kSize > 1) swap_squares<kSize / 2>(row, left ^ left << kSize / 2);
}

inline Within transposed(Within within) {
    swap_squares<kBlock / 2>(within.row, 0xffffffff);
    return within;
}

/// to_i += sum of from_j over the ones j of row i. Rows j go four at a time, all sums of which are made beforehand: a quarter
/// of the additions.
template <class T>
void add_selected(const Within& within, const T* from, int64_t width, T* to) {
    using Vector = typename Simd<T>::Vector;
    constexpr int kFours = kBlock / 4;
    Vector sums[kFours][16];
    for (int64_t column = 0; column < width; column += Simd<T>::kLanes) {
        for (int four = 0; four < kFours; ++four) {
            sums[four][0] = Vector{};
            for (unsigned some = 1; some < 16; ++some) {
                const T* last = from + (4 * four + std::countr_zero(some)) * width + column;
                sums[four][some] = sums[four][some & (some - 1)] + *reinterpret_cast<const Vector*>(last);
            }
        }
        for (int i = 0; i < kBlock; ++i) {
            const uint64_t bits = within.row[i];
            Vector even{}, odd{};
            for (int four = 0; four < kFours; four += 2) {
                even += sums[four][bits >> 4 * four & 15];
                odd += sums[four + 1][bits >> 4 * (four + 1) & 15];
            }
            *reinterpret_cast<Vector*>(to + i * width + column) += even + odd;
        }
    }
}

/// to += sign * from.
template <class T>
void add_row(const T* from, T sign, int64_t width, T* to) {
    for (int64_t c = 0; c < width; ++c) to[c] += sign * from[c];
}

/// A block of p or log p with the sum of its rows, and where rows of the other kind add up: for each of kBlock rows, and for
/// all of them alike.
template <class T>
struct Side {
    const T *rows, *sum;
    T *to, *to_all;  // null: not wanted
};

/// Adds sign B_j to row i of a, where that is wanted, and sign A_i to row j of b, for each one (i, j).
template <class T>
void add_each(const Within& within, T sign, int64_t width, const Side<T>& a, const Side<T>& b) {
    for (int i = 0; i < kBlock; ++i)
        for (uint64_t bits = within.row[i]; bits != 0; bits &= bits - 1) {
            const int j = std::countr_zero(bits);
            add_row(a.rows + i * width, sign, width, b.to + j * width);
            if (a.to != nullptr) add_row(b.rows + j * width, sign, width, a.to + i * width);
        }
}

constexpr int64_t kPairs = kBlock * kBlock;
constexpr int64_t kFew = kPairs / 8;  // pairs of a tile: so many are worth a way of their own

/// Adds M B to a's rows, where those are wanted, and M' A to b's (M the bits, A a block of p, B one of log p). Few ones, as
/// late in a training, are taken one by one; few zeros are taken away from the sums over all. With probabilities of 0 the
/// latter would cancel what stands for their logarithms.
template <class T>
void add_products(const Within& within, int64_t ones, bool has_zero, int64_t width, const Side<T>& a, const Side<T>& b) {
    if (ones <= kFew) {
        if (ones > 0) add_each(within, T(1), width, a, b);
    } else if (kPairs - ones <= kFew && !has_zero) {
        add_row(a.sum, T(1), width, b.to_all);
        if (a.to != nullptr) add_row(b.sum, T(1), width, a.to_all);
        if (ones == kPairs) return;
        Within zeros;
        for (int i = 0; i < kBlock; ++i) zeros.row[i] = ~within.row[i];
        add_each(zeros, T(-1), width, a, b);
    } else {
        if (a.to != nullptr) add_selected(within, b.rows, width, a.to);
        add_selected(transposed(within), a.rows, width, b.to);
    }
}

}  // namespace
}  // namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY

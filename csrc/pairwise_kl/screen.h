// Tiles by 8-bit products: the pairs that those leave open are few, and the others need no product of floats where nearly all
// of them, or hardly any, are within the margin. Included by pairwise_kl_cpu.cpp alone.
#pragma once

#include "pairwise_kl/tile.h"

namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY {
namespace {

#if defined(__AVX512VNNI__)

/// products[i][j] = q_i . q_j, the codes' products.
inline void multiply_codes(const Codes& codes, int64_t i_block, int64_t j_block, int32_t* products) {
    constexpr int kPanels = quantised::kTiles ? 4 : 2, kColumns = kPanels * Codes::kLanes;
    constexpr int32_t kStart[kColumns] = {};
    constexpr int64_t kLine = Codes::kLanes * 4;  // bytes of a step
    const quantised::Multiplier multiplier(codes.steps);
    for (int64_t column = 0; column < kBlock; column += kColumns)
        for (int64_t row = 0; row < kBlock; row += Codes::kGroup)
            quantised::multiply_tile<Codes::kGroup, Codes::kGroup, kPanels>(
                codes.group(i_block * kBlock + row), codes.panel(j_block * kBlock + column), kLine, codes.steps * kLine,
                codes.steps, kStart, products + row * kBlock + column, kBlock);
}

/// Columns of the block at j that have the label of row i or are beyond the batch, one bit each.
inline uint64_t not_in_pairs(const Sorted<float>& s, int64_t i, int64_t j) {
    const auto from = [&](int64_t row) { return row <= j ? ~uint64_t{0} : row - j >= kBlock ? 0 : ~uint64_t{0} << (row - j); };
    const uint64_t beyond = from(s.b);
    return i >= s.b ? beyond : beyond | (from(s.first[s.group[i]]) & ~from(s.first[s.group[i] + 1]));
}

/// Sets the pairs that the codes show to be within the margin, and those that they do not decide. In units of the codes of p_i,
/// whether h_i - p_i . log p_j is below m is whether q_i . q_j scale_j + total_i / scale_i mean_j exceeds (h_i - m) / scale_i.
inline void decide(const Sorted<float>& s, int64_t i_block, int64_t j_block, const int32_t* products, Within& within,
                   Within& open) {
    using Vector = Simd<float>::Vector;
    constexpr int kLanes = Simd<float>::kLanes;
    const Codes& codes = s.codes;
    const int64_t j = j_block * kBlock;
    const bool mixed = share_group(s, i_block, j_block) || s.b - j < kBlock;
    for (int i = 0; i < kBlock; ++i) {
        const First& first = codes.first[i_block * kBlock + i];
        const float needed = s.entropy[i_block * kBlock + i] - s.margin;
        const float error = first.residual * codes.block_norm[j_block] + first.magnitude * codes.block_error[j_block];
        const Vector enough = Vector{} + (needed + error) * first.inverse, scarce = Vector{} + (needed - error) * first.inverse;
        uint64_t inside = 0, outside = 0;
        for (int v = 0; v < kBlock / kLanes; ++v) {
            const auto product = reinterpret_cast<const Simd<float>::Integers*>(products + i * kBlock)[v];
            const Vector score =
                __builtin_convertvector(product, Vector) * reinterpret_cast<const Vector*>(codes.scale + j)[v] +
                first.total * reinterpret_cast<const Vector*>(codes.mean + j)[v];
            inside |= above<float>(score, enough) << v * kLanes;
            outside |= above<float>(scarce, score) << v * kLanes;
        }
        if (mixed) outside |= not_in_pairs(s, i_block * kBlock + i, j);
        within.row[i] = inside & ~outside;
        open.row[i] = ~(inside | outside);
    }
}

/// m - KL_ij.
inline float margin_left(const Sorted<float>& s, int64_t i, int64_t j) {
    using Vector = Simd<float>::Vector;
    const auto *p = reinterpret_cast<const Vector*>(s.p + i * s.width),
               *log_p = reinterpret_cast<const Vector*>(s.log_p + j * s.width);
    Vector sum = {};
    for (int64_t v = 0; v < s.width / Simd<float>::kLanes; ++v) sum += p[v] * log_p[v];
    return s.margin - (s.entropy[i] - lanes::sum(sum));
}

/// Calls body(i, j) for the ones (i, j), counted from the whole batch's first row.
template <class Body>
void for_ones(const Within& within, int64_t i_block, int64_t j_block, const Body& body) {
    for (int i = 0; i < kBlock; ++i)
        for (uint64_t bits = within.row[i]; bits != 0; bits &= bits - 1)
            body(i_block * kBlock + i, j_block * kBlock + std::countr_zero(bits));
}

/// The sum of m - KL_ij over the pairs of two blocks: of pairs of equal labels as well.
inline double sum_of_all(const Sorted<float>& s, int64_t i_block, int64_t j_block) {
    const auto rows = [&](int64_t block) { return std::min(s.b - block * kBlock, int64_t{kBlock}); };
    double entropies = 0, products = 0;
    for (int64_t i = 0; i < rows(i_block); ++i) entropies += static_cast<double>(s.entropy[i_block * kBlock + i]);
    for (int64_t c = 0; c < s.k; ++c)
        products +=
            static_cast<double>(s.block_p[i_block * s.width + c]) * static_cast<double>(s.block_log_p[j_block * s.width + c]);
    const double margins = static_cast<double>(rows(i_block)) * static_cast<double>(s.margin);
    return static_cast<double>(rows(j_block)) * (margins - entropies) + products;
}

/// The pairs of rows of the batch that are not within the margin.
inline Within outside(const Sorted<float>& s, int64_t i_block, int64_t j_block, const Within& within) {
    const int64_t rows = s.b - i_block * kBlock, columns = s.b - j_block * kBlock;
    const uint64_t real = columns >= kBlock ? ~uint64_t{0} : (uint64_t{1} << columns) - 1;
    Within zeros;
    for (int i = 0; i < kBlock; ++i) zeros.row[i] = i < rows ? ~within.row[i] & real : 0;
    return zeros;
}

/// What product_tile() finds, but by the codes. False where that would not be faster.
inline bool screen_tile(const Sorted<float>& s, int64_t i_block, int64_t j_block, Within& within, double& total) {
    alignas(64) int32_t products[kPairs];
    multiply_codes(s.codes, i_block, j_block, products);
    Within open;
    decide(s, i_block, j_block, products, within, open);
    if (open.count() > kFew / 2) return false;
    for_ones(open, i_block, j_block, [&](int64_t i, int64_t j) {
        if (margin_left(s, i, j) > 0) within.row[i % kBlock] |= uint64_t{1} << j % kBlock;
    });
    total = 0;
    if (within.count() <= kFew) {
        for_ones(within, i_block, j_block, [&](int64_t i, int64_t j) { total += static_cast<double>(margin_left(s, i, j)); });
        return true;
    }
    const Within zeros = outside(s, i_block, j_block, within);
    if (zeros.count() > kFew) return false;
    total = sum_of_all(s, i_block, j_block);
    for_ones(zeros, i_block, j_block, [&](int64_t i, int64_t j) { total -= static_cast<double>(margin_left(s, i, j)); });
    return true;
}

#endif

/// The sum of [m - KL_ij]+ over the tile, and which pairs are in it.
template <class T>
double hinge_tile(const Sorted<T>& s, int64_t i_block, int64_t j_block, Within& within) {
    if constexpr (kHasCodes<T>) {
        double total;
        const bool has_zero = s.has_zero[i_block] || s.has_zero[j_block];
        if (s.codes.steps > 0 && !has_zero && screen_tile(s, i_block, j_block, within, total)) return total;
    }
    return product_tile(s, i_block, j_block, within);
}

}  // namespace
}  // namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY

// Which rows a candidate of k-means++ may come nearer to than their nearest pick, from 8-bit products. A row x keeps its mass
// if it is certain that |x - c|^2, as computed in float, is not below its nearest pick's:
//     |x~ - c~|  >=  sqrt(nearest) + |x - x~| + |c - c~|,     |x~ - c~|^2 = |x~|^2 + |c~|^2 - 2 scale_x scale_c q_x.q_c
// Scratch beside the codes (codes.h): four numbers per row.
#pragma once

#include "kmeans/codes.h"
#include "kmeans/differences.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

template <class T>
class CandidateScreen;

#if defined(__AVX512VNNI__)

template <>
class CandidateScreen<float> {
   public:
    CandidateScreen(int64_t n, int64_t d, int pieces, const Context& context)
        : d_(d),
          pieces_(pieces),
          sums_(context.scratch<double>(d)),
          shift_(context.scratch<float>(d)),
          rows_(n, d, false, pieces, context),
          scales_(context.scratch<float>(n + kBlockRows)),
          squares_(context.scratch<float>(n + kBlockRows)),
          residuals_(context.scratch<float>(n + kBlockRows)),
          reaches_(context.scratch<float>(n + kBlockRows)),
          centred_(context.scratch<float>(padded_depth(d))),
          codes_(context.scratch<uint8_t>(kGroup * 4 * rows_.steps)) {
        for (int64_t i = 0; i < kGroup * 4 * rows_.steps; ++i) codes_[i] = 0;
    }

    /// What candidates take off the sum of masses.
    struct Gains {
        float least[kCandidateLanes], most[kCandidateLanes];
    };

    void set_rows(const float* x) {
        x_ = x;
        mean_of_rows(pieces_, x, rows_.n, d_, sums_, shift_);
        rows_.prepare(pieces_, x, shift_, nullptr);
        for_pieces(pieces_, rows_.n, [&](int, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const Bounds bounds = bounds_of(rows_.quantised_row(row));
                scales_[row] = bounds.scale, squares_[row] = bounds.square, residuals_[row] = bounds.residual;
            }
        });
    }

    /// Row's mass is now weight * nearest.
    void set_nearest(int64_t row, float mass, float weight) {
        constexpr float kEpsilon = 1.2e-7F, kTiny = 2.4e-38F;  // kTiny: what is lost where products underflow
        const auto terms = static_cast<float>(d_ + 16);
        const float nearest = weight == 1 ? mass : (mass * (1 + 2 * kEpsilon) + kTiny) / weight * (1 + 2 * kEpsilon);
        const float distance = __builtin_sqrtf(nearest * (1 + 2 * kEpsilon * terms) + kTiny * terms);
        reaches_[row] = mass > 0 ? (distance + residuals_[row]) * kUp : __builtin_nanf("");  // no mass: nothing comes nearer
    }

    void set_candidates(const int64_t* ids, int count) {
        count_ = count;
        for (int l = 0; l < count; ++l) {
            const float* c = x_ + ids[l] * d_;
            for (int64_t j = 0; j < padded_depth(d_); ++j) centred_[j] = j < d_ ? c[j] - shift_[j] : 0;
            uint8_t* lane = codes_ + l * quantised::row_stride(rows_.steps) * 4;
            const float scale = quantised::scale_for(quantised::largest_magnitude(centred_, d_));
            int32_t sum;
            candidates_[l] =
                bounds_of(quantised::quantise(centred_, d_, scale, 128, lane, quantised::step_stride(kGroup) * 4, &sum));
        }
    }

    /// Of rows first .. first + count, ascending, those that may come nearer by a candidate: their offsets, and in bit l of
    /// `nearer` whether by candidate l. `first` is a multiple of kBlockRows; masses and weights (null: ones) are those of all
    /// rows. Returns how many there are, and what each candidate takes off their masses.
    int64_t find(int64_t first, int64_t count, const float* masses, const float* weights, int16_t* offsets, uint8_t* nearer,
                 Gains& gains) const {
        const quantised::Multiplier multiplier(rows_.steps);
        int32_t products[kGroup * kBlockRows];
        __m512 least[kCandidateLanes] = {}, most[kCandidateLanes] = {};
        int64_t found = 0;
        for (int64_t i = 0; i < count; i += kLanes) {
            const int64_t lane = i % kBlockRows, left = count - i;
            fetch(first + i + kBlockRows);
            if (lane == 0 && left > kBlockRows - kLanes)
                multiply<3>(first + i, products);
            else if (count - (i - lane) <= kBlockRows - kLanes)
                multiply<1>(first + i, products + lane);
            const auto inside = static_cast<__mmask16>(left < kLanes ? (1U << left) - 1 : 0xFFFFU);
            const __m512 mass = _mm512_maskz_loadu_ps(inside, masses + first + i);
            const __m512 weight = weights == nullptr ? _mm512_set1_ps(1) : _mm512_maskz_loadu_ps(inside, weights + first + i);
            const __m128i bits = compare(first + i, products + lane, inside, mass, weight, least, most);
            uint8_t of_lanes[kLanes];
            _mm_storeu_si128(reinterpret_cast<__m128i*>(of_lanes), bits);
            unsigned open = _mm_test_epi8_mask(bits, bits);
            for (; open != 0; open &= open - 1, ++found) {
                const int row = __builtin_ctz(open);
                offsets[found] = static_cast<int16_t>(i + row);
                nearer[found] = of_lanes[row];
            }
        }
        constexpr float kSum = 1e-5F;  // covers the rounding of these sums
        for (int l = 0; l < kCandidateLanes; ++l) {
            gains.least[l] = _mm512_reduce_add_ps(least[l]) * (1 - kSum);
            gains.most[l] = _mm512_reduce_add_ps(most[l]) * (1 + kSum);
        }
        return found;
    }

   private:
    static constexpr int kGroup = quantised::group_rows(kCandidateLanes);
    static constexpr int64_t kLanes = quantised::kWidth;
    static constexpr float kUp = 1.000001F;  // covers a few roundings

    struct Bounds {
        float scale, square, residual;  // square: not above |x~|^2; residual: not below |x - x~|
    };

    /// Of a row that is too long, or too short, for squares in float, nothing is said.
    Bounds bounds_of(const quantised::Quantised& how) const {
        constexpr float kLongest = 1e18F, kLeastScale = 1e-16F;
        if (!(how.norm < kLongest && how.scale > kLeastScale)) return {1, 0, __builtin_inff()};
        const float lost = 2e-19F * __builtin_sqrtf(static_cast<float>(d_));  // squares that underflow
        return {how.scale, how.norm * how.norm * (1 - 5e-6F), (how.residual + 2e-7F * (how.norm + how.residual) + lost) * kUp};
    }

    /// Has a panel on its way: between so many of them the CPU's own prefetching does not get going.
    [[gnu::always_inline]] void fetch(int64_t row) const {
        if (row >= rows_.n) return;
        const uint8_t* panel = rows_.panel_of(row);
        for (int64_t byte = 0; byte < rows_.panel_bytes(); byte += 64) __builtin_prefetch(panel + byte);
    }

    /// Products of the candidates with the rows of Panels panels: (kGroup, kBlockRows).
    template <int Panels>
    void multiply(int64_t begin, int32_t* products) const {
        const auto tile = [&]<int Rows>() {
            quantised::multiply_tile<Rows, kGroup, Panels>(codes_, rows_.panel_of(begin), kLanes * 4, rows_.panel_bytes(),
                                                           rows_.steps, rows_.how.starts + begin, products, kBlockRows);
        };
        if constexpr (quantised::kTiles) {
            tile.template operator()<kGroup>();
        } else {
            if (count_ <= 2) return tile.template operator()<2>();
            if (count_ <= 4) return tile.template operator()<4>();
            if (count_ <= 6) return tile.template operator()<6>();
            tile.template operator()<8>();
        }
    }

    /// Of the 16 rows `inside`: byte i has bit l where row + i may come nearer by candidate l. Adds up what l takes off.
    __m128i compare(int64_t row, const int32_t* products, __mmask16 inside, __m512 mass, __m512 weight, __m512* least,
                    __m512* most) const {
        const __m512 scale = _mm512_loadu_ps(scales_ + row), square = _mm512_loadu_ps(squares_ + row);
        const __m512 residual = _mm512_loadu_ps(residuals_ + row), reach = _mm512_loadu_ps(reaches_ + row);
        const __m512 rounding = _mm512_set1_ps(1e-6F * static_cast<float>(d_ + 16)), slack = _mm512_set1_ps(1.5e-5F);
        __m128i bits = _mm_setzero_si128();
        for (int l = 0; l < count_; ++l) {
            const Bounds& c = candidates_[l];
            const __m512 product = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_loadu_si512(products + l * kBlockRows)));
            const __m512 squares = _mm512_add_ps(square, _mm512_set1_ps(c.square));
            const __m512 v = _mm512_fnmadd_ps(_mm512_set1_ps(2 * c.scale), product, squares);
            const __m512 t = _mm512_add_ps(reach, _mm512_set1_ps(c.residual)), t_square = _mm512_mul_ps(t, t);
            const __mmask16 may = _mm512_mask_cmp_ps_mask(inside, v, t_square, _CMP_LT_OQ);
            bits = _mm_or_si128(bits, _mm_maskz_set1_epi8(may, static_cast<char>(1 << l)));

            const __m512 e = _mm512_add_ps(residual, _mm512_set1_ps(c.residual)), middle = _mm512_fmadd_ps(e, e, v);
            __m512 width = _mm512_fmadd_ps(rounding, t_square, _mm512_mul_ps(slack, squares));
            width = _mm512_fmadd_ps(_mm512_add_ps(e, e), t, width);
            const __m512 at_least = _mm512_fnmadd_ps(weight, _mm512_add_ps(middle, width), mass);
            const __m512 at_most = _mm512_fnmadd_ps(weight, _mm512_sub_ps(middle, width), mass);
            least[l] = _mm512_mask_add_ps(least[l], may, least[l], _mm512_max_ps(at_least, _mm512_setzero_ps()));
            most[l] =
                _mm512_mask_add_ps(most[l], may, most[l], _mm512_min_ps(mass, _mm512_max_ps(_mm512_setzero_ps(), at_most)));
        }
        return bits;
    }

    const int64_t d_;
    const int pieces_;
    double* sums_;  // (D)
    float* shift_;  // (D)
    QuantisedRows rows_;
    float *scales_, *squares_, *residuals_;  // (N) Bounds
    float* reaches_;                         // (N) sqrt(nearest) + |x - x~|, at least; NaN where nothing comes nearer
    float* centred_;                         // (padded D)
    uint8_t* codes_;                         // the candidates: quantised.h, unsigned, one group
    Bounds candidates_[kCandidateLanes] = {};
    int count_ = 0;
    const float* x_ = nullptr;
};

#endif

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

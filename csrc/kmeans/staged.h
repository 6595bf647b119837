// One block's rows as the lanes of 8-bit products, with what turns those into scores and tells how far they may be off.
#pragma once

#include "kmeans/codes.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

#if defined(__AVX512VNNI__)

/// What is kept of a row in a lane has a defined value in all lanes below `lanes`, rows or none.
class StagedRows {
   public:
    static constexpr int64_t kLanes = quantised::kWidth;
    static_assert(kBlockRows == 3 * kLanes);

    StagedRows(int64_t d, const Context& context) : words_(context.scratch<int32_t>(kWordLanes * quantised::steps(d))) {
        std::fill_n(words_, kWordLanes * quantised::steps(d), 0);
    }

    int64_t lanes = 0;                                                 // of the block's rows, to whole vectors
    float inverses[kBlockRows] = {};                                   // of the rows' scales
    float units[kBlockRows], bounds[kBlockRows], squares[kBlockRows];  // of the scores; E; |x|^2, at least

    /// Takes rows[0 .. count), ascending: where they stand if nothing lies between them, else their codes are copied, one
    /// compressed store for each step of a source panel.
    void stage(const QuantisedRows& data, const int64_t* rows, int64_t count) {
        lanes = (count + kLanes - 1) / kLanes * kLanes;
        if (rows[0] % kLanes == 0 && rows[count - 1] - rows[0] == count - 1) {
            panels_ = data.panel_of(rows[0]), step_bytes_ = kLanes * 4, panel_bytes_ = data.panel_bytes();
            std::copy_n(data.how.starts + rows[0], lanes, starts_);
            std::copy_n(data.how.scales + rows[0], lanes, scales_);
            std::copy_n(data.how.norms + rows[0], lanes, norms_);
            std::copy_n(data.how.residuals + rows[0], lanes, residuals_);
            return;
        }
        panels_ = reinterpret_cast<const uint8_t*>(words_), step_bytes_ = kWordLanes * 4, panel_bytes_ = kLanes * 4;
        gather(data.how, rows, count);
        for (int64_t i = 0, filled = 0; i < count; filled = i) {
            const auto* from = reinterpret_cast<const int32_t*>(data.panel_of(rows[i]));
            const int64_t end = rows[i] / kLanes * kLanes + kLanes;
            unsigned mask = 0;
            for (; i < count && rows[i] < end; ++i) mask |= 1U << rows[i] % kLanes;
            for (int64_t step = 0; step < data.steps; ++step)
                _mm512_storeu_si512(
                    words_ + step * kWordLanes + filled,
                    _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), _mm512_loadu_si512(from + step * kLanes)));
        }
    }

    /// How far each row's scores with `centres` may be off, where the lowest bits of one, up to 2^-`exact_bits` of it, hold
    /// something else.
    void bound(const QuantisedCentres& centres, int exact_bits) {
        // Rounding: the score itself took three roundings, a float score d more.
        const float rounding = 1.0F / static_cast<float>(1 << exact_bits) + 1.2e-7F * static_cast<float>(2 * centres.d + 64);
        const float norm = centres.norm, residual = centres.residual, scale = centres.scale;
        for (int64_t i = 0; i < lanes; ++i) {
            const float length = norms_[i] + residuals_[i];
            const float error = residuals_[i] * norm + norms_[i] * residual + rounding * norm * (length + norm);
            inverses[i] = 1 / scales_[i];
            units[i] = scales_[i] * scale;
            bounds[i] = 1.00001F * error / units[i];
            squares[i] = length * length;
        }
    }

    /// Integer products of the first Panels vectors of lanes with `size` centroids of a group, kBlockRows from one to the next.
    template <int Panels>
    void multiply(const uint8_t* group, int64_t size, int64_t steps, int32_t* out) const {
        constexpr int kGroup = QuantisedCentres::kGroup;
        if (size == kGroup || quantised::kTiles)
            return quantised::multiply_tile<kGroup, kGroup, Panels>(group, panels_, step_bytes_, panel_bytes_, steps, starts_,
                                                                    out, kBlockRows);
        if constexpr (!quantised::kTiles)
            for (int64_t row = 0; row < size; row += 2)  // an odd last one takes along what lies beside it
                quantised::multiply_tile<2, kGroup, Panels>(group + row * 4, panels_, step_bytes_, panel_bytes_, steps, starts_,
                                                            out + row * kBlockRows, kBlockRows);
    }

    /// The scores of 16 rows with one centroid, from their products.
    static __m512 scores(const int32_t* products, float half, __m512 inverse) {
        return _mm512_fnmadd_ps(_mm512_set1_ps(half), inverse, _mm512_cvtepi32_ps(_mm512_loadu_si512(products)));
    }

   private:
    /// What is known of rows[0 .. count).
    void gather(const quantised::QuantisedLanes& how, const int64_t* rows, int64_t count) {
        for (int64_t i = 0; i < count; i += 8) {
            const auto lanes_left = static_cast<__mmask8>(count - i < 8 ? (1U << (count - i)) - 1 : 0xFF);
            const __m512i ids = _mm512_maskz_loadu_epi64(lanes_left, rows + i);
            const auto floats = [&](const float* of_rows, float* to) {
                _mm256_storeu_ps(to + i, _mm512_mask_i64gather_ps(_mm256_setzero_ps(), lanes_left, ids, of_rows, 4));
            };
            floats(how.scales, scales_), floats(how.norms, norms_), floats(how.residuals, residuals_);
            const __m256i starts = _mm512_mask_i64gather_epi32(_mm256_setzero_si256(), lanes_left, ids, how.starts, 4);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(starts_ + i), starts);
        }
    }

    static constexpr int64_t kWordLanes = kBlockRows + kLanes;  // the last compressed store reaches beyond the block

    int32_t* words_;  // (steps, kWordLanes) the codes of rows that do not stand together
    const uint8_t* panels_ = nullptr;
    int64_t step_bytes_ = 0, panel_bytes_ = 0;
    int32_t starts_[kBlockRows] = {};
    float scales_[kBlockRows] = {}, norms_[kBlockRows] = {}, residuals_[kBlockRows] = {};
};

#endif

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

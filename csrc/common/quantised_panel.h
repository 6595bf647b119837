// Rows to 8 bits sixteen at a time, as the lanes of a panel (quantised.h): nothing is reduced or stored row by row.
#pragma once

#include "common/quantised.h"

namespace fastclust::quantised::FASTCLUST_CAPABILITY {

/// How the rows of panels were quantised, by row.
struct QuantisedLanes {
    float* scales;
    float* norms;      // |v~|, or more by 1.3e-6 of it at most
    float* residuals;  // |v - v~|, rounded up
    int32_t* starts;   // of their sums of products: -128 sum_j q_j
};

#if defined(__AVX512VNNI__)

/// Lane r of the result: `join` over all lanes of rows[r].
template <class Join>
inline __m512 across(const __m512 (&rows)[kWidth], const Join& join) {
    __m512 pairs[8], fours[4], eights[2];
    for (int i = 0; i < 8; ++i)
        pairs[i] = join(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]), _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
        const __m512d even = _mm512_castps_pd(pairs[2 * i]), odd = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = join(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    }
    const auto quarters = [&](__m512 a, __m512 b) {
        return join(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    };
    for (int i = 0; i < 2; ++i) eights[i] = quarters(fours[2 * i], fours[2 * i + 1]);
    return quarters(eights[0], eights[1]);
}

/// words[i] lane r becomes words[r] lane i.
inline void transpose(__m512i (&words)[kWidth]) {
    __m512i pairs[kWidth], fours[kWidth];
    for (int i = 0; i < kWidth; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(words[i], words[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(words[i], words[i + 1]);
    }
    for (int i = 0; i < kWidth; i += 4)
        for (int half = 0; half < 2; ++half) {
            fours[i + 2 * half] = _mm512_unpacklo_epi64(pairs[i + half], pairs[i + 2 + half]);
            fours[i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[i + half], pairs[i + 2 + half]);
        }
    for (int i = 0; i < 4; ++i) {
        const __m512i even = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x88),
                      odd = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xDD),
                      later_even = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0x88),
                      later_odd = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0xDD);
        words[i] = _mm512_shuffle_i32x4(even, later_even, 0x88);
        words[4 + i] = _mm512_shuffle_i32x4(odd, later_odd, 0x88);
        words[8 + i] = _mm512_shuffle_i32x4(even, later_even, 0xDD);
        words[12 + i] = _mm512_shuffle_i32x4(odd, later_odd, 0xDD);
    }
}

/// Quantises kWidth rows of v, which are padded with zeros to `width`, a multiple of 16, each with the least scale that clips
/// nothing; `step_count` steps of them go to the panel, the rest of the rows' results to lane 0 and on of `how`.
inline void quantise_panel(const float* v, int64_t width, int64_t step_count, uint8_t* panel, const QuantisedLanes& how) {
    constexpr float kUp = 1.000001F, kUpSum = 1.0001F;  // cover a few roundings, and those of a sum
    constexpr int kWordFeatures = 4 * kWidth;
    __m512 largest[kWidth], errors[kWidth];
    for (int r = 0; r < kWidth; ++r) {
        largest[r] = errors[r] = _mm512_setzero_ps();
        for (int64_t j = 0; j < width; j += kWidth)
            largest[r] = _mm512_max_ps(largest[r], _mm512_abs_ps(_mm512_loadu_ps(v + r * width + j)));
    }
    const __m512 top = across(largest, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
    const __m512 scales = top > 1e-30F ? top / 127.0F : _mm512_set1_ps(1);
    float inverses[kWidth];
    _mm512_storeu_ps(how.scales, scales);
    _mm512_storeu_ps(inverses, 1.0F / scales);
    __m512i sums = _mm512_setzero_si512(), squares = _mm512_setzero_si512();
    for (int64_t first = 0; first < 4 * step_count; first += kWordFeatures) {
        alignas(64) uint8_t bytes[kWidth][kWordFeatures] = {};
        for (int r = 0; r < kWidth; ++r)
            for (int64_t j = first; j < width && j < first + kWordFeatures; j += kWidth) {
                const __m512 value = _mm512_loadu_ps(v + r * width + j);
                const __m512i integers = _mm512_cvtps_epi32(value * inverses[r]);
                const __m512 error = value - _mm512_cvtepi32_ps(integers) * how.scales[r];
                errors[r] += error * error;
                _mm_store_si128(reinterpret_cast<__m128i*>(bytes[r] + j - first), _mm512_cvtepi32_epi8(integers));
            }
        __m512i words[kWidth];
        for (int r = 0; r < kWidth; ++r) words[r] = _mm512_load_si512(bytes[r]);
        transpose(words);
        for (int64_t i = 0; i < kWidth && first / 4 + i < step_count; ++i) {
            _mm512_storeu_si512(panel + (first / 4 + i) * 4 * kWidth, words[i]);
            const __m512i magnitudes = _mm512_abs_epi8(words[i]);
            sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), words[i]);
            squares = _mm512_dpbusd_epi32(squares, magnitudes, magnitudes);
        }
    }
    const __m512 error = across(errors, [](__m512 a, __m512 b) { return a + b; });
    _mm512_storeu_ps(how.norms, kUp * scales * _mm512_sqrt_ps(_mm512_cvtepi32_ps(squares)));
    _mm512_storeu_ps(how.residuals, kUpSum * _mm512_sqrt_ps(error));
    _mm512_storeu_si512(how.starts, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sums), 7));
}

#endif

}  // namespace fastclust::quantised::FASTCLUST_CAPABILITY

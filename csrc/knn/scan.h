// Which scores of a group of kGroup columns reach the floor of their row, and which the floors of their columns: one bit each.
#pragma once

#include <cstdint>

#if FASTCLUST_CAPABILITY_avx2 || FASTCLUST_CAPABILITY_avx512 || FASTCLUST_CAPABILITY_avx512_vnni
#include <immintrin.h>
#endif

namespace fastclust::knn::FASTCLUST_CAPABILITY {

struct Hits {
    uint32_t row = 0, column = 0;
};

#if FASTCLUST_CAPABILITY_avx512 || FASTCLUST_CAPABILITY_avx512_vnni

constexpr int kScanLanes = 16;
inline __m512 load_scores(const float* p) {
    return _mm512_loadu_ps(p);
}
inline __m512i load_scores(const int32_t* p) {
    return _mm512_loadu_si512(p);
}
inline __m512 same_scores(float value) {
    return _mm512_set1_ps(value);
}
inline __m512i same_scores(int32_t value) {
    return _mm512_set1_epi32(value);
}
inline __m512 add_scores(__m512 a, __m512 b) {
    return _mm512_add_ps(a, b);
}
inline __m512i add_scores(__m512i a, __m512i b) {
    return _mm512_add_epi32(a, b);
}
inline uint32_t reaching(__m512 a, __m512 floor) {
    return _mm512_cmp_ps_mask(a, floor, _CMP_GE_OQ);
}
inline uint32_t reaching(__m512i a, __m512i floor) {
    return _mm512_cmpge_epi32_mask(a, floor);
}

#elif FASTCLUST_CAPABILITY_avx2

constexpr int kScanLanes = 8;
inline __m256 load_scores(const float* p) {
    return _mm256_loadu_ps(p);
}
inline __m256 same_scores(float value) {
    return _mm256_set1_ps(value);
}
inline __m256 add_scores(__m256 a, __m256 b) {
    return _mm256_add_ps(a, b);
}
inline uint32_t reaching(__m256 a, __m256 floor) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, floor, _CMP_GE_OQ)));
}

#else

constexpr int kScanLanes = 1;
inline float load_scores(const float* p) {
    return *p;
}
inline float same_scores(float value) {
    return value;
}
inline float add_scores(float a, float b) {
    return a + b;
}
inline uint32_t reaching(float a, float floor) {
    return a >= floor;
}

#endif

/// The score of column c is dots[c] + column_bias[c] + row_bias, in this order. Columns count only where kBoth.
template <bool kBoth, class Score>
inline Hits scan_group(const Score* dots, const Score* column_bias, const Score* column_floors, Score row_bias,
                       Score row_floor) {
    constexpr int kGroupColumns = 32;
    const auto bias = same_scores(row_bias), floor = same_scores(row_floor);
    Hits hits;
#pragma GCC unroll 4
    for (int c = 0; c < kGroupColumns; c += kScanLanes) {
        const auto score = add_scores(add_scores(load_scores(dots + c), load_scores(column_bias + c)), bias);
        hits.row |= reaching(score, floor) << c;
        if constexpr (kBoth) hits.column |= reaching(score, load_scores(column_floors + c)) << c;
    }
    return hits;
}

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

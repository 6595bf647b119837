// Which scores of a group of columns may matter: those that reach their row's floor or, where both sides look for
// neighbours, their column's. One bit each; hardly any is set, and whose floor it was is asked later.
#pragma once

#include <cstdint>

#include "common/intrinsics.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

/// Columns compared at once.
constexpr int64_t kGroup = 64;

#if defined(__AVX512F__)

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
inline __m512 lesser(__m512 a, __m512 b) {
    return _mm512_min_ps(a, b);
}
inline __m512i lesser(__m512i a, __m512i b) {
    return _mm512_min_epi32(a, b);
}
inline uint64_t reaching(__m512 a, __m512 floor) {
    return _mm512_cmp_ps_mask(a, floor, _CMP_GE_OQ);
}
inline uint64_t reaching(__m512i a, __m512i floor) {
    return _mm512_cmpge_epi32_mask(a, floor);
}

#elif defined(__AVX2__)

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
inline __m256 lesser(__m256 a, __m256 b) {
    return _mm256_min_ps(a, b);
}
inline uint64_t reaching(__m256 a, __m256 floor) {
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
inline float lesser(float a, float b) {
    return a < b ? a : b;
}
inline uint64_t reaching(float a, float floor) {
    return a >= floor;
}

#endif

/// Whether the functions above are there for such scores.
template <class Score>
constexpr bool kScanned = false;
template <>
constexpr bool kScanned<float> = true;
#if defined(__AVX512F__)
template <>
constexpr bool kScanned<int32_t> = true;
#endif

/// The filter's score of each column is dots[c] + row_bias, the column's own bias being among its dots. The columns' floors
/// count only where kBoth.
template <bool kBoth, class Score>
inline uint64_t scan_group(const Score* dots, const Score* column_floors, Score row_bias, Score row_floor) {
    const auto bias = same_scores(row_bias), own_floor = same_scores(row_floor);
    uint64_t hits = 0;
#pragma GCC unroll 4
    for (int64_t c = 0; c < kGroup; c += kScanLanes) {
        auto floor = own_floor;
        if constexpr (kBoth) floor = lesser(floor, load_scores(column_floors + c));
        hits |= reaching(add_scores(load_scores(dots + c), bias), floor) << c;
    }
    return hits;
}

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

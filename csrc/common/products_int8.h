// Products of 8-bit codes, four times the rate of single precision: out[r][c] = sum_j x[r][j] y[c][j], exact in int32.
// AVX-512 VNNI alone; the same plan as products.h, four features at a time in one 32-bit word.
//
// vpdpbusd multiplies unsigned by signed bytes, so columns are stored plus 128 and each row starts at -128 sum_j x[r][j]:
//     panel p:  words [j / 4][32 columns], of bytes y + 128          kWidth columns
//     tile t:   words [j / 4][12 rows], of bytes x                   kTileRows rows, after them their starts
#pragma once

#if FASTCLUST_CAPABILITY_avx512_vnni

#include <immintrin.h>

#include <cstdint>

namespace fastclust::products_int8::FASTCLUST_CAPABILITY {

constexpr int kWidth = 32;
constexpr int kTileRows = 12;
constexpr uint32_t kOffset = 0x80808080u;  // +128, or -128, in each byte of a word

/// Words that hold `depth` codes.
inline int64_t words_of(int64_t depth) {
    return (depth + 3) / 4;
}

/// Words of a tile with its starts.
inline int64_t tile_size(int64_t words) {
    return (words + 1) * kTileRows;
}

/// Row `row` of a tile becomes column `column` of `columns`' panels.
inline void load_row(const uint32_t* columns, int64_t column, int64_t words, int64_t row, int32_t* tile) {
    const uint32_t* from = columns + column / kWidth * kWidth * words + column % kWidth;
    __m128i sum = _mm_setzero_si128();
    const __m128i ones = _mm_set1_epi8(1);
    for (int64_t w = 0; w < words; ++w) {
        const int32_t codes = static_cast<int32_t>(from[w * kWidth] ^ kOffset);
        tile[w * kTileRows + row] = codes;
        sum = _mm_dpbusd_epi32(sum, ones, _mm_cvtsi32_si128(codes));
    }
    tile[words * kTileRows + row] = -128 * _mm_cvtsi128_si32(sum);
}

/// A tile with one panel: out[row * ld + lane], `out` 64-byte aligned.
inline void multiply_tile(const int32_t* tile, const uint32_t* panel, int64_t words, int32_t* out, int64_t ld) {
    __m512i sums[kTileRows][2];
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r) sums[r][0] = sums[r][1] = _mm512_set1_epi32(tile[words * kTileRows + r]);
    for (int64_t w = 0; w < words; ++w, tile += kTileRows, panel += kWidth) {
        const __m512i left = _mm512_load_si512(panel), right = _mm512_load_si512(panel + 16);
#pragma GCC unroll 12
        for (int r = 0; r < kTileRows; ++r) {
            const __m512i codes = _mm512_set1_epi32(tile[r]);
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], left, codes);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], right, codes);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r) {
        _mm512_store_si512(out + r * ld, sums[r][0]);
        _mm512_store_si512(out + r * ld + 16, sums[r][1]);
    }
}

}  // namespace fastclust::products_int8::FASTCLUST_CAPABILITY

#endif

// Exact products of 8-bit rows with 8-bit columns, four times the rate of float where the CPU has VNNI.
//
// A row v is held as scale * q with q in [-127, 127]. The products of the q are integers, so a product of two rows is off by
// quantisation alone, which the residuals' norms bound (Cauchy-Schwarz):
//     |v.w - scale_v scale_w q_v.q_w|  <=  |v - v~| |w| + |v~| |w - w~|
// Rows (q + 128, unsigned) and columns (q, signed) are packed four features to a lane, the layout of vpdpbusd and of AMX's
// tdpbusd; the excess of 128 is taken out by the value that a column's sum starts from.
//     rows:     groups of kTileRows,  [group][feature / 4][row][4]
//     columns:  panels of kWidth,     [panel][feature / 4][column][4]
#pragma once

#include <cstdint>

#if FASTCLUST_CAPABILITY_avx512_vnni
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12 warns of the intrinsics' own undefined operands
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace fastclust::quantised::FASTCLUST_CAPABILITY {

#if FASTCLUST_CAPABILITY_avx512_vnni
constexpr bool kAvailable = true;
#else
constexpr bool kAvailable = false;
#endif
constexpr int kTileRows = 12;
constexpr int kWidth = 16;
constexpr int64_t kMaxDepth = 32768;  // 255 * 127 * depth stays below 2^30

inline int64_t steps(int64_t depth) {
    return (depth + 3) / 4;
}

/// Bytes of `rows` packed rows; whole groups.
inline int64_t packed_rows_size(int64_t rows, int64_t depth) {
    return (rows + kTileRows - 1) / kTileRows * kTileRows * steps(depth) * 4;
}

/// Bytes of `columns` packed columns; whole panels.
inline int64_t packed_columns_size(int64_t columns, int64_t depth) {
    return (columns + kWidth - 1) / kWidth * kWidth * steps(depth) * 4;
}

/// How a row was quantised; the norms are rounded up.
struct Quantised {
    float scale;     // > 0
    float norm;      // |v~|
    float residual;  // |v - v~|
};

/// Quantises v, which is padded with zeros to whole sixteens; the four values of step s go to q + s * stride, plus `excess`.
inline Quantised quantise(const float* v, int64_t depth, int excess, uint8_t* q, int64_t stride, int32_t* sum) {
    typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
    typedef int32_t Ints __attribute__((vector_size(64)));
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    constexpr float kRound = 12582912;  // 1.5 * 2^23: adding it leaves no fraction
    Floats largest = {}, residuals = {};
    Ints squares = {}, totals = {};
    for (int64_t j = 0; j < depth; j += 16) {
        const Floats value = *reinterpret_cast<const Floats*>(v + j);
        const Floats size = value < 0 ? -value : value;
        largest = size > largest ? size : largest;
    }
    float top = 0;
    for (int lane = 0; lane < 16; ++lane) top = largest[lane] > top ? largest[lane] : top;
    const float scale = top > 1e-30f ? top / 127 : 1, inverse = 1 / scale;
    for (int64_t j = 0; j < depth; j += 16) {
        const Floats value = *reinterpret_cast<const Floats*>(v + j);
        const Floats rounded = (value * inverse + kRound) - kRound;
        const Floats error = value - rounded * scale;
        const Ints integers = __builtin_convertvector(rounded, Ints);
        residuals += error * error;
        squares += integers * integers;
        totals += integers;
        const Bytes bytes = __builtin_convertvector(integers + excess, Bytes);
        for (int64_t step = j / 4, part = 0; part < 4 && step < steps(depth); ++step, ++part)
            __builtin_memcpy(q + step * stride, reinterpret_cast<const uint8_t*>(&bytes) + 4 * part, 4);
    }
    float residual = 0, square = 0;
    *sum = 0;
    for (int lane = 0; lane < 16; ++lane) {
        residual += residuals[lane];
        square += static_cast<float>(squares[lane]);
        *sum += totals[lane];
    }
    constexpr float kUp = 1.0001f;  // covers the rounding of these sums
    return {scale, kUp * scale * __builtin_sqrtf(square), kUp * __builtin_sqrtf(residual)};
}

inline Quantised pack_row(const float* v, int64_t row, int64_t depth, uint8_t* packed) {
    uint8_t* group = packed + row / kTileRows * kTileRows * steps(depth) * 4;
    int32_t sum;
    return quantise(v, depth, 128, group + row % kTileRows * 4, kTileRows * 4, &sum);
}

/// `start` is what the column's sums begin with: -128 sum_j q_j.
inline Quantised pack_column(const float* v, int64_t column, int64_t depth, uint8_t* packed, int32_t* start) {
    uint8_t* panel = packed + column / kWidth * kWidth * steps(depth) * 4;
    const Quantised how = quantise(v, depth, 0, panel + column % kWidth * 4, kWidth * 4, start);
    *start *= -128;
    return how;
}

#if FASTCLUST_CAPABILITY_avx512_vnni

/// One group of rows with Panels panels: out[row * ld + panel * kWidth + lane].
template <int Panels>
inline void multiply_tile(const uint8_t* rows, const uint8_t* panel, int64_t depth, const int32_t* start, int32_t* out,
                          int64_t ld) {
    const int64_t count = steps(depth);
    __m512i sums[kTileRows][Panels];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) sums[r][p] = _mm512_loadu_si512(start + p * kWidth);
    for (int64_t step = 0; step < count; ++step, rows += kTileRows * 4, panel += kWidth * 4) {
        __m512i columns[Panels];
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) columns[p] = _mm512_loadu_si512(panel + p * kWidth * 4 * count);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
            int32_t four;
            __builtin_memcpy(&four, rows + r * 4, 4);
            const __m512i row = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int p = 0; p < Panels; ++p) sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], row, columns[p]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) _mm512_storeu_si512(out + r * ld + p * kWidth, sums[r][p]);
}

/// One group of rows with `panels` panels from `panel` on.
inline void multiply(const uint8_t* rows, const uint8_t* panel, int64_t panels, int64_t depth, const int32_t* start,
                     int32_t* out, int64_t ld) {
    const int64_t bytes = kWidth * 4 * steps(depth);
    int64_t p = 0;
    for (; p + 2 <= panels; p += 2) multiply_tile<2>(rows, panel + p * bytes, depth, start + p * kWidth, out + p * kWidth, ld);
    if (p < panels) multiply_tile<1>(rows, panel + p * bytes, depth, start + p * kWidth, out + p * kWidth, ld);
}

#endif

}  // namespace fastclust::quantised::FASTCLUST_CAPABILITY

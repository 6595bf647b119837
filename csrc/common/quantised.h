// Exact products of 8-bit rows with 8-bit columns, four times the rate of float where the CPU has VNNI, far more with AMX.
//
// A row v is held as scale * q with q in [-127, 127]. The products of the q are integers, so a product of two rows is off by
// quantisation alone, which the residuals' norms bound (Cauchy-Schwarz):
//     |v.w - scale_v scale_w q_v.q_w|  <=  |v - v~| |w| + |v~| |w - w~|
// One side (q + 128, unsigned) and the other (q, signed) are packed four features to a lane, the layout of vpdpbusd and of
// AMX's tdpbusd; the excess of 128 is taken out by the value that a signed vector's sums start from.
//     unsigned: groups of a tile's rows, [group][feature / 4][row][4]; for AMX [group][row][feature / 4][4]
//     signed:   panels of kWidth,        [panel][feature / 4][column][4]
#pragma once

#include <cstdint>

#include "common/intrinsics.h"
#include "common/lanes.h"

#if defined(__AMX_INT8__) || defined(FASTCLUST_EMULATE_AMX)
#define FASTCLUST_TILES 1
#include "common/tiles.h"
#endif

namespace fastclust::quantised::FASTCLUST_CAPABILITY {

namespace lanes = fastclust::lanes::FASTCLUST_CAPABILITY;

#if defined(__AVX512VNNI__)
constexpr bool kAvailable = true;
#else
constexpr bool kAvailable = false;
#endif
constexpr int kWidth = 16;
constexpr int64_t kMaxDepth = 32768;  // 255 * 127 * depth stays below 2^30

#if FASTCLUST_TILES
constexpr bool kTiles = true;

namespace tiles = fastclust::tiles::FASTCLUST_CAPABILITY;

/// What a thread holds while it multiplies vectors of so many steps.
using Multiplier = tiles::Tiles;

/// Steps of four features; those beyond the depth are zeros of the signed side.
inline int64_t steps(int64_t depth) {
    const int64_t at_once = tiles::steps_at_once((depth + 3) / 4);
    return ((depth + 3) / 4 + at_once - 1) / at_once * at_once;
}

/// Rows of a group, where registers would hold the sums of `in_registers`.
constexpr int group_rows(int) {
    return tiles::kRows;
}

/// Words of four features from one row of a group to the next, and from one step of a row to the next.
constexpr int64_t row_stride(int64_t step_count) {
    return step_count;
}
constexpr int64_t step_stride(int) {
    return 1;
}

#else
constexpr bool kTiles = false;

struct Multiplier {
    explicit Multiplier(int64_t) {}
};

inline int64_t steps(int64_t depth) {
    return (depth + 3) / 4;
}
constexpr int group_rows(int in_registers) {
    return in_registers;
}
constexpr int64_t row_stride(int64_t) {
    return 1;
}
constexpr int64_t step_stride(int group) {
    return group;
}

#endif

/// How a vector was quantised; the norms are rounded up.
struct Quantised {
    float scale;     // > 0
    float norm;      // |v~|, or more by 1.3e-6 of it at most
    float residual;  // |v - v~|
};

typedef float Sums __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));

/// The largest |v_j|; v is padded with zeros to whole sixteens.
inline float largest_magnitude(const float* v, int64_t depth) {
    Sums largest = {};
    for (int64_t j = 0; j < depth; j += 16) {
        const Floats value = *reinterpret_cast<const Floats*>(v + j);
        const Floats size = value < 0 ? -value : value;
        largest = size > largest ? size : largest;
    }
    const auto low = __builtin_shufflevector(largest, largest, 0, 1, 2, 3, 4, 5, 6, 7),
               high = __builtin_shufflevector(largest, largest, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto eight = low > high ? low : high;
    float top = eight[0];
    for (int lane = 1; lane < 8; ++lane) top = eight[lane] > top ? eight[lane] : top;
    return top;
}

/// The least scale that clips nothing up to `top`.
inline float scale_for(float top) {
    return top > 1e-30f ? top / 127 : 1;
}

/// Quantises v, which is padded with zeros to whole sixteens and not above 127 scales; the four values of step s go to
/// q + s * stride, plus `excess`.
inline Quantised quantise(const float* v, int64_t depth, float scale, int excess, uint8_t* q, int64_t stride, int32_t* sum) {
    typedef int32_t Ints __attribute__((vector_size(64)));
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    constexpr float kRound = 12582912;  // 1.5 * 2^23: adding it leaves no fraction
    const float inverse = 1 / scale;
    Sums residuals = {};
    Ints squares = {}, totals = {};
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
    for (int64_t step = (depth + 15) / 16 * 4; step < steps(depth); ++step) __builtin_memset(q + step * stride, 0, 4);
    const float residual = lanes::sum(residuals), square = static_cast<float>(lanes::sum(squares));
    *sum = lanes::sum(totals);
    constexpr float kUp = 1.000001f, kUpSum = 1.0001f;  // cover a few roundings, and those of a sum
    return {scale, kUp * scale * __builtin_sqrtf(square), kUpSum * __builtin_sqrtf(residual)};
}

#if FASTCLUST_TILES

template <int Rows, int Group, int Panels>
inline void multiply_tile(const uint8_t* rows, const uint8_t* panels, int64_t step_bytes, int64_t panel_bytes, int64_t count,
                          const int32_t* start, int32_t* out, int64_t ld) {
    static_assert(Rows == tiles::kRows && Group == tiles::kRows);
    tiles::multiply<Panels>(rows, panels, step_bytes, panel_bytes, count, start, out, ld);
}

#elif defined(__AVX512VNNI__)

/// Adds `count` steps of products of Rows rows of a group of Group with Panels panels, whose steps are step_bytes apart, panels
/// panel_bytes.
template <int Rows, int Group, int Panels>
inline void accumulate(__m512i (&sums)[Rows][Panels], const uint8_t* rows, const uint8_t* panels, int64_t step_bytes,
                       int64_t panel_bytes, int64_t count) {
    for (int64_t step = 0; step < count; ++step, rows += Group * 4, panels += step_bytes) {
        __m512i columns[Panels];
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) columns[p] = _mm512_loadu_si512(panels + p * panel_bytes);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
            int32_t four;
            __builtin_memcpy(&four, rows + r * 4, 4);
            const __m512i row = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int p = 0; p < Panels; ++p) sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], row, columns[p]);
        }
    }
}

/// Their products: out[row * ld + panel * kWidth + lane]; `start` is what each column's sums begin with, -128 sum_j q_j.
template <int Rows, int Group, int Panels>
inline void multiply_tile(const uint8_t* rows, const uint8_t* panels, int64_t step_bytes, int64_t panel_bytes, int64_t count,
                          const int32_t* start, int32_t* out, int64_t ld) {
    __m512i sums[Rows][Panels];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) sums[r][p] = _mm512_loadu_si512(start + p * kWidth);
    accumulate<Rows, Group, Panels>(sums, rows, panels, step_bytes, panel_bytes, count);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) _mm512_storeu_si512(out + r * ld + p * kWidth, sums[r][p]);
}

#endif

}  // namespace fastclust::quantised::FASTCLUST_CAPABILITY

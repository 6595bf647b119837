// Products of a few rows with a few panels of columns, given up as soon as none of the pairs can reach a floor.
#pragma once

#include "common/quantised.h"

#if defined(__AVX512VNNI__)

#include <cstdint>

namespace fastclust::knn::FASTCLUST_CAPABILITY {

/// A tile's rows, and its columns: in groups of four panels at most.
constexpr int kStagedRows = fastclust::quantised::FASTCLUST_CAPABILITY::group_rows(6);
constexpr int kStagedPanels = 4;
constexpr int64_t kStagedColumns = kStagedPanels * fastclust::quantised::FASTCLUST_CAPABILITY::kWidth;

/// Where the products are looked at: stage s takes the words (four features each) [begins[s], begins[s + 1]).
struct Stages {
    static constexpr int kMost = 8;

    int count = 1;
    int64_t begins[kMost + 1] = {};
};

/// A tile's rows or columns. Sums begin with both sides' starts; with stage s > 0 both sides' lifts come on top.
struct TileSide {
    const uint8_t* codes;
    const int32_t* starts;
    int32_t* const* lifts_of_all;
    int64_t position;

    const int32_t* lifts(int stage) const { return lifts_of_all[stage] + position; }
};

namespace staged {

namespace quantised = fastclust::quantised::FASTCLUST_CAPABILITY;

template <int Rows, int Panels>
using Sums = __m512i[Rows][Panels];

/// Whether any sum reaches both the rows' floor, the least of theirs, and its column's... or one of the two.
template <int Rows, int Panels>
inline bool any_reaches(const Sums<Rows, Panels>& sums, int32_t row_floor, const int32_t* column_floors) {
    const __m512i of_rows = _mm512_set1_epi32(row_floor);
    uint32_t reached = 0;
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
        __m512i greatest = sums[0][p];
#pragma GCC unroll 16
        for (int r = 1; r < Rows; ++r) greatest = _mm512_max_epi32(greatest, sums[r][p]);
        const __m512i floor = _mm512_min_epi32(of_rows, _mm512_loadu_si512(column_floors + p * quantised::kWidth));
        reached |= _mm512_cmpge_epi32_mask(greatest, floor);
    }
    return reached != 0;
}

template <int Rows, int Panels>
inline void store(const Sums<Rows, Panels>& sums, int32_t* out) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) _mm512_storeu_si512(out + r * kStagedColumns + p * quantised::kWidth, sums[r][p]);
}

#if !FASTCLUST_TILES

/// One stage: whether its sums, which are then in `out`, reach a floor. Those of the stage before come from `out` too. A
/// function of its own, without branches before the products: g++ else finds no registers for them.
template <bool kFirst, int Panels>
[[gnu::noinline]] bool sweep_stage(const uint8_t* row_codes, const uint8_t* column_codes, int64_t panel_bytes, int64_t steps,
                                   const int32_t* of_rows, const int32_t* of_columns, int32_t row_floor,
                                   const int32_t* column_floors, int32_t* out) {
    Sums<kStagedRows, Panels> sums;
#pragma GCC unroll 16
    for (int r = 0; r < kStagedRows; ++r) {
        const __m512i row = _mm512_set1_epi32(of_rows[r]);
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) {
            sums[r][p] = _mm512_add_epi32(row, _mm512_loadu_si512(of_columns + p * quantised::kWidth));
            if constexpr (!kFirst)
                sums[r][p] = _mm512_add_epi32(sums[r][p], _mm512_loadu_si512(out + r * kStagedColumns + p * quantised::kWidth));
        }
    }
    quantised::accumulate<kStagedRows, kStagedRows, Panels>(sums, row_codes, column_codes, quantised::kWidth * 4, panel_bytes,
                                                            steps);
#pragma GCC unroll 16
    for (int r = 0; r < kStagedRows; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) asm("" : "+v"(sums[r][p]));
    if (!any_reaches<kStagedRows, Panels>(sums, row_floor, column_floors)) return false;
    store<kStagedRows, Panels>(sums, out);
    return true;
}

#endif

}  // namespace staged

/// The stage after which no pair can reach the least floor of its rows or its column's; stages.count where some do in the end:
/// then out[r * kStagedColumns + c] holds the sums.
template <int Panels>
inline int sweep_tile(const TileSide& rows, const TileSide& columns, const Stages& stages, int32_t row_floor,
                      const int32_t* column_floors, int32_t* out) {
    namespace quantised = staged::quantised;
    constexpr int64_t kLineBytes = quantised::kWidth * 4;
    const int64_t words = stages.begins[stages.count];
#if FASTCLUST_TILES
    static_assert(kStagedRows % 4 == 0);
    quantised::multiply_tile<kStagedRows, kStagedRows, Panels>(rows.codes, columns.codes, kLineBytes, kLineBytes * words, words,
                                                               columns.starts, out, kStagedColumns);
    bool reached = false;
    for (int first = 0; first < kStagedRows; first += 4) {
        staged::Sums<4, Panels> sums;
        for (int r = 0; r < 4; ++r)
            for (int p = 0; p < Panels; ++p)
                sums[r][p] = _mm512_add_epi32(_mm512_loadu_si512(out + (first + r) * kStagedColumns + p * quantised::kWidth),
                                              _mm512_set1_epi32(rows.starts[first + r]));
        reached |= staged::any_reaches<4, Panels>(sums, row_floor, column_floors);
        staged::store<4, Panels>(sums, out + first * kStagedColumns);
    }
    return reached ? stages.count : stages.count - 1;
#else
    const int64_t panel_bytes = kLineBytes * words;
    if (!staged::sweep_stage<true, Panels>(rows.codes, columns.codes, panel_bytes, stages.begins[1], rows.starts,
                                           columns.starts, row_floor, column_floors, out))
        return 0;
    for (int stage = 1; stage < stages.count; ++stage) {
        const int64_t begin = stages.begins[stage];
        if (!staged::sweep_stage<false, Panels>(rows.codes + begin * kStagedRows * 4, columns.codes + begin * kLineBytes,
                                                panel_bytes, stages.begins[stage + 1] - begin, rows.lifts(stage),
                                                columns.lifts(stage), row_floor, column_floors, out))
            return stage;
    }
    return stages.count;
#endif
}

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

#endif

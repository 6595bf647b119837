// Which rows need a search after the centroids have moved, and among which of these. A row's bounds (Nearest) fall by what its
// own centroid and the others moved; while they stay above zero its label stands (Hamerly 2010).
#pragma once

#include "common/intrinsics.h"
#include "kmeans/nearest.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

/// How far the centroids moved. Infinity stands for what is not known.
template <class T>
struct Travel {
    const T* moves;       // (K) each, at most
    int32_t farthest;     // the one that moved farthest
    T most, second_most;  // how far it moved, at most, and all others
    T near;               // of all but the far movers, at most; infinite where none is searched by itself
    bool few;             // of them moved at all
};

/// What a row's label is to be looked for among; nothing where it stands.
enum Need : int32_t { kNeedsAll = 1, kNeedsMoved = 2, kNeedsRivals = 4, kNeedsFar = 8 };

template <class T>
constexpr T kLess = static_cast<T>(1 - 4e-7);  // for the rounding of bounds
template <class T>
constexpr T kMore = static_cast<T>(1.000001);

/// Lowers the bounds of `count` rows of a span by what the centroids moved, and tells their needs. score_after(i, score, move)
/// is an upper bound of row i's score once its centroid has moved; without far movers, scores of those that did are unknown.
template <bool kWithRivals, bool kFar, class T, class ScoreAfter>
inline void lower_bounds(const Travel<T>& travel, const Nearest<T>& rows, int64_t count, const ScoreAfter& score_after,
                         int32_t* needs) {
    constexpr T kUnknown = static_cast<T>(__builtin_inf());
    T move[kSpanRows], loss[kSpanRows], rivals_move[kSpanRows];
    for (int64_t i = 0; i < count; ++i) move[i] = travel.moves[rows.labels[i]];
    for (int64_t i = 0; i < count; ++i)
        loss[i] = move[i] + (rows.labels[i] == travel.farthest ? travel.second_most : travel.most);
    for (int64_t i = 0; kWithRivals && i < count; ++i) {
        const T one = travel.moves[rows.rivals[0][i]], other = travel.moves[rows.rivals[1][i]];
        rivals_move[i] = one > other ? one : other;
    }
    const T near = travel.near;
    const int32_t standing = travel.few ? kNeedsMoved : kNeedsAll;
    for (int64_t i = 0; i < count; ++i) {  // selections alone, no branch: the compiler is to make vectors of it
        const T before = rows.gaps[i], gap = before * kLess<T> - loss[i];
        const T far_gap = kFar ? before * kLess<T> - (move[i] + near) : 0, lesser_gap = far_gap > 0 ? far_gap : before;
        const T moved_score = kFar ? score_after(i, rows.scores[i], move[i]) : kUnknown;
        const T score = move[i] == 0 ? rows.scores[i] : moved_score;
        const int32_t otherwise = score < kUnknown ? standing : kNeedsAll;
        rows.scores[i] = score;
        rows.gaps[i] = gap > 0 ? gap : lesser_gap;
        if constexpr (kWithRivals) {
            const T leads = rows.leads[i], lead = leads * kLess<T> - (move[i] + rivals_move[i]);
            const T lesser_lead = far_gap > 0 ? lead : leads;
            const int32_t rivals = lead > 0 ? 0 : kNeedsRivals, known_rivals = score < kUnknown ? rivals : kNeedsRivals;
            const int32_t unkept = far_gap > 0 ? kNeedsFar | known_rivals : otherwise;
            rows.leads[i] = gap > 0 ? lead : lesser_lead;
            needs[i] = gap > 0 ? rivals : unkept;
        } else {
            needs[i] = gap > 0 ? 0 : otherwise;
        }
    }
}

/// The rows first + i for which needs[i] holds `need`, ascending; how many. `rows` has room for eight more than it may list.
inline int64_t list_rows(const int32_t* needs, int32_t need, int64_t first, int64_t count, int64_t* rows) {
    int64_t listed = 0, i = 0;
#if defined(__AVX512F__)
    const __m512i steps = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    for (; i + 16 <= count; i += 16) {
        unsigned mask = _mm512_test_epi32_mask(_mm512_loadu_si512(needs + i), _mm512_set1_epi32(need));
        for (int64_t from = first + i; mask != 0; mask >>= 8, from += 8) {
            const auto eight = static_cast<__mmask8>(mask);
            const __m512i ids = _mm512_add_epi64(_mm512_set1_epi64(from), steps);
            _mm512_storeu_si512(rows + listed, _mm512_maskz_compress_epi64(eight, ids));
            listed += __builtin_popcount(eight);
        }
    }
#endif
    for (; i < count; ++i) {
        rows[listed] = first + i;
        listed += (needs[i] & need) != 0;
    }
    return listed;
}

/// Rows of one span.
struct RowList {
    int64_t rows[kSpanRows + 8], count = 0;

    void list(const int32_t* needs, int32_t need, int64_t first, int64_t size) {
        count = list_rows(needs, need, first, size, rows);
    }
};

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

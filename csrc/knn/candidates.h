// The columns that may still be among a row's k best: a small buffer per row and the bound that a new one has to reach.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "common/context.h"
#include "knn/buffer.h"
#include "knn/scan.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

/// How many of the scores reach a bound.
template <class Score>
inline int64_t count_reaching(const Score* scores, int64_t count, Score bound) {
    int64_t reached = 0, c = 0;
    if constexpr (kScanned<Score>) {
        const auto bounds = same_scores(bound);
        for (; c + kScanLanes <= count; c += kScanLanes) reached += std::popcount(reaching(load_scores(scores + c), bounds));
    }
    int32_t rest = 0;
    for (; c < count; ++c) rest += scores[c] >= bound;
    return reached + rest;
}

/// A bound that at least `rank` of the `count` scores reach, and few more. Scores at or below `lowest` do not count;
/// where fewer than `rank` others are there, the answer is `lowest`.
template <class Score>
inline Score bound_of_rank(const Score* scores, int64_t count, int64_t rank, Score lowest) {
    Score least = std::numeric_limits<Score>::max(), most = lowest;
    for (int64_t c = 0; c < count; ++c) most = scores[c] > most ? scores[c] : most;
    int32_t counted = 0;
    for (int64_t c = 0; c < count; ++c) {
        const bool counts = scores[c] > lowest;
        counted += counts;
        const Score score = counts ? scores[c] : most;
        least = score < least ? score : least;
    }
    if (counted < rank) return lowest;
    // `least` is reached by enough of them, always; a bisection of the values raises it.
    const int64_t enough = rank + rank / 16 + 1;
    for (int step = 0; step < 24; ++step) {
        const Score middle = least + (most - least) / 2;
        if (!(middle > least)) break;
        const int64_t reached = count_reaching(scores, count, middle);
        if (reached < rank) {
            most = middle;
        } else {
            least = middle;
            if (reached <= enough) break;
        }
    }
    return least;
}

/// A neighbour by its exact score.
template <class T>
struct Ranked {
    T score;
    int32_t index;

    bool before(const Ranked& other) const { return score > other.score || (score == other.score && index < other.index); }
};

/// Where each of the items stands in their order. Places are counted, which has no branches to mispredict. Beyond `count`
/// scores are -infinity, `padded` of them altogether.
template <class T>
inline void count_places(const T* scores, const int32_t* indices, int64_t count, int64_t padded, int64_t* places) {
    int64_t all = 0;
    for (int64_t j = 0; j < count; ++j) all += places[j] = count_reaching(scores, padded, scores[j]) - 1;
    if (all == count * (count - 1) / 2) return;
    for (int64_t j = 0; j < count; ++j) {  // some are equal, and have been given the last of their places
        int32_t behind = 0;
        for (int64_t i = 0; i < count; ++i) behind += (scores[i] == scores[j]) & (indices[i] > indices[j]);
        places[j] -= behind;
    }
}

/// Sorts best first: runs of kRun, then they are merged.
template <class T>
inline void sort_ranked(Ranked<T>* items, int64_t count, Ranked<T>* spare) {
    constexpr int64_t kRun = 256;
    for (int64_t begin = 0; begin < count; begin += kRun) {
        const int64_t length = count - begin < kRun ? count - begin : kRun,
                      padded = (length + kScanLanes - 1) / kScanLanes * kScanLanes;
        T scores[kRun];
        int32_t indices[kRun];
        int64_t places[kRun];
        for (int64_t i = 0; i < length; ++i) {
            scores[i] = items[begin + i].score;
            indices[i] = items[begin + i].index;
        }
        for (int64_t i = length; i < padded; ++i) scores[i] = -std::numeric_limits<T>::infinity();
        count_places(scores, indices, length, padded, places);
        for (int64_t i = 0; i < length; ++i) spare[begin + places[i]] = {scores[i], indices[i]};
    }
    Ranked<T>*from = spare, *to = items;
    for (int64_t run = kRun; run < count; run *= 2) {
        for (int64_t begin = 0; begin < count; begin += 2 * run) {
            const int64_t middle = begin + run < count ? begin + run : count;
            const int64_t end = begin + 2 * run < count ? begin + 2 * run : count;
            int64_t left = begin, right = middle;
            for (int64_t out = begin; out < end; ++out) {
                const bool take_left = left < middle && (right >= end || from[left].before(from[right]));
                to[out] = take_left ? from[left] : from[right];
                left += take_left;
                right += !take_left;
            }
        }
        Ranked<T>* const swap = from;
        from = to;
        to = swap;
    }
    if (from != items)
        for (int64_t i = 0; i < count; ++i) items[i] = from[i];
}

/// A column that reached a row's floor with this upper score, in the filter's units.
template <class Score>
struct Candidate {
    Score score;
    int32_t column;  // position
};

/// The buffers of all rows of a search.
template <class Score>
struct Candidates {
    int64_t capacity;
    Candidate<Score>* items;  // (rows, capacity)
    int32_t* counts;          // (rows)
    Score* floors;            // (rows) what does not reach its row's floor is no neighbour of it

    /// Room for k and for as many that no bound has ruled out yet.
    static int64_t capacity_for(int64_t k) { return (2 * k + 96 + 7) / 8 * 8; }

    Candidates(int64_t rows, int64_t k, Score lowest, const Context& context)
        : capacity(capacity_for(k)),
          items(context.scratch<Candidate<Score>>(rows * capacity)),
          counts(context.scratch<int32_t>(rows)),
          floors(context.scratch<Score>(rows)) {
        for (int64_t i = 0; i < rows; ++i) {
            counts[i] = 0;
            floors[i] = lowest;
        }
    }

    Candidate<Score>* of(int64_t row) const { return items + row * capacity; }

    /// Where the row's next candidate goes.
    void prefetch(int64_t row) const { __builtin_prefetch(of(row) + counts[row], 1); }

    /// Drops what no longer reaches the floor.
    void sift(int64_t row) {
        Candidate<Score>* const candidates = of(row);
        int32_t kept = 0;
        for (int32_t c = 0; c < counts[row]; ++c) {
            const Candidate<Score> candidate = candidates[c];
            candidates[kept] = candidate;
            kept += candidate.score >= floors[row];
        }
        counts[row] = kept;
    }
};

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

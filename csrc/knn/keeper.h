// What a search keeps of each row: the columns that may be among its k best, the floor that a new one has to reach, and in the
// end their exact scores, which decide.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "knn/buffer.h"
#include "knn/candidates.h"
#include "knn/knn.h"
#include "knn/rows.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

/// Rows and columns go by their positions in the filter. A candidate's score lies no more than its row's and its column's
/// slack above the true one (while floors are guessed: most likely).
template <class T, class Filter>
class Keeper {
   public:
    using Score = typename Filter::Score;

    /// What one thread works in.
    struct Workspace {
        Buffer<Score> lower;
        Buffer<T> exact;
        Buffer<Ranked<T>> ranked, spare;

        Workspace(int64_t capacity, int64_t scores)
            : lower(scores > capacity ? scores : capacity), exact(capacity), ranked(capacity), spare(capacity) {}
    };

    Candidates<Score> found;

    Keeper(const Search<T>& search, int exponent, const Filter& rows, const Filter& columns, const Context& context)
        : found(rows.padded(), search.k, Filter::kLowest, context),
          search_(search),
          exponent_(exponent),
          rows_(rows),
          columns_(columns),
          row_slacks_(guessed_slacks(rows, context)),
          column_slacks_(&rows == &columns ? row_slacks_ : guessed_slacks(columns, context)) {}

    const Score* row_slacks() const { return row_slacks_; }
    const Score* column_slacks() const { return column_slacks_; }
    bool guessing() const { return guessing_; }

    /// From now on floors are certain.
    void stop_guessing() {
        row_slacks_ = rows_.drop;
        column_slacks_ = columns_.drop;
        guessing_ = false;
    }

    void raise_floor(int64_t row, Score bound) {
        if (bound > found.floors[row]) found.floors[row] = bound;
    }

    void append(Workspace& space, int64_t row, int32_t column, Score upper) {
        if (found.counts[row] == found.capacity) {
            tighten(space, row);
            if (upper < found.floors[row]) return;
        }
        found.of(row)[found.counts[row]++] = {upper, column};
    }

    /// Raises the row's floor to what `rank` of its candidates surely (while guessing: most likely) reach, and drops the
    /// others.
    void raise_to_rank(Workspace& space, int64_t row, int64_t rank) {
        const Candidate<Score>* candidates = found.of(row);
        const int32_t count = found.counts[row];
        for (int32_t c = 0; c < count; ++c) space.lower.data[c] = candidates[c].score - column_slacks_[candidates[c].column];
        const Score bound = bound_of_rank(space.lower.data, count, rank, Filter::kLowest);
        if (bound > Filter::kLowest) raise_floor(row, bound - row_slacks_[row]);
        found.sift(row);
    }

    void tighten(Workspace& space, int64_t row) {
        raise_to_rank(space, row, search_.k);
        if (found.counts[row] > (found.capacity + search_.k) / 2) keep_exact_best(space, row);
    }

    /// Writes the row's neighbours; false, and nothing written, where its floor was guessed too high.
    bool finish_row(Workspace& space, int64_t row) {
        tighten(space, row);
        score_exactly(space, row);
        if (found.counts[row] < search_.k) return false;
        rank(space, row);
        const Ranked<T>* best = space.ranked.data;
        if (guessing_ &&
            static_cast<double>(best[search_.k - 1].score) < static_cast<double>(found.floors[row]) * columns_.unit)
            return false;
        const int64_t at = static_cast<int64_t>(rows_.order[row]) * search_.k;
        for (int64_t c = 0; c < search_.k; ++c) {
            search_.values[at + c] = value_of(best[c].score);
            search_.indices[at + c] = best[c].index;
        }
        return true;
    }

   private:
    /// How far each column's scores may lie above the true ones, its share of it. While guessing, errors are taken to be small
    /// beside their bound: a score lies about half of it too high.
    static const Score* guessed_slacks(const Filter& filter, const Context& context) {
        constexpr float kShare = 0.57F;
        auto* slacks = context.scratch<Score>(filter.padded());
        for (int64_t i = 0; i < filter.padded(); ++i)
            slacks[i] = static_cast<Score>(static_cast<float>(filter.drop[i]) * kShare);
        return slacks;
    }

    /// The candidates' exact scores, in space.exact: of the likely first, then of those that the k-th of these leaves
    /// possible. The others are dropped.
    void score_exactly(Workspace& space, int64_t row) {
        Candidate<Score>* candidates = found.of(row);
        const int32_t count = found.counts[row];
        const Score likely = found.floors[row] + row_slacks_[row];
        int32_t scored = 0;
        for (int32_t c = 0; c < count; ++c) {
            const Candidate<Score> candidate = candidates[c];
            candidates[c] = candidates[scored];
            candidates[scored] = candidate;
            scored += candidate.score - column_slacks_[candidate.column] >= likely;
        }
        score_range(space, row, 0, scored);
        const T bound = bound_of_rank(space.exact.data, scored, search_.k, std::numeric_limits<T>::lowest());
        const Score floor = bound > std::numeric_limits<T>::lowest() ? columns_.at_most(bound) : Filter::kLowest;
        int32_t kept = scored;
        for (int32_t c = scored; c < count; ++c)
            if (candidates[c].score >= floor) candidates[kept++] = candidates[c];
        score_range(space, row, scored, kept);
        found.counts[row] = kept;
    }

    void score_range(Workspace& space, int64_t row, int32_t begin, int32_t end) {
        constexpr int32_t kAhead = 4;
        const Candidate<Score>* candidates = found.of(row);
        const T* x = rows_.rows.row(rows_.order[row]);
        const auto other = [&](int32_t c) { return columns_.rows.row(columns_.order[candidates[c].column]); };
        for (int32_t c = begin; c < end && c < begin + kAhead; ++c) prefetch_row(other(c), search_.d);
        for (int32_t c = begin; c < end; ++c) {
            if (c + kAhead < end) prefetch_row(other(c + kAhead), search_.d);
            space.exact.data[c] = score(search_.metric, x, other(c), search_.d);
        }
    }

    /// The exactly scored candidates, best first in space.ranked.
    void rank(Workspace& space, int64_t row) {
        const Candidate<Score>* candidates = found.of(row);
        for (int32_t c = 0; c < found.counts[row]; ++c)
            space.ranked.data[c] = {space.exact.data[c], columns_.order[candidates[c].column]};
        sort_ranked(space.ranked.data, found.counts[row], space.spare.data);
    }

    /// Where the filter's precision cannot tell enough of the candidates apart.
    void keep_exact_best(Workspace& space, int64_t row) {
        score_exactly(space, row);
        if (found.counts[row] <= search_.k) return;
        rank(space, row);
        const Ranked<T> worst = space.ranked.data[search_.k - 1];
        Candidate<Score>* candidates = found.of(row);
        int32_t kept = 0;
        for (int32_t c = 0; c < found.counts[row]; ++c)
            if (!worst.before({space.exact.data[c], columns_.order[candidates[c].column]})) candidates[kept++] = candidates[c];
        found.counts[row] = kept;
        raise_floor(row, columns_.at_most(worst.score));
    }

    T value_of(T score) const {
        if (search_.metric == Metric::euclidean) return std::ldexp(std::sqrt(T(-2) * score), exponent_);
        return search_.metric == Metric::cosine ? score : std::ldexp(score, 2 * exponent_);
    }

    const Search<T>& search_;
    int exponent_;
    const Filter &rows_, &columns_;
    const Score *row_slacks_, *column_slacks_;
    bool guessing_ = true;
};

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

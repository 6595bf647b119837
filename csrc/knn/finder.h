// The search itself, over a filter's scores. Rows of x stand in an order that makes each block of columns a fair sample of all.
//
// 1. A block of columns gives every row its first floor: the score of about the rank that the k-th best will have in a sample
//    that size, with room to spare. It is a guess.
// 2. Tiles: what reaches its row's floor goes to the row's buffer; a full buffer raises the floor (Candidates). Among the rows
//    of x each tile serves both its rows and its columns; blocks meet in the rounds of a tournament, in which nobody plays
//    twice, so that no two threads touch one row.
// 3. The exact scores of what is left decide. A row whose k-th exact score lies below its floor was guessed too high: it is
//    searched again, with floors that are certain.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/parallel.h"
#include "knn/buffer.h"
#include "knn/candidates.h"
#include "knn/filter.h"
#include "knn/knn.h"
#include "knn/rows.h"
#include "knn/scan.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

template <class T, class Filter>
class Finder {
   public:
    using Score = typename Filter::Score;

    /// `rows` and `columns` are one and the same where the rows of x look for each other.
    Finder(const Search<T>& search, int exponent, const Filter& rows, const Filter& columns, const Context& context)
        : search_(search),
          exponent_(exponent),
          rows_(rows),
          columns_(columns),
          self_(search.queries == nullptr),
          block_(block_size(columns.rows.count, Filter::bytes_per_row(search.d))),
          found_(rows.padded(), search.k, Filter::kLowest, context),
          failed_(context.scratch<int32_t>(rows.rows.count)),
          positions_(context.scratch<int32_t>(round_up(rows.rows.count, kStrip))) {
        for (int64_t i = 0; i < rows.rows.count; ++i) positions_[i] = static_cast<int32_t>(i);
    }

    void run() {
        guessing_ = true;
        if (self_)
            play_all_blocks();
        else
            scan_all_columns(search_.m);
        int64_t failures = finish(search_.m);
        if (failures == 0) return;
        guessing_ = false;
        for (int64_t f = 0; f < failures; ++f) {
            found_.counts[positions_[f]] = 0;
            found_.floors[positions_[f]] = Filter::kLowest;
        }
        scan_all_columns(failures);
        finish(failures);
    }

   private:
    static constexpr int64_t kTileColumns = 128;

    /// What one thread works in.
    struct Worker {
        Buffer<typename Filter::Code> strip;
        Buffer<float> staging;
        Buffer<Score> tile, lower;
        Buffer<T> exact;
        Buffer<Ranked<T>> ranked, spare;

        explicit Worker(const Finder& finder)
            : strip(finder.rows_.strip_size()),
              staging(kStrip * finder.search_.d),
              tile(kStrip * (finder.block_ > kTileColumns ? finder.block_ : kTileColumns)),
              lower(finder.block_ > finder.found_.capacity ? finder.block_ : finder.found_.capacity),
              exact(finder.found_.capacity),
              ranked(finder.found_.capacity),
              spare(finder.found_.capacity) {}
    };

    /// Columns of a block: they fit half a second-level cache, and there are enough blocks to share out.
    static int64_t block_size(int64_t count, int64_t bytes_per_row) {
        constexpr int64_t kBlockBytes = 512 * 1024, kMost = 1024, kLeast = 128;
        int64_t block = kBlockBytes / bytes_per_row < kMost ? kBlockBytes / bytes_per_row : kMost;
        block = block < count / 16 ? block : count / 16;
        return round_up(block > kLeast ? block : kLeast, kTileColumns);
    }

    int64_t blocks() const { return (columns_.padded() + block_ - 1) / block_; }
    int64_t block_begin(int64_t block) const { return block * block_; }
    int64_t block_end(int64_t block) const {
        return (block + 1) * block_ < columns_.padded() ? (block + 1) * block_ : columns_.padded();
    }

    /// How far a score may lie above the true one. While guessing, errors are taken to be far from their bound.
    Score slack(const Filter& filter, int64_t position) const {
        constexpr float kShare = 0.625f;
        return guessing_ ? static_cast<Score>(static_cast<float>(filter.drop[position]) * kShare) : filter.drop[position];
    }

    /// The rank in a sample of `size` columns of the floor to begin with.
    int64_t sample_rank(int64_t size) const {
        if (!guessing_) return search_.k;
        const double mean = static_cast<double>(search_.k) * static_cast<double>(size) / static_cast<double>(search_.n);
        const auto rank = static_cast<int64_t>(mean + 3 * std::sqrt(mean) + 2);
        return rank < search_.k ? rank : search_.k;
    }

    // ---------------------------------------------------------------------------------------------------- orders of work

    void play_all_blocks() {
        const int64_t count = blocks();
        parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
            Worker worker(*this);
            for (int64_t b = begin; b < end; ++b) {
                const int64_t last = block_end(b) < rows_.rows.count ? block_end(b) : rows_.rows.count;
                for (int64_t row = block_begin(b); row < last; row += kStrip)
                    scan_rows(worker, positions_ + row, last - row < kStrip ? last - row : kStrip, block_begin(b), block_end(b),
                              true);
            }
        });
        const int64_t players = count + count % 2;  // with an odd number, whoever meets the last one rests
        for (int64_t round = 0; round + 1 < players; ++round)
            parallel_for(0, players / 2, 1, [&](int64_t begin, int64_t end) {
                Worker worker(*this);
                for (int64_t pair = begin; pair < end; ++pair) {
                    const int64_t a = pair == 0 ? players - 1 : (round + pair) % (players - 1);
                    const int64_t b = (round + players - 1 - pair) % (players - 1);
                    if (a < count && b < count) meet(worker, a, b);
                }
            });
    }

    /// The rows of positions_[0, count) against all columns.
    void scan_all_columns(int64_t count) {
        const int64_t strips = (count + kStrip - 1) / kStrip, panel = strips / 64 > 1 ? 8 : 1;
        parallel_for(0, (strips + panel - 1) / panel, 1, [&](int64_t begin, int64_t end) {
            Worker worker(*this);
            const int64_t first = begin * panel * kStrip, last = end * panel * kStrip < count ? end * panel * kStrip : count;
            for (int64_t group = first; group < last; group += panel * kStrip)
                for (int64_t b = 0; b < blocks(); ++b)
                    for (int64_t row = group; row < last && row < group + panel * kStrip; row += kStrip)
                        scan_rows(worker, positions_ + row, last - row < kStrip ? last - row : kStrip, block_begin(b),
                                  block_end(b), b == 0);
        });
    }

    // ------------------------------------------------------------------------------------------------------------- tiles

    /// Some rows against the columns [first, last), for the rows alone.
    void scan_rows(Worker& worker, const int32_t* positions, int64_t count, int64_t first, int64_t last, bool seed) {
        const int64_t columns = last - first;
        rows_.load(positions, count, worker.strip.data, worker.staging.data);
        columns_.multiply(worker.strip.data, count, first, columns, worker.tile.data);
        for (int64_t r = 0; r < count; ++r) {
            const int32_t row = positions[r];
            Score* dots = worker.tile.data + r * columns;
            if (self_ && row >= first && row < last) dots[row - first] = Filter::kNever;
            if (seed) seed_floor(worker, row, dots, first, columns);
            scan_row<false>(worker, row, dots, first, columns);
        }
    }

    /// Two blocks, each for the other.
    void meet(Worker& worker, int64_t a, int64_t b) {
        const int64_t rows_end = block_end(a) < rows_.rows.count ? block_end(a) : rows_.rows.count;
        for (int64_t row = block_begin(a); row < rows_end; row += kStrip) {
            const int64_t count = rows_end - row < kStrip ? rows_end - row : kStrip;
            rows_.load(positions_ + row, count, worker.strip.data, worker.staging.data);
            for (int64_t first = block_begin(b); first < block_end(b); first += kTileColumns) {
                const int64_t columns = block_end(b) - first < kTileColumns ? block_end(b) - first : kTileColumns;
                columns_.multiply(worker.strip.data, count, first, columns, worker.tile.data);
                for (int64_t r = 0; r < count; ++r)
                    scan_row<true>(worker, row + r, worker.tile.data + r * columns, first, columns);
            }
        }
    }

    void seed_floor(Worker& worker, int64_t row, const Score* dots, int64_t first, int64_t columns) {
        Score* lower = worker.lower.data;
        for (int64_t c = 0; c < columns; ++c)
            lower[c] = dots[c] + columns_.bias[first + c] + rows_.bias[row] - slack(columns_, first + c);
        const Score bound = bound_of_rank(lower, columns, sample_rank(columns), Filter::kLowest);
        if (bound > Filter::kLowest) raise_floor(row, bound - slack(rows_, row));
    }

    void raise_floor(int64_t row, Score bound) {
        if (bound > found_.floors[row]) found_.floors[row] = bound;
    }

    template <bool kBoth>
    void scan_row(Worker& worker, int64_t row, const Score* dots, int64_t first, int64_t columns) {
        const Score row_bias = rows_.bias[row];
        for (int64_t c = 0; c < columns; c += kGroup, dots += kGroup) {
            const Score* bias = columns_.bias + first + c;
            Hits hits = scan_group<kBoth>(dots, bias, found_.floors + first + c, row_bias, found_.floors[row]);
            if ((hits.row | hits.column) == 0) continue;
            for (; hits.row != 0; hits.row &= hits.row - 1) {
                const int lane = std::countr_zero(hits.row);
                append(worker, row, static_cast<int32_t>(first + c + lane), dots[lane] + bias[lane] + row_bias);
            }
            if constexpr (kBoth)
                for (; hits.column != 0; hits.column &= hits.column - 1) {
                    const int lane = std::countr_zero(hits.column);
                    append(worker, first + c + lane, static_cast<int32_t>(row), dots[lane] + bias[lane] + row_bias);
                }
        }
    }

    // -------------------------------------------------------------------------------------------------------- candidates

    void append(Worker& worker, int64_t row, int32_t column, Score upper) {
        if (found_.counts[row] == found_.capacity) {
            tighten(worker, row);
            if (upper < found_.floors[row]) return;
        }
        const int64_t place = row * found_.capacity + found_.counts[row]++;
        found_.scores[place] = upper;
        found_.columns[place] = column;
    }

    /// Raises the row's floor to what k of its candidates surely (while guessing: most likely) reach, and drops the others.
    void tighten(Worker& worker, int64_t row) {
        const Score* scores = found_.scores + row * found_.capacity;
        const int32_t* columns = found_.columns + row * found_.capacity;
        for (int32_t c = 0; c < found_.counts[row]; ++c) worker.lower.data[c] = scores[c] - slack(columns_, columns[c]);
        const Score bound = bound_of_rank(worker.lower.data, found_.counts[row], search_.k, Filter::kLowest);
        if (bound > Filter::kLowest) raise_floor(row, bound - slack(rows_, row));
        found_.sift(row);
        if (found_.counts[row] > (found_.capacity + search_.k) / 2) keep_exact_best(worker, row);
    }

    /// The candidates' exact scores, best first in worker.ranked and by candidate in worker.exact.
    void rank_exactly(Worker& worker, int64_t row) {
        const int32_t* columns = found_.columns + row * found_.capacity;
        const T* x = rows_.rows.row(rows_.order[row]);
        for (int32_t c = 0; c < found_.counts[row]; ++c) {
            const int32_t index = columns_.order[columns[c]];
            worker.exact.data[c] = score(search_.metric, x, columns_.rows.row(index), search_.d);
            worker.ranked.data[c] = {worker.exact.data[c], index};
        }
        sort_ranked(worker.ranked.data, found_.counts[row], worker.spare.data);
    }

    /// Where the filter's precision cannot tell enough of the candidates apart.
    void keep_exact_best(Worker& worker, int64_t row) {
        rank_exactly(worker, row);
        const Ranked<T> worst = worker.ranked.data[search_.k - 1];
        Score* scores = found_.scores + row * found_.capacity;
        int32_t* columns = found_.columns + row * found_.capacity;
        int32_t kept = 0;
        for (int32_t c = 0; c < found_.counts[row]; ++c) {
            if (worst.before({worker.exact.data[c], columns_.order[columns[c]]})) continue;
            scores[kept] = scores[c];
            columns[kept++] = columns[c];
        }
        found_.counts[row] = kept;
        raise_floor(row, columns_.at_most(worst.score));
    }

    /// Writes the results of positions_[0, count); those that are not certain come to stand first in positions_.
    int64_t finish(int64_t count) {
        parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
            Worker worker(*this);
            for (int64_t i = begin; i < end; ++i) failed_[i] = !finish_row(worker, positions_[i]);
        });
        int64_t failures = 0;
        for (int64_t i = 0; i < count; ++i)
            if (failed_[i]) positions_[failures++] = positions_[i];
        return failures;
    }

    bool finish_row(Worker& worker, int64_t row) {
        tighten(worker, row);
        if (found_.counts[row] < search_.k) return false;
        rank_exactly(worker, row);
        const Ranked<T>* best = worker.ranked.data;
        if (guessing_ &&
            static_cast<double>(best[search_.k - 1].score) < static_cast<double>(found_.floors[row]) * columns_.unit)
            return false;
        const int64_t at = static_cast<int64_t>(rows_.order[row]) * search_.k;
        for (int64_t c = 0; c < search_.k; ++c) {
            search_.values[at + c] = value_of(best[c].score);
            search_.indices[at + c] = best[c].index;
        }
        return true;
    }

    T value_of(T score) const {
        if (search_.metric == Metric::euclidean) return std::ldexp(std::sqrt(T(-2) * score), exponent_);
        return search_.metric == Metric::cosine ? score : std::ldexp(score, 2 * exponent_);
    }

    const Search<T>& search_;
    int exponent_;
    const Filter &rows_, &columns_;
    bool self_;
    int64_t block_;
    Candidates<Score> found_;
    int32_t* failed_;
    int32_t* positions_;
    bool guessing_ = true;
};

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

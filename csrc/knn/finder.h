// The search itself, over a filter's scores. Rows of x stand in an order that makes each block of columns a fair sample of all.
//
// 1. A block of columns gives every row its first floor: the score of about the rank that the k-th best will have in a sample
//    that size, with room to spare. It is a guess; more columns make it a better one, twice on the way.
// 2. Tiles: what reaches its row's floor goes to the row's buffer; a full buffer raises the floor (Candidates). Among the rows
//    of x each tile serves both its rows and its columns; blocks meet in the rounds of a tournament, in which nobody plays
//    twice, so that no two threads touch one row.
// 3. The exact scores of what is left decide. A row whose k-th exact score lies below its floor was guessed too high: it is
//    searched again, with floors that are certain.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/parallel.h"
#include "knn/buffer.h"
#include "knn/candidates.h"
#include "knn/filter.h"
#include "knn/keeper.h"
#include "knn/knn.h"
#include "knn/rows.h"
#include "knn/scan.h"
#include "knn/tournament.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

template <class T, class Filter>
class Finder {
   public:
    using Score = typename Filter::Score;

    /// `rows` and `columns` are one and the same where the rows of x look for each other.
    Finder(const Search<T>& search, int exponent, const Filter& rows, const Filter& columns, const Context& context)
        : search_(search),
          rows_(rows),
          columns_(columns),
          self_(search.queries == nullptr),
          block_(block_size(columns.rows.count, Filter::bytes_per_row(search.d))),
          keeper_(search, exponent, rows, columns, context),
          found_(keeper_.found),
          failed_(context.scratch<int32_t>(rows.rows.count)),
          positions_(context.scratch<int32_t>(round_up(rows.rows.count, kStrip))) {
        for (int64_t i = 0; i < rows.rows.count; ++i) positions_[i] = static_cast<int32_t>(i);
    }

    /// False, and nothing written, where `affordable` candidates per row would not do: the filter is too coarse for the data.
    bool run(double affordable) {
        if (self_ ? !play_all_blocks(affordable) : !scan_all_columns(search_.m, affordable)) return false;
        sort_by_pivot();
        int64_t failures = finish(search_.m);
        if (failures == 0) return true;
        keeper_.stop_guessing();
        for (int64_t f = 0; f < failures; ++f) {
            found_.counts[positions_[f]] = 0;
            found_.floors[positions_[f]] = Filter::kLowest;
        }
        scan_all_columns(failures, std::numeric_limits<double>::infinity());
        finish(failures);
        return true;
    }

   private:
    static constexpr int64_t kTileColumns = 128;

    /// What one thread works in.
    struct Worker {
        typename Filter::Multiplier multiplier;
        Buffer<typename Filter::Code> strip;
        Buffer<float> staging;
        Buffer<Score> tile;
        typename Keeper<T, Filter>::Workspace kept;

        explicit Worker(const Finder& finder)
            : multiplier(finder.rows_.words),
              strip(finder.rows_.strip_size()),
              staging(kStrip * finder.search_.d),
              tile(kStrip * (finder.block_ > 4 * kGroup ? finder.block_ : 4 * kGroup)),
              kept(finder.found_.capacity, finder.block_) {}
    };

    /// Columns of a block: they fit half a second-level cache, and there are enough blocks to share out.
    static int64_t block_size(int64_t count, int64_t bytes_per_row) {
        constexpr int64_t kBlockBytes = 512 * 1024, kMost = 2048, kLeast = 128;
        int64_t block = kBlockBytes / bytes_per_row < kMost ? kBlockBytes / bytes_per_row : kMost;
        block = block < count / 16 ? block : count / 16;
        return round_up(block > kLeast ? block : kLeast, kTileColumns);
    }

    int64_t blocks() const { return (columns_.padded() + block_ - 1) / block_; }
    int64_t block_begin(int64_t block) const { return block * block_; }
    int64_t block_end(int64_t block) const {
        return (block + 1) * block_ < columns_.padded() ? (block + 1) * block_ : columns_.padded();
    }

    /// The rank among `size` columns of the floor that they suggest: three deviations below where the k-th best of all should
    /// be.
    int64_t sample_rank(int64_t size) const {
        if (!keeper_.guessing()) return search_.k;
        const double share = static_cast<double>(size) / static_cast<double>(search_.n),
                     mean = static_cast<double>(search_.k) * share;
        const auto rank = static_cast<int64_t>(mean + 3 * std::sqrt(mean * (1 - (share < 1 ? share : 1))) + 2);
        return rank < search_.k ? rank : search_.k;
    }

    /// Whether floors are worth another guess once a row has met this many blocks: each costs a pass over the candidates.
    bool guess_again(int64_t blocks_met) const {
        return blocks_met > 1 && (blocks_met == blocks() / 8 || blocks_met == blocks() * 3 / 8);
    }

    void refine_floor(Worker& worker, int64_t row, int64_t blocks_met) {
        keeper_.raise_to_rank(worker.kept, row, sample_rank(blocks_met * block_));
    }

    // ---------------------------------------------------------------------------------------------------- orders of work

    bool play_all_blocks(double affordable) {
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
        if (expected_candidates(search_.m) > affordable) return false;
        play_tournament(
            count, [&] { return Worker(*this); }, [&](Worker& worker, int64_t a, int64_t b) { meet(worker, a, b); },
            [&](int64_t round) {
                if (guess_again(round + 2)) refine_all_floors(round + 2);
            });
        return true;
    }

    void refine_all_floors(int64_t blocks_met) {
        parallel_for(0, rows_.rows.count, 256, [&](int64_t begin, int64_t end) {
            Worker worker(*this);
            for (int64_t row = begin; row < end; ++row) refine_floor(worker, row, blocks_met);
        });
    }

    /// Per row, if all blocks of columns bring as many as the one that gave the first floors.
    double expected_candidates(int64_t count) const {
        double found = 0;
        for (int64_t i = 0; i < count; ++i) found += found_.counts[positions_[i]];
        return found / static_cast<double>(count) * static_cast<double>(blocks());
    }

    /// The rows of positions_[0, count) against all columns.
    bool scan_all_columns(int64_t count, double affordable) {
        scan_blocks(count, 0, 1);
        if (expected_candidates(count) > affordable) return false;
        scan_blocks(count, 1, blocks());
        return true;
    }

    void scan_blocks(int64_t count, int64_t first_block, int64_t last_block) {
        constexpr int64_t kStripsTogether = 8;  // a block of columns stays in cache for them
        const int64_t strips = (count + kStrip - 1) / kStrip, together = strips / 64 > 1 ? kStripsTogether : 1;
        parallel_for(0, (strips + together - 1) / together, 1, [&](int64_t begin, int64_t end) {
            Worker worker(*this);
            const int64_t rows = together * kStrip, last = end * rows < count ? end * rows : count;
            for (int64_t group = begin * rows; group < last; group += rows)
                for (int64_t b = first_block; b < last_block; ++b) {
                    for (int64_t row = group; row < last && row < group + rows; row += kStrip)
                        scan_rows(worker, positions_ + row, last - row < kStrip ? last - row : kStrip, block_begin(b),
                                  block_end(b), b == 0);
                    if (!guess_again(b + 1)) continue;
                    for (int64_t row = group; row < last && row < group + rows; ++row)
                        refine_floor(worker, positions_[row], b + 1);
                }
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
            for (int64_t r = row; r < row + count; ++r) found_.prefetch(r);
            for (int64_t first = block_begin(b); first < block_end(b); first += kTileColumns) {
                const int64_t columns = block_end(b) - first < kTileColumns ? block_end(b) - first : kTileColumns;
                if (row == block_begin(a))
                    for (int64_t c = first; c < first + columns; ++c) found_.prefetch(c);
                columns_.multiply(worker.strip.data, count, first, columns, worker.tile.data);
                for (int64_t r = 0; r < count; ++r)
                    scan_row<true>(worker, row + r, worker.tile.data + r * columns, first, columns);
            }
        }
    }

    /// Of the sample's scores only the best of every 16 are ranked: few of its own best fall together, and the bound holds
    /// anyway.
    void seed_floor(Worker& worker, int64_t row, const Score* dots, int64_t first, int64_t columns) {
        const int64_t rank = sample_rank(columns), classes = rank * 8 < columns ? round_up(columns / 16, kGroup) : columns;
        const Score bias = rows_.bias[row];
        const Score* slacks = keeper_.column_slacks();
        Score* best = worker.kept.lower.data;
        for (int64_t c = 0; c < classes; ++c) best[c] = Filter::kLowest;
        for (int64_t begin = 0; begin < columns; begin += classes) {
            const int64_t end = begin + classes < columns ? begin + classes : columns;
            for (int64_t c = begin; c < end; ++c) {
                const Score lower = dots[c] + bias - slacks[first + c];
                best[c - begin] = best[c - begin] > lower ? best[c - begin] : lower;
            }
        }
        const Score bound = bound_of_rank(best, classes, rank, Filter::kLowest);
        if (bound > Filter::kLowest) keeper_.raise_floor(row, bound - keeper_.row_slacks()[row]);
    }

    template <bool kBoth>
    void scan_row(Worker& worker, int64_t row, const Score* dots, int64_t first, int64_t columns) {
        const Score bias = rows_.bias[row];
        for (int64_t c = 0; c < columns; c += kGroup) {
            const uint64_t hits = scan_group<kBoth>(dots + c, found_.floors + first + c, bias, found_.floors[row]);
            if (hits != 0) keep_hits<kBoth>(worker, row, dots + c, first + c, hits);
        }
    }

    /// Apart from the scan, which keeps its registers for itself.
    template <bool kBoth>
    [[gnu::noinline]] void keep_hits(Worker& worker, int64_t row, const Score* dots, int64_t first, uint64_t hits) {
        const Score bias = rows_.bias[row];
        for (; hits != 0; hits &= hits - 1) {
            const int lane = std::countr_zero(hits);
            const int64_t column = first + lane;
            const Score upper = dots[lane] + bias;
            if (upper >= found_.floors[row]) keeper_.append(worker.kept, row, static_cast<int32_t>(column), upper);
            if constexpr (kBoth)
                if (upper >= found_.floors[column]) keeper_.append(worker.kept, column, static_cast<int32_t>(row), upper);
        }
    }

    /// Rows close to the same one of some columns follow each other: they share most of their candidates, which then stay in
    /// cache while they are scored.
    void sort_by_pivot() {
        constexpr int64_t kPivots = 4 * kGroup, kCachedBytes = 1 << 20;
        const int64_t count = search_.m;
        if (columns_.rows.count < kPivots || columns_.rows.count * search_.d * static_cast<int64_t>(sizeof(T)) < kCachedBytes)
            return;
        const Buffer<int32_t> pivots(count), sorted(count);
        parallel_for(0, (count + kStrip - 1) / kStrip, 16, [&](int64_t begin, int64_t end) {
            Worker worker(*this);
            for (int64_t row = begin * kStrip; row < end * kStrip && row < count; row += kStrip) {
                const int64_t rows = count - row < kStrip ? count - row : kStrip;
                rows_.load(positions_ + row, rows, worker.strip.data, worker.staging.data);
                columns_.multiply(worker.strip.data, rows, 0, kPivots, worker.tile.data);
                for (int64_t r = 0; r < rows; ++r) pivots.data[row + r] = greatest(worker.tile.data + r * kPivots, kPivots);
            }
        });
        int32_t starts[kPivots + 1] = {};
        for (int64_t i = 0; i < count; ++i) ++starts[pivots.data[i] + 1];
        for (int64_t p = 0; p < kPivots; ++p) starts[p + 1] += starts[p];
        for (int64_t i = 0; i < count; ++i) sorted.data[starts[pivots.data[i]]++] = positions_[i];
        for (int64_t i = 0; i < count; ++i) positions_[i] = sorted.data[i];
    }

    static int32_t greatest(const Score* scores, int64_t count) {
        Score most = scores[0];
        for (int64_t c = 1; c < count; ++c) most = scores[c] > most ? scores[c] : most;
        int32_t at = 0;
        while (scores[at] != most) ++at;
        return at;
    }

    /// Writes the results of positions_[0, count); those that are not certain come to stand first in positions_.
    int64_t finish(int64_t count) {
        parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
            Worker worker(*this);
            for (int64_t i = begin; i < end; ++i) failed_[i] = !keeper_.finish_row(worker.kept, positions_[i]);
        });
        int64_t failures = 0;
        for (int64_t i = 0; i < count; ++i)
            if (failed_[i]) positions_[failures++] = positions_[i];
        return failures;
    }

    const Search<T>& search_;
    const Filter &rows_, &columns_;
    bool self_;
    int64_t block_;
    Keeper<T, Filter> keeper_;
    Candidates<Score>& found_;
    int32_t* failed_;
    int32_t* positions_;
};

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

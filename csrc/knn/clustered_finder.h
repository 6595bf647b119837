// The search among rows in clusters. A row's own block, rows of its cluster, gives it a first floor, seldom far from the last
// one; then groups of blocks meet in the rounds of a tournament, in which nobody plays twice, so that no two
// threads touch one row. Few pairs of different clusters reach a floor, and most of their tiles are given up before all
// features are multiplied. The exact scores of what is left decide.
#pragma once

#include "knn/residual_filter.h"

#if defined(__AVX512VNNI__)

#include <bit>
#include <cstdint>
#include <limits>

#include "common/parallel.h"
#include "knn/buffer.h"
#include "knn/clusters.h"
#include "knn/keeper.h"
#include "knn/knn.h"
#include "knn/scan.h"
#include "knn/staged_tile.h"
#include "knn/tournament.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

template <class T>
class ClusteredFinder {
   public:
    using Filter = ResidualFilter<T>;

    ClusteredFinder(const Search<T>& search, int exponent, Filter& filter, const Context& context)
        : filter_(filter),
          keeper_(search, exponent, filter, filter, context),
          found_(keeper_.found),
          failed_(context.scratch<int32_t>(filter.padded())),
          k_(search.k) {
        for (int64_t i = 0; i < filter.padded(); ++i)
            if (filter.order[i] < 0) found_.floors[i] = kNoFloor;
        const Clusters<T>& clusters = filter.clusters;
        int64_t most = 0;
        for (int64_t c = 0; c < clusters.count; ++c) most += clusters.sizes[c] / kBlock + 1;
        blocks_ = context.scratch<Block>(most);
        for (int64_t c = 0; c < clusters.count; ++c) {
            const int64_t last = clusters.starts[c] + clusters.sizes[c];
            for (int64_t begin = clusters.starts[c]; begin < last; begin += kBlock)
                blocks_[count_++] = {c, begin, begin + kBlock < last ? begin + kBlock : last};
        }
        group_blocks(context);
    }

    /// False, and nothing written, where more than `affordable` candidates per row are to be expected.
    bool run(double affordable) {
        parallel_for(0, count_, 1, [&](int64_t begin, int64_t end) {
            Worker worker(*this);
            for (int64_t b = begin; b < end; ++b) search_within(worker, blocks_[b]);
        });
        const Survey survey = take_survey();
        if (survey.candidates > affordable) return false;
        filter_.cut_after(survey.cuts(filter_.words));
        meet_all();
        const int64_t failures = finish();
        if (failures > 0) search_again(failures);
        return true;
    }

   private:
    static constexpr int64_t kBlock = 1008;  // rows: whole panels, and whole tiles of 6 or 16 rows
    static_assert(kBlock % quantised::kWidth == 0 && kBlock % kStagedRows == 0);
    static constexpr int32_t kNoFloor = std::numeric_limits<int32_t>::max();  // where no row stands
    static constexpr int64_t kPanel = quantised::kWidth;

    /// Rows of one cluster at positions [begin, end).
    struct Block {
        int64_t cluster, begin, end;
    };

    /// Blocks that follow each other are a group: the codes of two fit the second-level cache, and there are enough groups to
    /// share out.
    void group_blocks(const Context& context) {
        constexpr int64_t kBytes = 768 * 1024;
        const int64_t fitting = kBytes / (2 * 4 * filter_.words), share = filter_.rows.count / (8 * num_threads());
        const int64_t most = fitting < share ? fitting : share;
        groups_ = context.scratch<int64_t>(count_ + 1);
        int64_t rows = 0;
        for (int64_t b = 0; b < count_; ++b) {
            const int64_t more = blocks_[b].end - blocks_[b].begin;
            if (b == 0 || rows + more > most) groups_[group_count_++] = b, rows = 0;
            rows += more;
        }
        groups_[group_count_] = count_;
    }

    /// What one thread works in.
    struct Worker {
        typename Filter::Multiplier multiplier;
        typename Keeper<T, Filter>::Workspace kept;
        Buffer<int32_t> row_starts, column_starts, sums;

        explicit Worker(const ClusteredFinder& finder)
            : multiplier(finder.filter_.words),
              kept(finder.found_.capacity, kBlock),
              row_starts(kBlock + kStagedRows),
              column_starts(kBlock),
              sums(kStagedRows * (kBlock + kStagedColumns)) {}
    };

    /// How many of the tiles looked at were given up after each eighth of the features, and how many candidates to expect.
    struct Survey {
        int64_t ended[Stages::kMost + 1] = {};
        double candidates = 0;

        /// The cuts with the least expected work; looking at a tile costs about as much as eight of its words' products.
        unsigned cuts(int64_t words) const {
            const double look = 8.0 / static_cast<double>(words);
            if (quantised::kTiles) return 0;
            double tiles = 0;
            for (const int64_t count : ended) tiles += static_cast<double>(count);
            unsigned best = 0;
            double least = std::numeric_limits<double>::infinity();
            for (unsigned eighths = 0; eighths < 1U << (Stages::kMost - 1); ++eighths) {
                double work = 0, left = tiles, share = 0;
                int64_t given_up = 0;
                for (int s = 0; s < Stages::kMost; ++s) {
                    share += 1.0 / Stages::kMost;
                    given_up += ended[s];
                    if (s + 1 < Stages::kMost && (eighths >> s & 1) == 0) continue;
                    work += left * (share + look);
                    left = tiles - static_cast<double>(given_up);
                    share = 0;
                }
                if (work < least) least = work, best = eighths;
            }
            return best;
        }
    };

    /// Tiles spread over all pairs of blocks.
    Survey take_survey() {
        constexpr int64_t kTiles = 48;  // of rows, and of columns
        constexpr unsigned kEverywhere = (1U << (Stages::kMost - 1)) - 1;
        Survey survey;
        if (!quantised::kTiles) filter_.cut_after(kEverywhere);
        Worker worker(*this);
        int64_t pairs = 0, reached = 0;
        for (int64_t i = 0; i < kTiles * kTiles; ++i) {
            const Block rows = sample(i / kTiles, kTiles, kStagedRows), columns = sample(i % kTiles, kTiles, kStagedColumns);
            if (rows.cluster == columns.cluster && rows.begin / kBlock == columns.begin / kBlock) continue;
            pairs += (rows.end - rows.begin) * (columns.end - columns.begin);
            sweep(worker, rows, columns, [&](int64_t row, int64_t count, int64_t, int64_t width, int stage) {
                ++survey.ended[stage];
                for (int64_t r = 0; stage == filter_.stages.count && r < count; ++r)
                    for (int64_t c = 0; c < width; ++c)
                        reached += worker.sums.data[r * kStagedColumns + c] >= found_.floors[row + r];
            });
        }
        if (pairs > 0)
            survey.candidates =
                static_cast<double>(reached) / static_cast<double>(pairs) * static_cast<double>(filter_.rows.count);
        return survey;
    }

    /// The i-th of some tiles spread over all positions.
    Block sample(int64_t i, int64_t count, int64_t length) const {
        const int64_t position = (2 * i + 1) * filter_.padded() / (2 * count);
        const int64_t cluster = filter_.clusters.of_panel[position / kPanel];
        const int64_t start = filter_.clusters.starts[cluster], end = start + filter_.clusters.sizes[cluster];
        const int64_t whole =
            length < kStagedColumns ? kStagedRows * kPanel : kPanel;  // a tile's rows, and a panel, begin there
        const int64_t begin = start + (position - start) / whole * whole;
        return {cluster, begin, begin + length < end ? begin + length : end};
    }

    /// Writes the results; the positions of rows whose floor was guessed too high come to stand first in failed_.
    int64_t finish() {
        parallel_for(0, filter_.padded(), 64, [&](int64_t begin, int64_t end) {
            Worker worker(*this);
            for (int64_t i = begin; i < end; ++i)
                failed_[i] = filter_.order[i] >= 0 && !keeper_.finish_row(worker.kept, i) ? 1 : 0;
        });
        int64_t failures = 0;
        for (int64_t i = 0; i < filter_.padded(); ++i)
            if (failed_[i] != 0) failed_[failures++] = static_cast<int32_t>(i);
        return failures;
    }

    /// Those rows once more, against all blocks, with floors that are certain.
    void search_again(int64_t failures) {
        keeper_.stop_guessing();
        for (int64_t f = 0; f < failures; ++f) {
            found_.counts[failed_[f]] = 0;
            found_.floors[failed_[f]] = Filter::kLowest;
        }
        parallel_for(0, failures, 1, [&](int64_t begin, int64_t end) {
            Worker worker(*this);
            for (int64_t f = begin; f < end; ++f) {
                for (int64_t b = 0; b < count_; ++b) search_for(worker, failed_[f], blocks_[b]);
                keeper_.finish_row(worker.kept, failed_[f]);
            }
        });
    }

    /// One row's neighbours in a block.
    void search_for(Worker& worker, int64_t position, const Block& block) {
        const int64_t cluster = filter_.clusters.of_panel[position / kPanel], start = filter_.clusters.starts[cluster];
        const int64_t tile = start + (position - start) / kStagedRows * kStagedRows;
        sweep(worker, {cluster, tile, position + 1}, block, [&](int64_t, int64_t, int64_t column, int64_t width, int stage) {
            if (stage < filter_.stages.count) return;
            int32_t* sums = worker.sums.data + (position - tile) * kStagedColumns;
            if (position >= column && position < column + width) sums[position - column] = Filter::kNever;
            keep<false>(worker, position, 1, column, width, sums);
        });
    }

    void meet_all() {
        parallel_for(0, group_count_, 1, [&](int64_t begin, int64_t end) {
            Worker worker(*this);
            for (int64_t g = begin; g < end; ++g)
                for (int64_t a = groups_[g]; a < groups_[g + 1]; ++a)
                    for (int64_t b = a + 1; b < groups_[g + 1]; ++b) meet(worker, blocks_[a], blocks_[b]);
        });
        play_tournament(
            group_count_, [&] { return Worker(*this); },
            [&](Worker& worker, int64_t a, int64_t b) { meet_groups(worker, a, b); }, [](int64_t) {});
    }

    void meet_groups(Worker& worker, int64_t a, int64_t b) {
        for (int64_t i = groups_[a]; i < groups_[a + 1]; ++i)
            for (int64_t j = groups_[b]; j < groups_[b + 1]; ++j) meet(worker, blocks_[i], blocks_[j]);
    }

    /// Two blocks, each for the other.
    void meet(Worker& worker, const Block& a, const Block& b) {
        sweep(worker, a, b, [&](int64_t row, int64_t count, int64_t column, int64_t width, int stage) {
            if (stage == filter_.stages.count) keep<true>(worker, row, count, column, width, worker.sums.data);
        });
    }

    /// A block for itself: each pair is met twice, once for each side. A row's floor is what k of the others most likely reach.
    void search_within(Worker& worker, const Block& block) {
        const int64_t columns = block.end - block.begin;
        begin_sweep(worker, block, block);
        for (int64_t row = block.begin; row < block.end; row += kStagedRows) {
            const int64_t count = block.end - row < kStagedRows ? block.end - row : kStagedRows;
            for (int64_t first = 0; first < columns; first += kStagedColumns) {
                int32_t* sums = worker.sums.data + first * kStagedRows;
                sweep_panels(worker, block, row, block, block.begin + first, panels_of(columns - first), Filter::kLowest,
                             kNone.floors, sums);
                for (int64_t r = 0; r < count; ++r) {
                    const int64_t self = row + r - block.begin - first;
                    if (self >= 0 && self < kStagedColumns) sums[r * kStagedColumns + self] = Filter::kNever;
                }
            }
            for (int64_t r = 0; r < count; ++r) seed_floor(worker, row + r, worker.sums.data + r * kStagedColumns, block);
            for (int64_t first = 0; first < columns; first += kStagedColumns)
                keep<false>(worker, row, count, block.begin + first,
                            columns - first < kStagedColumns ? columns - first : kStagedColumns,
                            worker.sums.data + first * kStagedRows);
        }
    }

    /// `sums` holds kStagedColumns of the row's at a time, of a tile's rows in turn.
    void seed_floor(Worker& worker, int64_t row, const int32_t* sums, const Block& block) {
        const int64_t columns = block.end - block.begin;
        const int32_t* slacks = keeper_.column_slacks() + block.begin;
        int32_t* lower = worker.kept.lower.data;
        for (int64_t first = 0; first < columns; first += kStagedColumns, sums += kStagedRows * kStagedColumns)
            for (int64_t c = 0; c < kStagedColumns && first + c < columns; ++c) lower[first + c] = sums[c] - slacks[first + c];
        const int32_t bound = bound_of_rank(lower, columns, k_, Filter::kLowest);
        if (bound > Filter::kLowest) keeper_.raise_floor(row, bound - keeper_.row_slacks()[row]);
    }

    /// Multiplies the tiles of a block's rows and another's columns: tile(row, count, column, width, stage) tells after which
    /// stage a tile was given up; after the last, its sums are in the worker.
    template <class Tile>
    void sweep(Worker& worker, const Block& a, const Block& b, const Tile& tile) {
        const int32_t column_floor = least_floor(b.begin, b.end), column_bound = begin_sweep(worker, a, b);
        for (int64_t row = a.begin; row < a.end; row += kStagedRows) {
            const int64_t last = row + kStagedRows < a.end ? row + kStagedRows : a.end;
            const int32_t row_floor = least_floor(row, last);
            const int32_t bound = filter_.row_bound(row, last, b.cluster) + column_bound;
            if (bound < row_floor && bound < column_floor) continue;  // whatever the product
            for (int64_t column = b.begin; column < b.end;) {
                const int64_t panels = panels_together(b.end - column);
                const int stage =
                    sweep_panels(worker, a, row, b, column, panels, row_floor, found_.floors + column, worker.sums.data);
                const int64_t next = column + panels * kPanel;
                tile(row, last - row, column, (next < b.end ? next : b.end) - column, stage);
                column = next;
            }
        }
    }

    /// Returns what the columns' side of a sum is at most.
    int32_t begin_sweep(Worker& worker, const Block& a, const Block& b) const {
        filter_.row_starts(a.begin, a.end, b.cluster, worker.row_starts.data);
        for (int64_t i = a.end; i < a.end + kStagedRows - 1; ++i) worker.row_starts.data[i - a.begin] = Filter::kNever;
        return filter_.column_starts(b.begin, b.begin + panels_of(b.end - b.begin) * kPanel, b.cluster, a.cluster,
                                     worker.column_starts.data);
    }

    struct NoFloors {
        int32_t floors[kStagedColumns];
        constexpr NoFloors() : floors() {
            for (int32_t& floor : floors) floor = kNoFloor;
        }
    };

    static constexpr NoFloors kNone{};

    static int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

    /// Of so many columns, how many panels to take at once: a single one at the end would leave the multipliers waiting.
    static int64_t panels_together(int64_t columns) {
        const int64_t left = panels_of(columns);
        return left == kStagedPanels + 1 ? kStagedPanels - 1 : left < kStagedPanels ? left : kStagedPanels;
    }

    int sweep_panels(const Worker& worker, const Block& a, int64_t row, const Block& b, int64_t column, int64_t panels,
                     int32_t row_floor, const int32_t* floors, int32_t* sums) const {
        const TileSide rows = filter_.row_tile(a.cluster, row, worker.row_starts.data + row - a.begin);
        const TileSide columns = filter_.column_tile(column, worker.column_starts.data + column - b.begin);
        switch (panels) {
            case 1:
                return sweep_tile<1>(rows, columns, filter_.stages, row_floor, floors, sums);
            case 2:
                return sweep_tile<2>(rows, columns, filter_.stages, row_floor, floors, sums);
            case 3:
                return sweep_tile<3>(rows, columns, filter_.stages, row_floor, floors, sums);
            default:
                return sweep_tile<4>(rows, columns, filter_.stages, row_floor, floors, sums);
        }
    }

    int32_t least_floor(int64_t begin, int64_t end) const {
        int32_t least = kNoFloor;
        for (int64_t i = begin; i < end; ++i) least = found_.floors[i] < least ? found_.floors[i] : least;
        return least;
    }

    /// A tile's sums that reach their row's floor or, where kBoth, their column's.
    template <bool kBoth>
    [[gnu::noinline]] void keep(Worker& worker, int64_t row, int64_t count, int64_t column, int64_t width,
                                const int32_t* sums) {
        for (int64_t r = 0; r < count; ++r, sums += kStagedColumns) {
            for (int64_t c = 0; c < width; c += kScanLanes) {
                auto floor = same_scores(found_.floors[row + r]);
                if constexpr (kBoth) floor = lesser(floor, load_scores(found_.floors + column + c));
                for (uint64_t hits = reaching(load_scores(sums + c), floor); hits != 0; hits &= hits - 1) {
                    const int64_t at = c + std::countr_zero(hits), other = column + at;
                    const int32_t upper = sums[at];
                    if (upper >= found_.floors[row + r])
                        keeper_.append(worker.kept, row + r, static_cast<int32_t>(other), upper);
                    if constexpr (kBoth)
                        if (upper >= found_.floors[other])
                            keeper_.append(worker.kept, other, static_cast<int32_t>(row + r), upper);
                }
            }
        }
    }

    Filter& filter_;
    Keeper<T, Filter> keeper_;
    Candidates<int32_t>& found_;
    int32_t* failed_;
    int64_t k_;
    Block* blocks_ = nullptr;
    int64_t count_ = 0;
    int64_t* groups_ = nullptr;  // the first block of each, and of none
    int64_t group_count_ = 0;
};

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

#endif

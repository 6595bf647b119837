// Which centroids are within reach of which rows, a group of centroids and a span of rows at a time.
//
// The centroids are put into groups of near ones, which are multiplied together, and the rows are sorted by their cluster's
// place among them: the rows of a span then have the same few groups near. For each span and group stands a lower bound of how
// much farther than its own centroid any centroid of the group is from any row of the span. A pass lowers it by what the
// group's centroids and the span's own ones moved, and as long as it is above zero the span's rows are searched without the
// group. One far-travelling centroid uses up the bounds of its own group alone (Ding et al. 2015 keep such bounds per row).
#pragma once

#include <algorithm>

#include "kmeans/nearest.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

/// The groups among which a search looks; and what it finds out of them, where that is asked for.
struct Within {
    const int32_t* groups;  // (count) ascending
    int64_t count;
    float* margins;      // of each group of all: how much its least score, of any row, exceeds that of the row's nearest
    float distance = 0;  // the greatest squared distance of a row from its nearest
    float square = 0;    // the greatest |x|^2
};

class Reach {
   public:
    Reach(int64_t n, int64_t k, int64_t d, int64_t group, int pieces, const Context& context)
        : n_(n),
          k_(k),
          d_(d),
          group_(group),
          groups_((k + group - 1) / group),
          rows_(context.scratch<int64_t>(n)),
          ids_(context.scratch<int64_t>(k)),
          columns_(context.scratch<int32_t>(k)),
          distances_(context.scratch<Distance>(k)),
          ends_(context.scratch<int64_t>(k + 1)),
          gaps_(context.scratch<float>(span_count(n) * groups_)),
          moves_(context.scratch<float>(groups_)),
          near_(context.scratch<int32_t>(pieces * groups_)),
          margins_(context.scratch<float>(pieces * groups_)) {}

    /// Worth its while where rows are many enough for each centroid to pay for the grouping.
    static bool pays(int64_t n, int64_t k, int64_t group) { return k >= 8 * group && n >= 32 * k; }

    const int64_t* rows() const { return rows_; }        // (N) the row at each position
    const int64_t* ids() const { return ids_; }          // (K) the centroid in each column
    const int32_t* columns() const { return columns_; }  // (K) the column of each centroid

    /// Groups the centroids and sorts the rows by their labels (N), which come back in that order. Everything is in reach.
    void arrange(const float* centroids, const int32_t* labels, int32_t* sorted) {
        group(centroids);
        for (int64_t column = 0; column < k_; ++column) columns_[ids_[column]] = static_cast<int32_t>(column);
        for (int64_t column = 0; column <= k_; ++column) ends_[column] = 0;
        for (int64_t row = 0; row < n_; ++row) ++ends_[columns_[labels[row]] + 1];
        for (int64_t column = 0; column < k_; ++column) ends_[column + 1] += ends_[column];
        for (int64_t row = 0; row < n_; ++row) {
            const int64_t position = ends_[columns_[labels[row]]]++;
            rows_[position] = row;
            sorted[position] = labels[row];
        }
        forget();
    }

    /// Everything is in reach again.
    void forget() {
        for (int64_t i = 0; i < span_count(n_) * groups_; ++i) gaps_[i] = 0;
    }

    /// The centroids moved by `moves` (K), at most.
    void move(const float* moves) {
        for (int64_t g = 0; g < groups_; ++g) moves_[g] = 0;
        for (int64_t column = 0; column < k_; ++column) {
            float& most = moves_[column / group_];
            most = moves[ids_[column]] > most ? moves[ids_[column]] : most;
        }
    }

    /// The groups in reach of a span whose own centroids moved by `own`, at most; all others are farther by `gap`, at least.
    Within within(int piece, int64_t span, float own, float* gap) {
        constexpr float kLess = 1 - 4e-7F;
        int32_t* near = near_ + piece * groups_;
        float* gaps = gaps_ + span * groups_;
        float least = __builtin_inff();
        int64_t count = 0;
        for (int64_t g = 0; g < groups_; ++g) {
            gaps[g] = gaps[g] * kLess - (moves_[g] + own) * (1 + 4e-7F);
            const bool out = gaps[g] > 0;
            least = out && gaps[g] < least ? gaps[g] : least;
            near[count] = static_cast<int32_t>(g);
            count += !out;
        }
        *gap = least;
        return {near, count, nullptr};
    }

    /// Has a search of all rows of a span tell of the groups it looks into, for learn().
    void ask(int piece, Within& within) {
        within.margins = margins_ + piece * groups_;
        for (int64_t i = 0; i < within.count; ++i) within.margins[within.groups[i]] = __builtin_inff();
    }

    /// What such a search has found. A row's own distance r and a margin m give the gap sqrt(r^2 + m) - r, which falls with r.
    void learn(int64_t span, const Within& within) {
        const float own = within.distance - within.square;
        for (int64_t i = 0; i < within.count; ++i) {
            const int64_t g = within.groups[i];
            const float gap = distance_gap(own, own + within.margins[g], within.square, d_);
            gaps_[span * groups_ + g] = gap > 0 ? gap : 0;
        }
    }

   private:
    struct Distance {
        double square;
        int64_t id;

        bool operator<(const Distance& other) const { return square != other.square ? square < other.square : id < other.id; }
    };

    /// The first centroid that is left takes those nearest to it.
    void group(const float* centroids) {
        int64_t left = k_;
        for (int64_t k = 0; k < k_; ++k) distances_[k].id = k;
        for (int64_t column = 0; column < k_; column += group_) {
            int64_t seed = 0;
            for (int64_t i = 1; i < left; ++i)
                if (distances_[i].id < distances_[seed].id) seed = i;
            const float* c = centroids + distances_[seed].id * d_;
            for (int64_t i = 0; i < left; ++i)
                distances_[i].square = squared_distance(centroids + distances_[i].id * d_, c, d_);
            const int64_t taken = left < group_ ? left : group_;
            std::partial_sort(distances_, distances_ + taken, distances_ + left);
            for (int64_t i = 0; i < taken; ++i) ids_[column + i] = distances_[i].id;
            left -= taken;
            for (int64_t i = 0; i < left; ++i) distances_[i] = distances_[i + taken];
        }
    }

    const int64_t n_, k_, d_, group_, groups_;
    int64_t* rows_;
    int64_t* ids_;
    int32_t* columns_;
    Distance* distances_;
    int64_t* ends_;   // (K + 1) where the next row of each column goes
    float* gaps_;     // (spans, groups)
    float* moves_;    // (groups)
    int32_t* near_;   // (pieces, groups)
    float* margins_;  // (pieces, groups)
};

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

// Sums of the rows of each cluster, kept from one iteration of Lloyd's to the next.
#pragma once

#include <algorithm>
#include <span>

#include "kmeans/nearest.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

/// A row that a pass relabelled.
struct Change {
    int64_t row;
    int32_t from, to;
};

/// Sums, weights and members of the clusters, in double. Threads share the features, so that every sum runs over the rows in
/// the order they are given in, however many threads there are.
template <class T>
class ClusterSums {
   public:
    ClusterSums(int64_t n, int64_t k, int64_t d, int pieces, const Context& context)
        : n_(n),
          k_(k),
          d_(d),
          pieces_(pieces),
          sums_(context.scratch<double>(k * d)),
          weights_(context.scratch<double>(k)),
          members_(context.scratch<int64_t>(k)),
          moves_(context.scratch<int64_t>(k)),
          stale_(context.scratch<bool>(k)) {}

    /// The rows (N, D) and their weights (N), null for ones.
    void set_rows(const T* x, const T* weights) { x_ = x, weight_of_ = weights; }

    T row_weight(int64_t row) const { return weight_of_ == nullptr ? T(1) : weight_of_[row]; }

    const double* sum(int64_t cluster) const { return sums_ + cluster * d_; }
    double weight(int64_t cluster) const { return weights_[cluster]; }
    int64_t members(int64_t cluster) const { return members_[cluster]; }  // rows of positive weight

    /// Of all rows, by their labels (N).
    void add_up(const int64_t* labels) {
        std::fill_n(stale_, k_, true);
        add_up_stale(labels);
    }

    /// Of all rows as well, where no feature of one exceeds `largest` in magnitude; but a sum that has drifted stays as it is
    /// if its mean cannot be told from the fresh sum's.
    void refresh(const int64_t* labels, double largest) {
        for_pieces(pieces_, k_, [&](int, int64_t first, int64_t last) {
            for (int64_t k = first; k < last; ++k) stale_[k] = moves_[k] > 0 && !has_certain_mean(k, largest);
        });
        add_up_stale(labels);
    }

    /// Moved by the rows that changed.
    void move(std::span<const Change> changes) {
        for (const Change& c : changes) {
            count(c.from, c.row, -1), count(c.to, c.row, 1);
            ++moves_[c.from], ++moves_[c.to];
        }
        for_feature_slices<T>(pieces_, d_, [&](int64_t begin, int64_t end) {
            for (const Change& c : changes) {
                add_row(c.row, c.from, -row_weight(c.row), begin, end);
                add_row(c.row, c.to, row_weight(c.row), begin, end);
            }
        });
    }

   private:
    void add_up_stale(const int64_t* labels) {
        for (int64_t k = 0; k < k_; ++k)
            if (stale_[k]) weights_[k] = 0, members_[k] = moves_[k] = 0;
        for (int64_t row = 0; row < n_; ++row)
            if (stale_[labels[row]]) count(labels[row], row, 1);
        for_feature_slices<T>(pieces_, d_, [&](int64_t begin, int64_t end) {
            for (int64_t k = 0; k < k_; ++k)
                for (int64_t j = begin; stale_[k] && j < end; ++j) sums_[k * d_ + j] = 0;
            for (int64_t row = 0; row < n_; ++row)
                if (stale_[labels[row]]) add_row(row, labels[row], row_weight(row), begin, end);
        });
    }

    /// Whether every sum as far from this one as a fresh one can be has the same mean in T. An addition is off by 2^-53 of its
    /// result, which `largest` times the rows in it bounds; those since the last fresh sum and those of the next count.
    bool has_certain_mean(int64_t k, double largest) const {
        if (weight_of_ != nullptr || sizeof(T) == sizeof(double)) return false;
        const auto additions = static_cast<double>(members_[k] + 2 * moves_[k] + 2);
        const double error = 0x1p-52 * 1.001 * additions * additions * largest, divisor = weights_[k];
        bool certain = true;
        for (int64_t j = 0; j < d_; ++j) {
            const double sum = sums_[k * d_ + j];
            certain &= static_cast<T>((sum - error) / divisor) == static_cast<T>((sum + error) / divisor);
        }
        return certain;
    }

    void count(int64_t cluster, int64_t row, int sign) {
        const double mass = static_cast<double>(row_weight(row));
        weights_[cluster] += sign * mass;
        members_[cluster] += sign * (mass > 0);
    }

    void add_row(int64_t row, int64_t cluster, double mass, int64_t begin, int64_t end) {
        double* sum = sums_ + cluster * d_;
        const T* x = x_ + row * d_;
        for (int64_t j = begin; j < end; ++j) sum[j] += mass * static_cast<double>(x[j]);
    }

    const int64_t n_, k_, d_;
    const int pieces_;
    double* sums_;      // (K, D)
    double* weights_;   // (K)
    int64_t* members_;  // (K)
    int64_t* moves_;    // (K) rows that have come or gone since the sum was added up
    bool* stale_;       // (K) clusters to be added up
    const T* x_ = nullptr;
    const T* weight_of_ = nullptr;
};

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

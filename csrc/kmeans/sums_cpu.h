// Sums of the rows of each cluster, kept from one iteration of Lloyd's to the next.
#pragma once

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
          members_(context.scratch<int64_t>(k)) {}

    /// The rows (N, D) and their weights (N), null for ones.
    void set_rows(const T* x, const T* weights) { x_ = x, weight_of_ = weights; }

    T row_weight(int64_t row) const { return weight_of_ == nullptr ? T(1) : weight_of_[row]; }

    const double* sum(int64_t cluster) const { return sums_ + cluster * d_; }
    double weight(int64_t cluster) const { return weights_[cluster]; }
    int64_t members(int64_t cluster) const { return members_[cluster]; }  // rows of positive weight

    /// Of all rows, by their labels (N).
    void add_up(const int64_t* labels) {
        for (int64_t k = 0; k < k_; ++k) weights_[k] = 0, members_[k] = 0;
        for (int64_t row = 0; row < n_; ++row) count(labels[row], row, 1);
        for_feature_slices<T>(pieces_, d_, [&](int64_t begin, int64_t end) {
            for (int64_t k = 0; k < k_; ++k)
                for (int64_t j = begin; j < end; ++j) sums_[k * d_ + j] = 0;
            for (int64_t row = 0; row < n_; ++row) add_row(row, labels[row], row_weight(row), begin, end);
        });
    }

    /// Moved by the rows that changed.
    void move(std::span<const Change> changes) {
        for (const Change& c : changes) count(c.from, c.row, -1), count(c.to, c.row, 1);
        for_feature_slices<T>(pieces_, d_, [&](int64_t begin, int64_t end) {
            for (const Change& c : changes) {
                add_row(c.row, c.from, -row_weight(c.row), begin, end);
                add_row(c.row, c.to, row_weight(c.row), begin, end);
            }
        });
    }

   private:
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
    const T* x_ = nullptr;
    const T* weight_of_ = nullptr;
};

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

#include <algorithm>

#include "kmeans/kmeans_cpu.h"
#include "kmeans/search.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {
namespace {

/// A row that an empty cluster may be put on.
struct Candidate {
    double distance;
    int64_t row;

    bool operator<(const Candidate& other) const {
        return distance != other.distance ? distance > other.distance : row < other.row;
    }
};

/// Runs Lloyd's iteration for one problem and start after another, with `pieces` threads.
///
/// The sums of each cluster are kept in double from one iteration to the next, and only rows that change cluster are moved:
/// late iterations hardly read x. They drift by double's rounding, so a solution is accepted only with sums added up afresh.
template <class T>
class Solver {
   public:
    Solver(const Lloyd<T>& a, int pieces, const Context& context)
        : a_(a),
          pieces_(pieces),
          before_(context.scratch<T>(a.k * a.d)),
          sums_(context.scratch<double>(a.k * a.d)),
          weights_(context.scratch<double>(a.k)),
          members_(context.scratch<int64_t>(a.k)),
          shifts_(context.scratch<double>(a.k)),
          moments_(context.scratch<double>(a.d)),
          partial_(context.scratch<double>(block_count(a.n))),
          previous_(context.scratch<int32_t>(a.n)),
          changed_(context.scratch<int64_t>(block_count(a.n))),
          candidates_(context.scratch<Candidate>(a.n)),
          search_(a.n, a.k, a.d, a.max_iter, a.exact, pieces, context) {}

    void solve_problem(int64_t problem) {
        x_ = a_.x + problem * a_.n * a_.d;
        weight_of_ = a_.sample_weight == nullptr ? nullptr : a_.sample_weight + problem * a_.n;
        fixed_ = a_.fixed_labels == nullptr ? nullptr : a_.fixed_labels + problem * a_.n;
        search_.set_rows(x_);
        limit_ = a_.tol > 0 ? a_.tol * mean_variance() : 0;
        for (int64_t restart = 0; restart < a_.restarts; ++restart) {
            const int64_t run = problem * a_.restarts + restart;
            centroids_ = a_.centroids + run * a_.k * a_.d;
            labels_ = a_.labels + run * a_.n;
            const T* init = a_.init + run * a_.k * a_.d;
            for (int64_t i = 0; i < a_.k * a_.d; ++i) centroids_[i] = init[i];
            search_.restart();
            a_.n_iter[run] = iterate();
            a_.inertia[run] = static_cast<T>(inertia());
        }
    }

   private:
    int64_t iterate() {
        for (int64_t row = 0; row < a_.n; ++row) labels_[row] = -1;
        bool fresh = false;
        for (int64_t iteration = 1; iteration <= a_.max_iter; ++iteration) {
            const int64_t changed = assign();
            if (changed == 0 && fresh) return iteration;
            fresh = sizeof(T) == sizeof(double) || iteration == a_.max_iter || 2 * changed > a_.n || changed == 0;
            add_up(fresh);
            const double shift = update();
            if (changed == 0 && shift == 0) return iteration;
            if (changed != 0 && reseed_empty()) continue;
            if (shift <= limit_) {
                if (!fresh) add_up(true), update();
                assign();
                return iteration;
            }
        }
        assign();
        return a_.max_iter;
    }

    /// Labels of every row; how many are not what they were, with the old ones in previous_.
    int64_t assign() {
        search_.set_centroids(centroids_);
        for_pieces(pieces_, block_count(a_.n), [&](int piece, int64_t first, int64_t last) {
            int64_t nearest[kBlockRows];
            for (int64_t block = first; block < last; ++block) {
                const int64_t begin = block * kBlockRows;
                const int64_t rows = a_.n - begin < kBlockRows ? a_.n - begin : kBlockRows;
                search_.assign(piece, begin, rows, nearest);
                changed_[block] = relabel(begin, rows, nearest);
            }
        });
        search_.adapt();
        int64_t changed = 0;
        for (int64_t block = 0; block < block_count(a_.n); ++block) changed += changed_[block];
        return changed;
    }

    int64_t relabel(int64_t begin, int64_t rows, const int64_t* nearest) {
        int64_t changed = 0;
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t row = begin + i;
            const int64_t label = fixed_ != nullptr && fixed_[row] >= 0 ? fixed_[row] : nearest[i];
            previous_[row] = static_cast<int32_t>(labels_[row]);
            changed += labels_[row] != label;
            labels_[row] = label;
        }
        return changed;
    }

    int64_t block_end(int64_t block) const { return (block + 1) * kBlockRows < a_.n ? (block + 1) * kBlockRows : a_.n; }

    T weight(int64_t row) const { return weight_of_ == nullptr ? T(1) : weight_of_[row]; }

    /// Sums, weights and members of the clusters: of all rows, or moved by the rows that changed.
    void add_up(bool fresh) {
        if (fresh) {
            for (int64_t k = 0; k < a_.k; ++k) weights_[k] = 0, members_[k] = 0;
            for (int64_t row = 0; row < a_.n; ++row) count(labels_[row], row, 1);
        } else {
            each_changed([&](int64_t row) { count(previous_[row], row, -1), count(labels_[row], row, 1); });
        }
        for_feature_slices<T>(pieces_, a_.d, [&](int64_t begin, int64_t end) {
            if (fresh) {
                for (int64_t k = 0; k < a_.k; ++k)
                    for (int64_t j = begin; j < end; ++j) sums_[k * a_.d + j] = 0;
                for (int64_t row = 0; row < a_.n; ++row) add_row(row, labels_[row], weight(row), begin, end);
            } else {
                each_changed([&](int64_t row) {
                    add_row(row, previous_[row], -weight(row), begin, end);
                    add_row(row, labels_[row], weight(row), begin, end);
                });
            }
        });
    }

    template <class Body>
    void each_changed(const Body& body) const {
        for (int64_t block = 0; block < block_count(a_.n); ++block) {
            if (changed_[block] == 0) continue;
            const int64_t end = block_end(block);
            for (int64_t row = block * kBlockRows; row < end; ++row)
                if (previous_[row] != labels_[row]) body(row);
        }
    }

    void count(int64_t cluster, int64_t row, int sign) {
        const double mass = static_cast<double>(weight(row));
        weights_[cluster] += sign * mass;
        members_[cluster] += sign * (mass > 0);
    }

    void add_row(int64_t row, int64_t cluster, double mass, int64_t begin, int64_t end) {
        double* sum = sums_ + cluster * a_.d;
        const T* x = x_ + row * a_.d;
        for (int64_t j = begin; j < end; ++j) sum[j] += mass * static_cast<double>(x[j]);
    }

    /// Moves the centroids of clusters with members; how far, squared.
    double update() {
        for_pieces(pieces_, a_.k, [&](int, int64_t first, int64_t last) {
            for (int64_t k = first; k < last; ++k) shifts_[k] = update_cluster(k);
        });
        double shift = 0;
        for (int64_t k = 0; k < a_.k; ++k) shift += shifts_[k];
        return shift;
    }

    double update_cluster(int64_t k) {
        const double* sum = sums_ + k * a_.d;
        T* c = centroids_ + k * a_.d;
        T* before = before_ + k * a_.d;
        for (int64_t j = 0; j < a_.d; ++j) before[j] = c[j];
        if (members_[k] == 0) return 0;
        double divisor = weights_[k];
        if (a_.spherical) {
            divisor = 0;
            for (int64_t j = 0; j < a_.d; ++j) divisor += sum[j] * sum[j];
            divisor = __builtin_sqrt(divisor);
            if (divisor == 0) return 0;
        }
        for (int64_t j = 0; j < a_.d; ++j) c[j] = static_cast<T>(sum[j] / divisor);
        return squared_distance(c, before, a_.d);
    }

    /// Puts empty clusters on the farthest rows of the largest cluster; whether any was moved.
    bool reseed_empty() {
        int64_t empty = 0, largest = 0;
        for (int64_t k = 0; k < a_.k; ++k) {
            empty += members_[k] == 0;
            if (weights_[k] > weights_[largest]) largest = k;
        }
        if (empty == 0) return false;
        int64_t found = 0;
        for (int64_t row = 0; row < a_.n; ++row) {
            const bool free = fixed_ == nullptr || fixed_[row] < 0;
            if (labels_[row] != largest || !free || !(weight(row) > 0)) continue;
            const double distance = squared_distance(x_ + row * a_.d, before_ + largest * a_.d, a_.d);
            if (distance > 0) candidates_[found++] = {distance, row};
        }
        const int64_t taken = empty < found ? empty : found;
        std::partial_sort(candidates_, candidates_ + taken, candidates_ + found);
        for (int64_t k = 0, next = 0; next < taken; ++k) {
            if (members_[k] != 0) continue;
            const T* row = x_ + candidates_[next++].row * a_.d;
            for (int64_t j = 0; j < a_.d; ++j) centroids_[k * a_.d + j] = row[j];
        }
        return taken > 0;
    }

    double mean_variance() {
        const T* mean = search_.mean();
        for_feature_slices<T>(pieces_, a_.d, [&](int64_t begin, int64_t end) {
            for (int64_t j = begin; j < end; ++j) moments_[j] = 0;
            for (int64_t row = 0; row < a_.n; ++row)
                for (int64_t j = begin; j < end; ++j) {
                    const double difference = static_cast<double>(x_[row * a_.d + j]) - static_cast<double>(mean[j]);
                    moments_[j] += difference * difference;
                }
        });
        double sum = 0;
        for (int64_t j = 0; j < a_.d; ++j) sum += moments_[j];
        return sum / static_cast<double>(a_.n) / static_cast<double>(a_.d);
    }

    double inertia() {
        const int64_t blocks = block_count(a_.n);
        for_pieces(pieces_, blocks, [&](int, int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                const int64_t end = block_end(block);
                partial_[block] = 0;
                for (int64_t row = block * kBlockRows; row < end; ++row)
                    partial_[block] += static_cast<double>(weight(row)) *
                                       squared_distance(x_ + row * a_.d, centroids_ + labels_[row] * a_.d, a_.d);
            }
        });
        double sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += partial_[block];
        return sum;
    }

    const Lloyd<T>& a_;
    const int pieces_;
    T* before_;              // (K, D) centroids before the update
    double* sums_;           // (K, D)
    double* weights_;        // (K)
    int64_t* members_;       // (K) rows of positive weight
    double* shifts_;         // (K)
    double* moments_;        // (D)
    double* partial_;        // (blocks)
    int32_t* previous_;      // (N) labels before this pass
    int64_t* changed_;       // (blocks) rows relabelled by this pass
    Candidate* candidates_;  // (N)
    Search<T> search_;

    const T* x_ = nullptr;
    const T* weight_of_ = nullptr;
    const int64_t* fixed_ = nullptr;
    T* centroids_ = nullptr;
    int64_t* labels_ = nullptr;
    double limit_ = 0;
};

}  // namespace

template <class T>
void lloyd(const Lloyd<T>& a, const Context& context) {
    for_problems<Solver<T>>(a, context, [](Solver<T>& solver, int64_t problem) { solver.solve_problem(problem); });
}

template void lloyd<float>(const Lloyd<float>&, const Context&);
template void lloyd<double>(const Lloyd<double>&, const Context&);

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

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
          moves_(context.scratch<T>(a.k)),
          losses_(context.scratch<T>(a.k)),
          moved_(context.scratch<int64_t>(a.k)),
          scores_(context.scratch<T>(a.n)),
          rivals_{context.scratch<int32_t>(a.n), context.scratch<int32_t>(a.n)},
          leads_(context.scratch<T>(a.n)),
          gaps_(context.scratch<T>(a.n)),
          moments_(context.scratch<double>(a.d)),
          partial_(context.scratch<double>(span_count(a.n))),
          previous_(context.scratch<int32_t>(a.n)),
          changed_(context.scratch<int64_t>(span_count(a.n))),
          candidates_(context.scratch<Candidate>(a.n)),
          search_(a.n, a.k, a.d, a.max_iter + 1, a.exact, pieces, context) {}

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
        moved_count_ = a_.k;
        bool fresh = false;
        for (int64_t iteration = 1; iteration <= a_.max_iter; ++iteration) {
            const int64_t changed = assign(true);
            if (changed == 0 && fresh) return iteration;
            fresh = sizeof(T) == sizeof(double) || iteration == a_.max_iter || 2 * changed > a_.n || changed == 0;
            add_up(fresh);
            update();
            if (changed != 0) reseed_empty();
            const double shift = total_shift();
            if (changed == 0 && shift == 0) return iteration;
            if (shift <= limit_) {
                if (!fresh) add_up(true), update();
                assign(false);
                return iteration;
            }
        }
        assign(true);
        return a_.max_iter;
    }

    /// Labels of every row; how many are not what they were, with the old ones in previous_. Where the gaps are to be trusted,
    /// a row whose nearest centroid has kept its lead over all others, whatever they moved, is not looked at (Hamerly 2010);
    /// one that has kept it over all but its rivals is compared with those alone; and one whose nearest has not moved, only
    /// with those that have.
    int64_t assign(bool trust_gaps) {
        search_.set_centroids(centroids_);
        few_moved_ = trust_gaps && 2 * moved_count_ <= a_.k;
        with_rivals_ = search_.keeps_rivals();
        if (few_moved_) search_.set_moved(centroids_, moved_, moved_count_);
        for_pieces(pieces_, span_count(a_.n), [&](int piece, int64_t first, int64_t last) {
            for (int64_t span = first; span < last; ++span) changed_[span] = assign_span(piece, span, trust_gaps);
        });
        if (search_.adapt())
            for (int64_t row = 0; row < a_.n; ++row) {
                scores_[row] = unknown();
                if (with_rivals_) forget_rivals(row);
            }
        int64_t changed = 0;
        for (int64_t span = 0; span < span_count(a_.n); ++span) changed += changed_[span];
        return changed;
    }

    static T unknown() { return static_cast<T>(__builtin_inf()); }
    static constexpr T kLess = static_cast<T>(1 - 4e-7), kMore = static_cast<T>(1.000001);  // for the rounding of bounds

    /// The rows of a span that need a search: of all centroids, of those that moved, of their rivals.
    struct Tasks {
        int64_t all[kSpanRows + 1], moved[kSpanRows + 1], rivals[kSpanRows + 1];
        int64_t all_count = 0, moved_count = 0, rivals_count = 0;
    };

    int64_t assign_span(int piece, int64_t span, bool trust_gaps) {
        Tasks tasks;
        int64_t changed = 0;
        for (int64_t row = span * kSpanRows; row < span_end(span, a_.n); ++row) {
            previous_[row] = static_cast<int32_t>(labels_[row]);
            if (fixed_ != nullptr && fixed_[row] >= 0) {
                changed += labels_[row] != fixed_[row];
                labels_[row] = fixed_[row];
            } else if (labels_[row] < 0 || !trust_gaps) {
                tasks.all[tasks.all_count++] = row;
            } else if (with_rivals_) {
                give_task<true>(row, tasks);
            } else {
                give_task<false>(row, tasks);
            }
        }
        changed += search_rows(tasks.all, tasks.all_count, false,
                               [&](const Nearest<T>& nearest) { search_.assign(piece, tasks.all, tasks.all_count, nearest); });
        changed += search_rows(tasks.rivals, tasks.rivals_count, true, [&](const Nearest<T>& nearest) {
            search_.assign_among_rivals(piece, tasks.rivals, tasks.rivals_count, nearest);
        });
        for (int64_t i = 0; with_rivals_ && i < tasks.moved_count; ++i) forget_rivals(tasks.moved[i]);
        return changed + search_rows(tasks.moved, tasks.moved_count, true, [&](const Nearest<T>& nearest) {
                   search_.assign_moved(piece, tasks.moved, tasks.moved_count, nearest);
               });
    }

    /// Without branches: which way a row goes is hard to foretell.
    template <bool kWithRivals>
    void give_task(int64_t row, Tasks& tasks) {
        const int64_t label = labels_[row];
        const T gap = gaps_[row] * kLess - losses_[label], score = shifts_[label] == 0 ? scores_[row] : unknown();
        const int64_t keeps = gap > 0, stands = few_moved_ & (score < unknown()) & !keeps;
        scores_[row] = score;
        gaps_[row] = keeps ? gap : gaps_[row];
        if constexpr (kWithRivals) {
            const T first = moves_[rivals_[0][row]], second = moves_[rivals_[1][row]];
            const T lead = leads_[row] * kLess - (moves_[label] + (first > second ? first : second));
            const int64_t leads = lead > 0;
            leads_[row] = keeps ? lead : leads_[row];
            tasks.rivals[tasks.rivals_count] = row;
            tasks.rivals_count += keeps & ~leads;
        }
        tasks.moved[tasks.moved_count] = row;
        tasks.moved_count += stands;
        tasks.all[tasks.all_count] = row;
        tasks.all_count += 1 - (keeps | stands);
    }

    /// What is known of the rivals as of all others.
    void forget_rivals(int64_t row) {
        if (leads_[row] < gaps_[row]) gaps_[row] = leads_[row];
        leads_[row] = unknown();
    }

    /// Labels of rows[0 .. count) by `search`, which is told what is `known`; how many are not what they were.
    template <class SearchRows>
    int64_t search_rows(const int64_t* rows, int64_t count, bool known, const SearchRows& search) {
        int64_t labels[kSpanRows], changed = 0;
        int32_t rivals[kRivals][kSpanRows];
        T scores[kSpanRows], leads[kSpanRows], gaps[kSpanRows];
        if (count == 0) return 0;
        for (int64_t i = 0; known && i < count; ++i)
            labels[i] = labels_[rows[i]], scores[i] = scores_[rows[i]], gaps[i] = gaps_[rows[i]];
        for (int r = 0; known && r < kRivals; ++r)
            for (int64_t i = 0; i < count; ++i) rivals[r][i] = rivals_[r][rows[i]];
        search(Nearest<T>{labels, scores, {rivals[0], rivals[1]}, leads, gaps, known});
        for (int64_t i = 0; i < count; ++i) {
            changed += labels_[rows[i]] != labels[i];
            labels_[rows[i]] = labels[i], scores_[rows[i]] = scores[i], gaps_[rows[i]] = gaps[i];
        }
        if (!(kCertifies<T> && with_rivals_)) return changed;
        for (int64_t i = 0; i < count; ++i) leads_[rows[i]] = leads[i];
        for (int r = 0; r < kRivals; ++r)
            for (int64_t i = 0; i < count; ++i) rivals_[r][rows[i]] = rivals[r][i];
        return changed;
    }

    /// How far the centroids moved, squared; with it, what each cluster's rows lose of their gaps.
    double total_shift() {
        double shift = 0, farthest = 0, second = 0;
        int64_t mover = 0;
        moved_count_ = 0;
        for (int64_t k = 0; k < a_.k; ++k) {
            shift += shifts_[k];
            if (shifts_[k] > 0) moved_[moved_count_++] = k;
            if (shifts_[k] > farthest)
                second = farthest, farthest = shifts_[k], mover = k;
            else if (shifts_[k] > second)
                second = shifts_[k];
        }
        for (int64_t k = 0; k < a_.k; ++k) {
            moves_[k] = kMore * static_cast<T>(__builtin_sqrt(shifts_[k]));
            losses_[k] = moves_[k] + kMore * static_cast<T>(__builtin_sqrt(k == mover ? second : farthest));
        }
        return shift;
    }

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
        for (int64_t span = 0; span < span_count(a_.n); ++span) {
            if (changed_[span] == 0) continue;
            const int64_t end = span_end(span, a_.n);
            for (int64_t row = span * kSpanRows; row < end; ++row)
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

    /// Moves the centroids of clusters with members.
    void update() {
        for_pieces(pieces_, a_.k, [&](int, int64_t first, int64_t last) {
            for (int64_t k = first; k < last; ++k) shifts_[k] = update_cluster(k);
        });
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

    /// Puts empty clusters on the farthest rows of the largest cluster.
    void reseed_empty() {
        int64_t empty = 0, largest = 0;
        for (int64_t k = 0; k < a_.k; ++k) {
            empty += members_[k] == 0;
            if (weights_[k] > weights_[largest]) largest = k;
        }
        if (empty == 0) return;
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
            shifts_[k] = squared_distance(row, before_ + k * a_.d, a_.d);
        }
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
        const int64_t spans = span_count(a_.n);
        for_pieces(pieces_, spans, [&](int, int64_t first, int64_t last) {
            for (int64_t span = first; span < last; ++span) {
                const int64_t end = span_end(span, a_.n);
                partial_[span] = 0;
                for (int64_t row = span * kSpanRows; row < end; ++row)
                    partial_[span] += static_cast<double>(weight(row)) *
                                      squared_distance(x_ + row * a_.d, centroids_ + labels_[row] * a_.d, a_.d);
            }
        });
        double sum = 0;
        for (int64_t span = 0; span < spans; ++span) sum += partial_[span];
        return sum;
    }

    const Lloyd<T>& a_;
    const int pieces_;
    T* before_;                 // (K, D) centroids before the update
    double* sums_;              // (K, D)
    double* weights_;           // (K)
    int64_t* members_;          // (K) rows of positive weight
    double* shifts_;            // (K)
    T* moves_;                  // (K) how far the centroids moved last, at most
    T* losses_;                 // (K) what a row's gap loses by that
    int64_t* moved_;            // (moved_count_) the centroids that the last update moved
    T* scores_;                 // (N) Nearest's, of a centroid that stands where it stood; else unknown()
    int32_t* rivals_[kRivals];  // (N) Nearest's, as are
    T* leads_;                  // (N) and
    T* gaps_;                   // (N)
    double* moments_;           // (D)
    double* partial_;           // (spans)
    int32_t* previous_;         // (N) labels before this pass
    int64_t* changed_;          // (spans) rows relabelled by this pass
    Candidate* candidates_;     // (N)
    Search<T> search_;

    const T* x_ = nullptr;
    const T* weight_of_ = nullptr;
    const int64_t* fixed_ = nullptr;
    T* centroids_ = nullptr;
    int64_t* labels_ = nullptr;
    double limit_ = 0;
    int64_t moved_count_ = 0;
    bool few_moved_ = false, with_rivals_ = false;
};

}  // namespace

template <class T>
void lloyd(const Lloyd<T>& a, const Context& context) {
    for_problems<Solver<T>>(a, context, [](Solver<T>& solver, int64_t problem) { solver.solve_problem(problem); });
}

template void lloyd<float>(const Lloyd<float>&, const Context&);
template void lloyd<double>(const Lloyd<double>&, const Context&);

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

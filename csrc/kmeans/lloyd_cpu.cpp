#include <algorithm>
#include <functional>
#include <utility>

#include "kmeans/kmeans_cpu.h"
#include "kmeans/search.h"
#include "kmeans/sums_cpu.h"
#include "kmeans/tasks.h"

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
          sums_(a.n, a.k, a.d, pieces, context),
          shifts_(context.scratch<double>(a.k)),
          moves_(context.scratch<T>(a.k)),
          moved_(context.scratch<int64_t>(a.k)),
          far_(context.scratch<int64_t>(a.k)),
          sorted_moves_(context.scratch<T>(a.k)),
          scores_(context.scratch<T>(a.n)),
          rivals_{context.scratch<int32_t>(a.n), context.scratch<int32_t>(a.n)},
          leads_(context.scratch<T>(a.n)),
          gaps_(context.scratch<T>(a.n)),
          moments_(context.scratch<double>(a.d)),
          partial_(context.scratch<double>(span_count(a.n))),
          nearest_(context.scratch<int32_t>(a.n)),
          previous_(context.scratch<int32_t>(a.n)),
          changed_(context.scratch<int64_t>(span_count(a.n))),
          changes_(context.scratch<Change>(a.n / 2 + 1)),
          candidates_(context.scratch<Candidate>(a.n)),
          search_(a.n, a.k, a.d, a.max_iter + 1, a.exact, pieces, context) {}

    void solve_problem(int64_t problem) {
        x_ = a_.x + problem * a_.n * a_.d;
        fixed_ = a_.fixed_labels == nullptr ? nullptr : a_.fixed_labels + problem * a_.n;
        sums_.set_rows(x_, a_.sample_weight == nullptr ? nullptr : a_.sample_weight + problem * a_.n);
        if (!search_.set_rows(x_)) {
            std::fill_n(a_.inertia + problem * a_.restarts, a_.restarts, static_cast<T>(__builtin_nan("")));
            return;
        }
        limit_ = a_.tol > 0 ? a_.tol * mean_variance() : 0;
        for (int64_t restart = 0; restart < a_.restarts; ++restart) {
            const int64_t run = problem * a_.restarts + restart;
            centroids_ = a_.centroids + run * a_.k * a_.d;
            labels_ = a_.labels + run * a_.n;
            const T* init = a_.init + run * a_.k * a_.d;
            for (int64_t i = 0; i < a_.k * a_.d; ++i) centroids_[i] = init[i];
            search_.restart();
            a_.n_iter[run] = iterate();
            tell_labels();
            a_.inertia[run] = static_cast<T>(inertia());
        }
    }

   private:
    int64_t iterate() {
        for (int64_t i = 0; i < a_.n; ++i) nearest_[i] = -1, gaps_[i] = 0;
        passes_ = 0;
        moved_count_ = a_.k;
        bool fresh = false;
        for (int64_t iteration = 1; iteration <= a_.max_iter; ++iteration) {
            const int64_t changed = assign(true);
            if (changed == 0 && fresh) return iteration;
            fresh = sizeof(T) == sizeof(double) || iteration == a_.max_iter || 2 * changed > a_.n || changed == 0;
            add_up(2 * changed > a_.n, fresh);
            update();
            if (changed != 0) reseed_empty();
            const double shift = total_shift();
            if (changed == 0 && shift == 0) return iteration;
            if (shift <= limit_) {
                if (!fresh) add_up(true, true), update();
                assign(false);
                return iteration;
            }
        }
        assign(true);
        return a_.max_iter;
    }

    /// Sorts the rows by label; the next pass searches for all of them.
    void arrange() {
        search_.arrange(centroids_, nearest_, previous_);
        std::swap(nearest_, previous_);
        for (int64_t i = 0; i < a_.n; ++i) scores_[i] = leads_[i] = unknown(), gaps_[i] = 0, forget_rivals(i);
    }

    /// Decides which of the centroids are far movers: a row that has kept its lead over all others is compared with them and
    /// its rivals alone. Whether the rows should be sorted instead, because most have not kept it.
    bool choose_far() {
        constexpr int64_t kParts[] = {64, 16, 4}, kOverhead = 64;  // of the centroids; a search's own cost, in centroids
        constexpr int kChoices = 3;
        const bool may_arrange = passes_ == 2 && search_.wants_arranging();
        T limits[kChoices];
        int64_t keep = 0, kept[kChoices] = {};
        std::copy(moves_, moves_ + a_.k, sorted_moves_);
        std::sort(sorted_moves_, sorted_moves_ + a_.k, std::greater<T>());
        for (int c = 0; c < kChoices; ++c) limits[c] = kMore<T> * sorted_moves_[a_.k / kParts[c]];
        if (2 * limits[kChoices - 1] > sorted_moves_[0] && !may_arrange) return false;
        for (int64_t i = 0; i < a_.n; ++i) {
            const T gap = gaps_[i] * kLess<T> - moves_[nearest_[i]];
            keep += gap > sorted_moves_[0];
            for (int c = 0; c < kChoices; ++c) kept[c] += gap > limits[c];
        }
        const auto cost = [&](int c) { return (a_.n - kept[c]) * a_.k + (kept[c] - keep) * (a_.k / kParts[c] + kOverhead); };
        int best = 0;
        for (int c = 1; c < kChoices; ++c) best = cost(c) < cost(best) ? c : best;
        if (may_arrange && 2 * kept[best] < a_.n) return true;
        if (10 * cost(best) > 7 * (a_.n - keep) * a_.k) return false;
        near_move_ = limits[best];
        far_count_ = 0;
        for (int64_t k = 0; k < a_.k; ++k)
            if (moves_[k] > near_move_) far_[far_count_++] = k;
        return false;
    }

    void tell_labels() {
        for (int64_t i = 0; i < a_.n; ++i) labels_[search_.row(i)] = nearest_[i];
    }

    /// Labels of every row; how many are not what they were, with the old ones in previous_. Where the gaps are to be trusted,
    /// a row whose nearest centroid has kept its lead over all others, whatever they moved, is not looked at (Hamerly 2010);
    /// one that has kept it over all but its rivals is compared with those alone; and one whose nearest has not moved, only
    /// with those that have.
    int64_t assign(bool trust_gaps) {
        few_moved_ = trust_gaps && 2 * moved_count_ <= a_.k;
        with_rivals_ = search_.keeps_rivals();
        near_move_ = unknown();
        if (trust_gaps && with_rivals_ && !few_moved_ && passes_ > 0 && choose_far()) arrange();
        ++passes_;
        search_.set_centroids(centroids_);
        search_.set_moves(trust_gaps ? moves_ : nullptr);
        if (few_moved_) search_.set_moved(kMoved, centroids_, moved_, moved_count_);
        if (near_move_ < unknown()) search_.set_moved(kFar, centroids_, far_, far_count_);
        for_pieces(pieces_, span_count(a_.n), [&](int piece, int64_t first, int64_t last) {
            for (int64_t span = first; span < last; ++span) changed_[span] = assign_span(piece, span, trust_gaps);
        });
        if (search_.adapt())
            for (int64_t i = 0; i < a_.n; ++i) {
                scores_[i] = unknown();
                if (with_rivals_) forget_rivals(i);
            }
        int64_t changed = 0;
        for (int64_t span = 0; span < span_count(a_.n); ++span) changed += changed_[span];
        return changed;
    }

    static T unknown() { return static_cast<T>(__builtin_inf()); }

    /// The rows of a span that need a search: of all centroids, of those that moved, of their rivals, of those that moved far.
    struct Tasks {
        RowList all, moved, rivals, far;
    };

    int64_t assign_span(int piece, int64_t span, bool trust_gaps) {
        const int64_t first = span * kSpanRows, count = span_end(span, a_.n) - first;
        const T own = search_.keeps_reach() && trust_gaps ? farthest_move(first, count) : 0;
        std::copy_n(nearest_ + first, count, previous_ + first);
        Tasks tasks;
        find_tasks(first, count, trust_gaps, tasks);
        if (search_.keeps_reach())
            search_within_reach(piece, span, own, tasks);
        else
            search_all(piece, tasks.all, nullptr);
        search_rows(tasks.rivals, true, [&](const Nearest<T>& nearest) {
            search_.assign_among_rivals(piece, tasks.rivals.rows, tasks.rivals.count, nearest);
        });
        for (int64_t i = 0; with_rivals_ && i < tasks.moved.count; ++i) forget_rivals(tasks.moved.rows[i]);
        search_moved(piece, kMoved, tasks.moved);
        search_moved(piece, kFar, tasks.far);
        int64_t changed = 0;
        for (int64_t i = first; i < first + count; ++i) changed += nearest_[i] != previous_[i];
        return changed;
    }

    /// Of the centroids of some rows.
    T farthest_move(int64_t first, int64_t count) const {
        T farthest = 0;
        for (int64_t i = first; i < first + count; ++i) farthest = std::max(farthest, moves_[nearest_[i]]);
        return farthest;
    }

    void find_tasks(int64_t first, int64_t count, bool trust_gaps, Tasks& tasks) {
        int32_t needs[kSpanRows];
        const bool known = trust_gaps && passes_ > 1;
        if (known)
            lower_bounds_of(first, count, needs);
        else
            std::fill_n(needs, count, kNeedsAll);
        for (int64_t i = 0; fixed_ != nullptr && i < count; ++i)
            if (is_fixed(first + i)) needs[i] = 0, keep_fixed(first + i);
        tasks.all.list(needs, kNeedsAll, first, count);
        if (!known) return;
        if (few_moved_) tasks.moved.list(needs, kNeedsMoved, first, count);
        if (with_rivals_) tasks.rivals.list(needs, kNeedsRivals, first, count);
        if (near_move_ < unknown()) tasks.far.list(needs, kNeedsFar, first, count);
    }

    void lower_bounds_of(int64_t first, int64_t count, int32_t* needs) {
        const Travel<T> travel{moves_, farthest_, most_, second_most_, near_move_, few_moved_};
        const Nearest<T> rows = kept(first, true);
        const auto score_after = [&](int64_t i, T score, T move) { return search_.score_after(first + i, score, move); };
        if (near_move_ < unknown())
            lower_bounds<true, true>(travel, rows, count, score_after, needs);
        else if (with_rivals_)
            lower_bounds<true, false>(travel, rows, count, score_after, needs);
        else
            lower_bounds<false, false>(travel, rows, count, score_after, needs);
    }

    bool is_fixed(int64_t position) const { return fixed_ != nullptr && fixed_[search_.row(position)] >= 0; }

    void keep_fixed(int64_t position) {
        nearest_[position] = static_cast<int32_t>(fixed_[search_.row(position)]);
        scores_[position] = unknown();
        kept(position, true).without_rivals(0);
    }

    void search_moved(int piece, Moved which, const RowList& list) {
        search_rows(list, true,
                    [&](const Nearest<T>& nearest) { search_.assign_moved(piece, which, list.rows, list.count, nearest); });
    }

    void search_all(int piece, const RowList& list, Within* within) {
        search_rows(list, false,
                    [&](const Nearest<T>& nearest) { search_.assign(piece, list.rows, list.count, nearest, within); });
    }

    /// The same among the groups of centroids in reach of the span. Where many rows need it, all take part, so that the reach
    /// becomes known anew.
    void search_within_reach(int piece, int64_t span, T own, Tasks& tasks) {
        RowList& list = tasks.all;
        Reach& reach = *search_.reach();
        float others;
        Within within = reach.within(piece, span, static_cast<float>(own), &others);
        const int64_t first = span * kSpanRows, count = span_end(span, a_.n) - first;
        const bool learns = 4 * list.count > 3 * count;
        if (learns) {
            reach.ask(piece, within);
            list.count = tasks.moved.count = tasks.rivals.count = tasks.far.count = 0;
            for (int64_t i = first; i < first + count; ++i) {
                list.rows[list.count] = i;
                list.count += !is_fixed(i);
            }
        }
        search_all(piece, list, &within);
        for (int64_t i = 0; i < list.count; ++i) gaps_[list.rows[i]] = std::min(gaps_[list.rows[i]], static_cast<T>(others));
        if (learns) reach.learn(span, within);
    }

    /// What is known of the rivals as of all others.
    void forget_rivals(int64_t row) {
        if (leads_[row] < gaps_[row]) gaps_[row] = leads_[row];
        leads_[row] = unknown();
        for (int32_t* of_rows : rivals_) of_rows[row] = nearest_[row];
    }

    /// What is kept of the rows from a position on.
    Nearest<T> kept(int64_t first, bool standing) const {
        return {nearest_ + first, scores_ + first, {rivals_[0] + first, rivals_[1] + first},
                leads_ + first,   gaps_ + first,   standing};
    }

    /// Labels of the rows of `list` by `search`, which is told what is `known`: where it is kept if nothing lies between them.
    template <class SearchRows>
    void search_rows(const RowList& list, bool known, const SearchRows& search) {
        if (list.count == 0) return;
        const int64_t* rows = list.rows;
        const bool with_rivals = kCertifies<T> && with_rivals_;
        if (rows[list.count - 1] - rows[0] == list.count - 1 && (with_rivals || !known)) return search(kept(rows[0], known));
        int32_t labels[kSpanRows], rivals[kRivals][kSpanRows];
        T scores[kSpanRows], leads[kSpanRows], gaps[kSpanRows];
        for (int64_t i = 0; known && i < list.count; ++i)
            labels[i] = nearest_[rows[i]], scores[i] = scores_[rows[i]], gaps[i] = gaps_[rows[i]];
        for (int64_t i = 0; known && with_rivals && i < list.count; ++i)
            leads[i] = leads_[rows[i]], rivals[0][i] = rivals_[0][rows[i]], rivals[1][i] = rivals_[1][rows[i]];
        const Nearest<T> found{labels, scores, {rivals[0], rivals[1]}, leads, gaps, known};
        for (int64_t i = 0; known && !with_rivals && i < list.count; ++i) found.without_rivals(i);
        search(found);
        for (int64_t i = 0; i < list.count; ++i)
            nearest_[rows[i]] = labels[i], scores_[rows[i]] = scores[i], gaps_[rows[i]] = gaps[i];
        for (int64_t i = 0; with_rivals && i < list.count; ++i)
            leads_[rows[i]] = leads[i], rivals_[0][rows[i]] = rivals[0][i], rivals_[1][rows[i]] = rivals[1][i];
    }

    /// How far the centroids moved, squared; with it, how far each of them did.
    double total_shift() {
        double shift = 0;
        moved_count_ = 0;
        most_ = second_most_ = 0;
        for (int64_t k = 0; k < a_.k; ++k) {
            shift += shifts_[k];
            if (shifts_[k] > 0) moved_[moved_count_++] = k;
            moves_[k] = kMore<T> * static_cast<T>(__builtin_sqrt(shifts_[k]));
            if (moves_[k] > most_)
                second_most_ = most_, most_ = moves_[k], farthest_ = static_cast<int32_t>(k);
            else if (moves_[k] > second_most_)
                second_most_ = moves_[k];
        }
        return shift;
    }

    /// Sums of all rows, or moved by the rows that changed; in the rows' own order. Where they are to lead to the centroids of
    /// fresh ones, spherical ones are fresh.
    void add_up(bool all, bool fresh) {
        all |= fresh && (sizeof(T) == sizeof(double) || a_.spherical);
        if (all || fresh) tell_labels();
        if (all) return sums_.add_up(labels_);
        list_changes();
        sums_.move({changes_, changes_ + change_count_});
        if (fresh) sums_.refresh(labels_, search_.largest_value());
    }

    void list_changes() {
        change_count_ = 0;
        int32_t differs[kSpanRows];
        RowList changed;
        for (int64_t span = 0; span < span_count(a_.n); ++span) {
            if (changed_[span] == 0) continue;
            const int64_t first = span * kSpanRows, count = span_end(span, a_.n) - first;
            for (int64_t i = 0; i < count; ++i) differs[i] = previous_[first + i] != nearest_[first + i];
            changed.list(differs, 1, first, count);
            for (int64_t c = 0; c < changed.count; ++c) {
                const int64_t i = changed.rows[c];
                changes_[change_count_++] = {search_.row(i), previous_[i], nearest_[i]};
            }
        }
        if (search_.arranged())
            std::sort(changes_, changes_ + change_count_, [](const Change& a, const Change& b) { return a.row < b.row; });
    }

    /// Moves the centroids of clusters with members.
    void update() {
        for_pieces(pieces_, a_.k, [&](int, int64_t first, int64_t last) {
            for (int64_t k = first; k < last; ++k) shifts_[k] = update_cluster(k);
        });
    }

    double update_cluster(int64_t k) {
        const double* sum = sums_.sum(k);
        T* c = centroids_ + k * a_.d;
        T* before = before_ + k * a_.d;
        for (int64_t j = 0; j < a_.d; ++j) before[j] = c[j];
        if (sums_.members(k) == 0) return 0;
        double divisor = sums_.weight(k);
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
            empty += sums_.members(k) == 0;
            if (sums_.weight(k) > sums_.weight(largest)) largest = k;
        }
        if (empty == 0) return;
        int64_t found = 0;
        for (int64_t i = 0; i < a_.n; ++i) {
            const int64_t row = search_.row(i);
            const bool free = fixed_ == nullptr || fixed_[row] < 0;
            if (nearest_[i] != largest || !free || !(sums_.row_weight(row) > 0)) continue;
            const double distance = squared_distance(x_ + row * a_.d, before_ + largest * a_.d, a_.d);
            if (distance > 0) candidates_[found++] = {distance, row};
        }
        const int64_t taken = empty < found ? empty : found;
        std::partial_sort(candidates_, candidates_ + taken, candidates_ + found);
        for (int64_t k = 0, next = 0; next < taken; ++k) {
            if (sums_.members(k) != 0) continue;
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
                    partial_[span] += static_cast<double>(sums_.row_weight(row)) *
                                      squared_distance(x_ + row * a_.d, centroids_ + labels_[row] * a_.d, a_.d);
            }
        });
        double sum = 0;
        for (int64_t span = 0; span < spans; ++span) sum += partial_[span];
        return sum;
    }

    const Lloyd<T>& a_;
    const int pieces_;
    T* before_;  // (K, D) centroids before the update
    ClusterSums<T> sums_;
    double* shifts_;  // (K)
    T* moves_;        // (K) how far the centroids moved last, at most
    int64_t* moved_;  // (moved_count_) the centroids that the last update moved
    // What is kept of each row stands by its position (Search::row).
    int64_t* far_;              // (far_count_) those that it moved far
    T* sorted_moves_;           // (K)
    T* scores_;                 // (N) Nearest's, of a centroid that stands where it stood; else unknown()
    int32_t* rivals_[kRivals];  // (N) Nearest's, as are
    T* leads_;                  // (N) and
    T* gaps_;                   // (N)
    double* moments_;           // (D)
    double* partial_;           // (spans)
    int32_t* nearest_;          // (N) labels
    int32_t* previous_;         // (N) labels before this pass
    int64_t* changed_;          // (spans) rows relabelled by this pass
    Change* changes_;           // (change_count_) in the rows' own order
    Candidate* candidates_;     // (N)
    Search<T> search_;

    const T* x_ = nullptr;
    const int64_t* fixed_ = nullptr;
    T* centroids_ = nullptr;
    int64_t* labels_ = nullptr;
    double limit_ = 0;
    int64_t passes_ = 0, moved_count_ = 0, far_count_ = 0, change_count_ = 0;
    int32_t farthest_ = 0;          // the centroid that moved farthest
    T most_ = 0, second_most_ = 0;  // how far it moved, at most, and all others
    T near_move_ = 0;               // how far all but the far movers moved; unknown() where none is searched by itself
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

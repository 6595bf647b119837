// The nearest centroids of one problem's rows, pass after pass, by whichever products cost least.
#pragma once

#include <algorithm>
#include <cmath>

#include "kmeans/certified.h"
#include "kmeans/nearest.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

/// Some of the centroids: all that moved, or those that moved far.
enum Moved { kMoved, kFar };

template <class T>
class Search {
   public:
    /// For `passes` passes at most over (n, d) rows and k centroids, shared by `pieces` threads.
    Search(int64_t n, int64_t k, int64_t d, int64_t passes, bool exact, int pieces, const Context& context)
        : n_(n),
          exact_(exact),
          pieces_(pieces),
          sums_(context.scratch<double>(d)),
          mean_(context.scratch<T>(d)),
          centres_(k, d, mean_, false, context),
          moved_(passes > 1 ? k : 0, d, mean_, true, context),
          assigners_(make_assigners<T>(pieces, d, context)) {
        // Quantising a row costs as much as its float products with some dozens of centroids.
        constexpr int64_t kWorthQuantising = 64;
        if constexpr (kCertifies<T>) {
            can_certify_ = d >= kLeastDepth && d <= quantised::kMaxDepth && k * (passes < 16 ? passes : 16) >= kWorthQuantising;
            constexpr int64_t kPassesWorthArranging = 4, kGroup = QuantisedCentres::kGroup;
            if (can_certify_ && passes >= kPassesWorthArranging && Reach::pays(n, k, kGroup))
                reach_ = new (context.scratch<Reach>(1)) Reach(n, k, d, kGroup, pieces, context);
            if (can_certify_) allocate_certified(context);
        }
    }

    /// Takes x, if it is finite: whether it is.
    bool set_rows(const T* x) {
        x_ = x;
        mean_of_rows(pieces_, x, n_, centres_.d, sums_, mean_);
        if (!std::all_of(mean_, mean_ + centres_.d, [](T value) { return std::isfinite(value); })) return false;
        prepare_rows(nullptr);
        restart();
        return true;
    }

    /// Forgets what earlier centroids were like.
    void restart() {
        if (arranged()) prepare_rows(nullptr);
        certify_ = can_certify_;
    }

    /// Whether the passes to come are worth arrange().
    bool wants_arranging() const { return certify_ && reach_ != nullptr && !arranged(); }

    /// Whether it has been done.
    bool arranged() const { return order_ != nullptr; }

    /// Sorts the rows by their labels, which come back in that order, for searches within reach.
    void arrange(const T* centroids, const int32_t* labels, int32_t* sorted) {
        if constexpr (kCertifies<T>) {
            reach_->arrange(centroids, labels, sorted);
            prepare_rows(reach_->rows());
            quantised_->ids = reach_->ids(), quantised_->columns = reach_->columns();
        }
    }

    /// What the score of row i's nearest centroid is at most after it moved by `move`: of r^2 = score + |x|^2, (r + move)^2 -
    /// |x|^2.
    T score_after(int64_t i, T score, T move) const {
        if constexpr (kCertifies<T>) {
            const float square = rows_->length(i) * rows_->length(i);
            const float distance = __builtin_sqrtf(score + square > 0 ? score + square : 0);
            return score + 1.00001f * (2 * distance + move) * move + 1e-6f * square;
        }
        return score;
    }

    /// Whether searches take place within reach.
    bool keeps_reach() const { return certify_ && arranged(); }

    /// The row at a position of the sorted rows; all other arguments named rows are positions.
    int64_t row(int64_t position) const { return order_ == nullptr ? position : order_[position]; }

    /// Before a pass: the centroids moved by `moves` (K) at most, or by no one knows what (null).
    void set_moves(const T* moves) {
        if constexpr (kCertifies<T>) {
            if (!keeps_reach()) return;
            if (moves == nullptr)
                reach_->forget();
            else
                reach_->move(moves);
        }
    }

    Reach* reach() { return reach_; }

    const T* mean() const { return mean_; }

    /// At least the magnitude of any feature of a row; infinite where it is not known.
    double largest_value() const {
        if constexpr (kCertifies<T>)
            if (can_certify_) {
                const float scale = *std::max_element(rows_->how.scales, rows_->how.scales + n_);
                float shift = 0;
                for (int64_t j = 0; j < centres_.d; ++j) shift = std::max(shift, std::abs(mean_[j]));
                return 1.001 * (127.0 * scale + shift);
            }
        return __builtin_inf();
    }

    /// Whether assign() tells rivals and leads; else gaps are those of all other centroids.
    bool keeps_rivals() const { return certify_ && centres_.k >= kLeastForRivals; }

    void set_centroids(const T* centroids) {
        if constexpr (kCertifies<T>)
            if (certify_) {
                for (int piece = 0; piece < pieces_; ++piece) scored_[piece] = searched_[piece] = 0;
                return quantised_->prepare(pieces_, centroids);
            }
        centres_.prepare(pieces_, centroids);
    }

    /// After set_centroids: those of a kind that assign_moved is to search, ascending.
    void set_moved(Moved which, const T* centroids, const int64_t* ids, int64_t count) {
        if constexpr (kCertifies<T>)
            if (certify_) return moved_quantised_[which].prepare(pieces_, centroids, ids, count);
        moved_.prepare(pieces_, centroids, ids, count);
    }

    /// The nearest centroids of rows[0 .. count), ascending; of those within reach, where that is given.
    void assign(int piece, const int64_t* rows, int64_t count, const Nearest<T>& nearest, Within* within = nullptr) {
        if constexpr (kCertifies<T>)
            if (certify_) {
                searched_[piece] += count * columns(centres_.k);
                scored_[piece] +=
                    certified_[piece].assign(*rows_, *quantised_, *quantised_, x_, rows, count, exact_, nearest, within);
                return;
            }
        assign(centres_, piece, rows, count, nearest);
    }

    /// The same for rows of which it is known that only a centroid of set_moved's can be nearer than the nearest of the last
    /// pass, whose score is known. Only where rivals are kept may there be two kinds.
    void assign_moved(int piece, Moved which, const int64_t* rows, int64_t count, const Nearest<T>& nearest) {
        if constexpr (kCertifies<T>)
            if (certify_) {
                const QuantisedCentres& moved = moved_quantised_[which];
                searched_[piece] += count * columns(moved.k);
                scored_[piece] += certified_[piece].assign(*rows_, moved, *quantised_, x_, rows, count, exact_, nearest);
                return;
            }
        assign(moved_, piece, rows, count, nearest);
    }

    /// The nearest of rows[0 .. count), ascending, among what was the nearest and its rivals: no other can be nearer.
    void assign_among_rivals(int piece, const int64_t* rows, int64_t count, const Nearest<T>& nearest) {
        if constexpr (kCertifies<T>) certified_[piece].assign_among_rivals(*rows_, *quantised_, x_, rows, count, nearest);
    }

    /// After a pass: goes over to float products where the bounds have left too much undecided to pay; true then, and the
    /// scores found so far are no longer such as the next pass's, nor will there be rivals.
    bool adapt() {
        if constexpr (kCertifies<T>) {
            if (!certify_) return false;
            double scored = 0, searched = 0;
            for (int piece = 0; piece < pieces_; ++piece) {
                scored += static_cast<double>(scored_[piece]);
                searched += static_cast<double>(searched_[piece]);
            }
            const auto d = static_cast<double>(centres_.d);
            certify_ = scored * (d + 256) / 8 <= searched * d / 32 * 0.75;  // cycles, roughly
            return !certify_;
        }
        return false;
    }

   private:
    /// What float products would take for k centroids.
    static int64_t columns(int64_t k) { return products::panel_count<T>(k) * products::kWidth<T>; }

    void assign(const Centres<T>& centres, int piece, const int64_t* rows, int64_t count, const Nearest<T>& nearest) {
        int64_t block[kBlockRows];
        for (int64_t first = 0; first < count; first += kBlockRows) {
            const int64_t size = count - first < kBlockRows ? count - first : kBlockRows;
            for (int64_t i = 0; i < size; ++i) block[i] = row(rows[first + i]);
            assigners_[piece].assign(centres, x_, block, size, nearest.from(first));
        }
    }

    /// Quantises the rows in the order given, their own if null.
    void prepare_rows(const int64_t* order) {
        order_ = order;
        if constexpr (kCertifies<T>)
            if (can_certify_) {
                rows_->prepare(pieces_, x_, mean_, order);
                quantised_->ids = nullptr, quantised_->columns = nullptr;
            }
    }

    void allocate_certified(const Context& context) {
        const int64_t d = centres_.d;
        rows_ = new (context.scratch<QuantisedRows>(1)) QuantisedRows(n_, d, reach_ != nullptr, pieces_, context);
        quantised_ = new (context.scratch<QuantisedCentres>(1)) QuantisedCentres(centres_.k, d, mean_, context);
        moved_quantised_ = context.scratch<QuantisedCentres>(2);
        new (moved_quantised_ + kMoved) QuantisedCentres(moved_.k, d, mean_, context);
        new (moved_quantised_ + kFar) QuantisedCentres(moved_.k / 4 + 1, d, mean_, context);
        scored_ = context.scratch<int64_t>(pieces_);
        searched_ = context.scratch<int64_t>(pieces_);
        certified_ = context.scratch<CertifiedAssigner<T>>(pieces_);
        for (int piece = 0; piece < pieces_; ++piece) new (certified_ + piece) CertifiedAssigner<T>(centres_.k, d, context);
    }

    const int64_t n_;
    const bool exact_;
    const int pieces_;
    double* sums_;  // (D)
    T* mean_;       // (D)
    Centres<T> centres_, moved_;
    BlockAssigner<T>* assigners_;
    const T* x_ = nullptr;

    const int64_t* order_ = nullptr;  // (N) the row at each position; null: each at its own
    Reach* reach_ = nullptr;          // null where it does not pay

    bool can_certify_ = false, certify_ = false;
    QuantisedRows* rows_ = nullptr;
    QuantisedCentres *quantised_ = nullptr, *moved_quantised_ = nullptr;
    CertifiedAssigner<T>* certified_ = nullptr;
    int64_t* scored_ = nullptr;    // float scores of this pass, per piece
    int64_t* searched_ = nullptr;  // pairs of this pass, as float products would take them, per piece
};

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

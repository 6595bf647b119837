// The nearest centroids of one problem's rows, pass after pass, by whichever products cost least.
#pragma once

#include "kmeans/certified.h"
#include "kmeans/nearest.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

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
            if (can_certify_) allocate_certified(context);
        }
    }

    void set_rows(const T* x) {
        x_ = x;
        mean_of_rows(pieces_, x, n_, centres_.d, sums_, mean_);
        if constexpr (kCertifies<T>)
            if (can_certify_) rows_->prepare(pieces_, x, mean_);
        restart();
    }

    /// Forgets what earlier centroids were like.
    void restart() { certify_ = can_certify_; }

    const T* mean() const { return mean_; }

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

    /// After set_centroids: those that assign_moved is to search, ascending.
    void set_moved(const T* centroids, const int64_t* ids, int64_t count) {
        if constexpr (kCertifies<T>)
            if (certify_) return moved_quantised_->prepare(pieces_, centroids, ids, count);
        moved_.prepare(pieces_, centroids, ids, count);
    }

    /// The nearest centroids of rows[0 .. count), ascending.
    void assign(int piece, const int64_t* rows, int64_t count, const Nearest<T>& nearest) {
        if constexpr (kCertifies<T>)
            if (certify_) {
                searched_[piece] += count * columns(centres_.k);
                scored_[piece] += certified_[piece].assign(*rows_, *quantised_, *quantised_, x_, rows, count, exact_, nearest);
                return;
            }
        assign(centres_, piece, rows, count, nearest);
    }

    /// The same for rows whose nearest centroid of the last pass stands where it stood: only one that has moved can be nearer.
    void assign_moved(int piece, const int64_t* rows, int64_t count, const Nearest<T>& nearest) {
        if constexpr (kCertifies<T>)
            if (certify_) {
                searched_[piece] += count * columns(moved_quantised_->k);
                scored_[piece] +=
                    certified_[piece].assign(*rows_, *moved_quantised_, *quantised_, x_, rows, count, exact_, nearest);
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
        for (int64_t first = 0; first < count; first += kBlockRows) {
            const int64_t size = count - first < kBlockRows ? count - first : kBlockRows;
            assigners_[piece].assign(centres, x_, rows + first, size, nearest.from(first));
        }
    }

    void allocate_certified(const Context& context) {
        const int64_t d = centres_.d;
        rows_ = new (context.scratch<QuantisedRows>(1)) QuantisedRows(n_, d, pieces_, context);
        quantised_ = new (context.scratch<QuantisedCentres>(1)) QuantisedCentres(centres_.k, d, mean_, context);
        moved_quantised_ = new (context.scratch<QuantisedCentres>(1)) QuantisedCentres(moved_.k, d, mean_, context);
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

    bool can_certify_ = false, certify_ = false;
    QuantisedRows* rows_ = nullptr;
    QuantisedCentres *quantised_ = nullptr, *moved_quantised_ = nullptr;
    CertifiedAssigner<T>* certified_ = nullptr;
    int64_t* scored_ = nullptr;    // float scores of this pass, per piece
    int64_t* searched_ = nullptr;  // pairs of this pass, as float products would take them, per piece
};

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

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
          centres_(k, d, mean_, context),
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

    void set_centroids(const T* centroids) {
        if constexpr (kCertifies<T>)
            if (certify_) {
                for (int piece = 0; piece < pieces_; ++piece) scored_[piece] = searched_[piece] = 0;
                return quantised_->prepare(pieces_, centroids);
            }
        centres_.prepare(pieces_, centroids);
    }

    /// Labels and gaps of rows[0 .. count), ascending: see BlockAssigner.
    void assign(int piece, const int64_t* rows, int64_t count, int64_t* labels, T* gaps) {
        if constexpr (kCertifies<T>)
            if (certify_) {
                searched_[piece] += count;
                scored_[piece] += certified_[piece].assign(*rows_, *quantised_, x_, rows, count, exact_, labels, gaps);
                return;
            }
        for (int64_t first = 0; first < count; first += kBlockRows) {
            const int64_t size = count - first < kBlockRows ? count - first : kBlockRows;
            assigners_[piece].assign(centres_, x_, rows + first, size, labels + first, gaps + first);
        }
    }

    /// After a pass: goes over to float products where the bounds have left too much undecided to pay.
    void adapt() {
        if constexpr (kCertifies<T>) {
            if (!certify_) return;
            double scored = 0, searched = 0;
            for (int piece = 0; piece < pieces_; ++piece) {
                scored += static_cast<double>(scored_[piece]);
                searched += static_cast<double>(searched_[piece]);
            }
            const auto d = static_cast<double>(centres_.d);
            const auto columns = static_cast<double>(products::panel_count<T>(centres_.k) * products::kWidth<T>);
            certify_ = scored * (d + 256) / 8 < searched * columns * d / 32 * 0.75;  // cycles, roughly
        }
    }

   private:
    void allocate_certified(const Context& context) {
        const int64_t d = centres_.d;
        rows_ = new (context.scratch<QuantisedRows>(1)) QuantisedRows(n_, d, pieces_, context);
        quantised_ = new (context.scratch<QuantisedCentres>(1)) QuantisedCentres(centres_.k, d, mean_, context);
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
    Centres<T> centres_;
    BlockAssigner<T>* assigners_;
    const T* x_ = nullptr;

    bool can_certify_ = false, certify_ = false;
    QuantisedRows* rows_ = nullptr;
    QuantisedCentres* quantised_ = nullptr;
    CertifiedAssigner<T>* certified_ = nullptr;
    int64_t* scored_ = nullptr;    // float scores of this pass, per piece
    int64_t* searched_ = nullptr;  // rows of this pass, per piece
};

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

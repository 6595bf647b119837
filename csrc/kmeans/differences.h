// |x - c|^2 as k-means++ knows it: of one row c, or of several at once. Both give the same bits.
#pragma once

#include "common/lanes.h"
#include "kmeans/nearest.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

namespace lanes = fastclust::lanes::FASTCLUST_CAPABILITY;

constexpr int kCandidateLanes = 8;  // candidates that are measured at once

/// One number of each.
template <class T>
struct OfCandidates {
    typedef T type __attribute__((vector_size(kCandidateLanes * sizeof(T)), may_alias));
};
template <class T>
using CandidateVector = typename OfCandidates<T>::type;

/// Features before the tail, which is added one by one.
template <class T>
inline int64_t whole_vectors(int64_t d) {
    return d / (2 * products::kLanes<T>)*(2 * products::kLanes<T>);
}

/// Of Count rows c, the sum over whole vectors.
template <class T, int Count>
inline void square_whole_vectors(const T* x, const T* const* c, int64_t whole, T* out) {
    constexpr int kLanes = products::kLanes<T>;
    typedef T Unaligned __attribute__((vector_size(products::kVectorBytes), aligned(sizeof(T)), may_alias));
    Unaligned even[Count] = {}, odd[Count] = {};
    for (int64_t j = 0; j < whole; j += 2 * kLanes) {
        const Unaligned low = *reinterpret_cast<const Unaligned*>(x + j);
        const Unaligned high = *reinterpret_cast<const Unaligned*>(x + j + kLanes);
#pragma GCC unroll 4
        for (int l = 0; l < Count; ++l) {
            const Unaligned left = low - *reinterpret_cast<const Unaligned*>(c[l] + j);
            const Unaligned right = high - *reinterpret_cast<const Unaligned*>(c[l] + j + kLanes);
            even[l] += left * left;
            odd[l] += right * right;
        }
    }
#pragma GCC unroll 4
    for (int l = 0; l < Count; ++l) {
        const products::Vector<T> both = even[l] + odd[l];
        out[l] = lanes::sum(both);
    }
}

/// Exactly zero where the rows are equal.
template <class T>
inline T squared_difference(const T* x, const T* c, int64_t d) {
    T sum;
    square_whole_vectors<T, 1>(x, &c, whole_vectors<T>(d), &sum);
    for (int64_t j = whole_vectors<T>(d); j < d; ++j) sum += (x[j] - c[j]) * (x[j] - c[j]);
    return sum;
}

/// Up to kCandidateLanes rows ready to be measured at once.
template <class T>
class CandidateRows {
   public:
    CandidateRows(int64_t d, const Context& context)
        : d_(d), whole_(whole_vectors<T>(d)), tails_(context.scratch<T>((d - whole_) * kCandidateLanes)) {}

    int count() const { return count_; }
    const T* row(int l) const { return rows_[l]; }

    /// The rows ids[0 .. count) of x.
    void set(const T* x, const int64_t* ids, int64_t count) {
        count_ = static_cast<int>(count);
        for (int l = 0; l < kCandidateLanes; ++l) {
            rows_[l] = x + ids[l < count_ ? l : 0] * d_;
            for (int64_t j = whole_; j < d_; ++j) tails_[(j - whole_) * kCandidateLanes + l] = rows_[l][j];
        }
    }

    /// |x - c|^2 of each, infinite in the lanes beyond.
    void measure(const T* x, CandidateVector<T>& squares) const {
        alignas(64) T sums[kCandidateLanes] = {};
        for (int l = 0; whole_ > 0 && l < count_; l += 4) switch (count_ - l) {
                case 1:
                    square_whole_vectors<T, 1>(x, rows_ + l, whole_, sums + l);
                    break;
                case 2:
                    square_whole_vectors<T, 2>(x, rows_ + l, whole_, sums + l);
                    break;
                case 3:
                    square_whole_vectors<T, 3>(x, rows_ + l, whole_, sums + l);
                    break;
                default:
                    square_whole_vectors<T, 4>(x, rows_ + l, whole_, sums + l);
            }
        for (int l = count_; l < kCandidateLanes; ++l) sums[l] = static_cast<T>(__builtin_inf());
        squares = *reinterpret_cast<const CandidateVector<T>*>(sums);
        const auto* tails = reinterpret_cast<const CandidateVector<T>*>(tails_);
        for (int64_t j = whole_; j < d_; ++j, ++tails) squares += (x[j] - *tails) * (x[j] - *tails);
    }

   private:
    const int64_t d_, whole_;
    int count_ = 0;
    const T* rows_[kCandidateLanes] = {};
    T* tails_;  // (D - whole, kCandidateLanes)
};

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

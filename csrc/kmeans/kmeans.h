// Lloyd's k-means (Lloyd 1982) over a batch of problems and restarts, and k-means++ seeding (Arthur & Vassilvitskii 2007)
// with greedy candidates (Celebi et al. 2013). Every array is row-major and contiguous; S is what rows are stored as, T what
// is computed in.
//
// Exactness: a label may differ from the true nearest centroid only where float arithmetic of type T cannot tell the two
// apart. `exact` allows the kernels cheaper products when each decision they take is certified by an error bound; without it
// they may skip the certificate. The same inputs give the same bits, whatever the number of threads.
#pragma once

#include <cstdint>

#include "common/context.h"
#include "common/kernels.h"

namespace fastclust::kmeans {

/// Nearest centroid of each row.
template <class S>
struct Assign {
    using T = Computed<S>;
    int64_t batch, n, k, d;
    const S* x;          // (B, N, D) finite
    const T* centroids;  // (B, K, D) finite
    bool exact;
    int64_t* labels;  // (B, N) out: argmin_k |x - c_k|^2, the lowest k where several are equal
    T* distances;     // (B, N) out: the squared distance to it, summed over (x - c)^2
};

/// Lloyd's iteration from R starts per problem. One iteration, for each problem and restart by itself:
///   1. assign: labels[i] = fixed_labels[i] where that is >= 0, else argmin_k |x_i - c_k|^2;
///   2. from the second iteration on, stop where no label changed: n_iter counts this iteration, c stays as it is;
///   3. update: c_k = sum_i w_i x_i / sum_i w_i over its rows of positive weight; spherical: that sum divided by its norm
///      (c_k stays where the sum is zero);
///   4. clusters without a row of positive weight, in ascending order, are put on the rows of the largest cluster (by
///      weight; the lowest of equals) that lie farthest from its centroid of step 1: the e-th such cluster on the e-th
///      farthest row, the lowest row of equals. Only free rows of positive weight at a distance above zero are taken; when
///      they run out, the remaining empty clusters keep their centroid. The rows taken still count for their old cluster;
///   5. stop where sum_k |c_k - c_k before|^2 <= tol * mean_j var_j(x), the variance over rows without weights.
/// After max_iter iterations, or a stop at 5, the labels are assigned once more, so that they belong to `centroids`.
template <class S>
struct Lloyd {
    using T = Computed<S>;
    int64_t batch, restarts, n, k, d;
    const S* x;                   // (B, N, D) finite (CPU kernels give problems where it is not an inertia of NaN, no more); of
                                  // unit norm when spherical
    const T* init;                // (B, R, K, D) finite; of unit norm when spherical
    const T* sample_weight;       // (B, N) finite and >= 0, or null for ones
    const int64_t* fixed_labels;  // (B, N) in [-1, K), -1 for free rows, or null where all are free
    int64_t max_iter;             // >= 0
    double tol;                   // >= 0
    bool spherical;
    bool exact;
    T* centroids;     // (B, R, K, D) out
    int64_t* labels;  // (B, R, N) out
    T* inertia;       // (B, R) out: sum_i w_i |x_i - c_label(i)|^2, summed over (x - c)^2 in double
    int64_t* n_iter;  // (B, R) out
};

/// D^2 sampling of K rows. With F_i the prefix sums of the rows' masses m_i, a uniform u picks the lowest row with
/// F_i > u * sum m. Pick 0 takes m = w and uniforms[0][0] alone; pick p > 0 takes m_i = w_i min_{q<p} |x_i - x_q|^2, draws one
/// candidate per uniform of uniforms[p] and keeps the one that leaves the least sum_i m_i, the first of equals. Where all
/// masses are zero (fewer distinct rows than K) the pick takes m = w and uniforms[p][0].
template <class S>
struct PlusPlus {
    using T = Computed<S>;
    int64_t batch, restarts, n, k, d, candidates;
    const S* x;              // (B, N, D) finite
    const T* sample_weight;  // (B, N) finite, >= 0, not all zero; or null for ones
    const T* uniforms;       // (B, R, K, L) in [0, 1)
    int64_t* rows;           // (B, R, K) out
};

template <class S>
struct Kernels {
    void (*assign)(const Assign<S>&, const Context&);
    void (*lloyd)(const Lloyd<S>&, const Context&);
    void (*plus_plus)(const PlusPlus<S>&, const Context&);
};

FASTCLUST_DECLARE_KERNELS

}  // namespace fastclust::kmeans

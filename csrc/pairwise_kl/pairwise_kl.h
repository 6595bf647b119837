// The pairwise contrastive loss of ClusterNet (eqs. 6, 7; Hsu & Kira 2016) over all pairs of rows of a batch.
//
// Rows p_i = exp(log_p_i); KL_ij = sum_k p_ik (log p_ik - log p_jk). Over ordered pairs i != j of rows with labels >= 0:
//   means[0] = mean over similar pairs    (equal labels)     of KL_ij + KL_ji
//   means[1] = mean over dissimilar pairs (different labels) of [m - KL_ij]+ + [m - KL_ji]+
// and 0 where there is no such pair. Ordered or unordered, the means are the same.
// log p = -inf is probability 0: 0 log 0 = 0, and KL_ij = inf where p_i is positive and p_j is not.
//
// Similar pairs need no pair at all: with the mean p', l' of p and log p over a group of n equal labels,
//   sum over i < j of KL_ij + KL_ji = n sum_i sum_k (p_ik - p'_k) (log p_ik - l'_k).
// With G_ij = d loss / d KL_ij, which is one number for all similar pairs and another for all dissimilar ones within the
// margin, the gradient is two products with G, and only the second where the first argument is fixed:
//   grad_ik = p_ik ((log p_ik + 1) sum_j G_ij - sum_j G_ij log p_jk) - sum_j G_ji p_jk.
#pragma once

#include <cstdint>

#include "common/context.h"
#include "common/finite.h"
#include "common/kernels.h"

namespace fastclust::pairwise_kl {

/// B is the number of rows, K of clusters.
template <class T>
struct Batch {
    int64_t b, k;
    const T* log_p;         // (B, K)
    const int64_t* labels;  // (B) -1: in no pair
    T margin;
};

template <class T>
struct Loss {
    Batch<T> batch;
    bool detach_target;  // hold the first argument of each KL fixed in the gradient
    T* loss;             // (1) out: the sum of both means
    T* grad_log_p;       // (B, K) out: its gradient; null: not wanted
};

/// What is wrong with a batch: rows of log_p that hold NaN or +inf, and labels below -1.
struct Findings {
    finite::BadRows log_p, labels;
};

template <class T>
struct Kernels {
    /// Waits for the device.
    Findings (*inspect)(const Batch<T>&, const Context&);
    void (*loss)(const Loss<T>&, const Context&);
};

FASTCLUST_DECLARE_KERNELS

}  // namespace fastclust::pairwise_kl

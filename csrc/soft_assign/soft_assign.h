// Soft assignment to centroids (ClusterNet, eq. 16): log p_nk = -|x_n - mu_k|^2 - log sum_l exp(-|x_n - mu_l|^2).
#pragma once

#include <cstdint>

#include "common/context.h"
#include "common/kernels.h"

namespace fastclust::soft_assign {

template <class T>
struct Forward {
    int64_t n, k, d;
    const T* x;          // (N, D)
    const T* centroids;  // (K, D)
    T* log_p;            // (N, K) out
};

/// With t_nk = g_nk - p_nk sum_l g_nl, the gradient in -|x_n - mu_k|^2:
/// grad_x_n = 2 sum_k t_nk (mu_k - x_n), grad_mu_k = 2 sum_n t_nk (x_n - mu_k).
template <class T>
struct Backward {
    int64_t n, k, d;
    const T* grad;       // (N, K) in log_p
    const T* x;          // (N, D)
    const T* centroids;  // (K, D)
    const T* log_p;      // (N, K)
    T* grad_x;           // (N, D) out
    T* grad_centroids;   // (K, D) out
};

template <class T>
struct Kernels {
    /// Distances are sums of squared differences, never |x|^2 - 2 x.mu + |mu|^2: data far from the origin keep their digits.
    void (*forward)(const Forward<T>&, const Context&);
    void (*backward)(const Backward<T>&, const Context&);
};

FASTCLUST_DECLARE_KERNELS

}  // namespace fastclust::soft_assign

// Lloyd's k-means (Lloyd 1982) over a batch of problems and restarts, k-means++ seeding (Arthur & Vassilvitskii 2007).
#pragma once

#include <cstdint>

#include "common/context.h"
#include "common/kernels.h"

namespace fastclust::kmeans {

template <class T>
struct Assign {
    int64_t batch, n, k, d;
    const T* x;          // (B, N, D)
    const T* centroids;  // (B, K, D)
    bool exact;
    int64_t* labels;  // (B, N) out: argmin_k |x - c_k|^2, the lowest k where several are equal
    T* distances;     // (B, N) out: the squared distance to it
};

template <class T>
struct Kernels {
    void (*assign)(const Assign<T>&, const Context&);
};

FASTCLUST_DECLARE_KERNELS

}  // namespace fastclust::kmeans

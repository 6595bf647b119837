// What the CUDA sources of this room share.
#pragma once

#include "common/cuda.h"
#include "pairwise_kl/pairwise_kl.h"

namespace fastclust::pairwise_kl::cuda {

/// Rows of equal labels. Their part of the loss and of the gradient needs no pair, only their means (pairwise_kl.h).
struct Groups {
    int64_t* leader;            // (B) the lowest row of the same label, -1 where a row is in no pair
    int64_t* size;              // (B) rows of the same label, 0 where a row is in no pair
    double* mean_p;             // (B, K) at leaders
    double* mean_log;           // (B, K) at leaders; -inf where a row that has no such part meets one that has
    double* spread;             // (B) n sum_k (p_k - p'_k) (log p_k - l'_k): what a row adds to its group's sum over pairs
    unsigned long long* pairs;  // (2) ordered similar pairs; rows that are in pairs
};

Groups find_groups(const Batch<float>& a, const Context& context);

/// Unordered pairs of equal and of different labels.
struct Pairs {
    double similar, dissimilar;
};
__device__ inline Pairs count_pairs(const Groups& groups) {
    const double similar = double(groups.pairs[0]) / 2, rows = double(groups.pairs[1]);
    return {similar, rows * (rows - 1) / 2 - similar};
}

/// Whether there are pairs enough for products of whole tiles.
template <class T>
bool wants_products(const Batch<T>& a) {
    return sizeof(T) == sizeof(float) && a.b >= 128 && a.k > 0;
}

/// The loss by products on the tensor cores, for `panel` rows at a time: 4 * panel * B bytes of scratch.
void loss_by_products(const Loss<float>& a, int64_t panel, const Context& context);

}  // namespace fastclust::pairwise_kl::cuda

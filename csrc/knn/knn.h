// Exact k nearest neighbours and the affinity graph made of them (Iscen et al. 2019, section 3.1, use such a graph).
//
// Every backend ranks by one score, higher is better, of the rows as they are prepared:
//     cosine          x_i . x_j of the rows divided by their norms (a zero row stays zero)
//     inner_product   x_i . x_j
//     euclidean       -|x_i - x_j|^2 / 2
// Rows of equal score are ranked by ascending index. S is what rows are stored as, T what is computed in.
#pragma once

#include <cstdint>

#include "common/context.h"
#include "common/kernels.h"

namespace fastclust::knn {

enum class Metric { cosine, inner_product, euclidean };
enum class Symmetrize { none, sum, mean, max };

template <class S>
struct Search {
    using T = Computed<S>;
    int64_t n, m, k, d;  // M = N where queries is null
    const S* x;          // (N, D) finite
    const S* queries;    // (M, D) finite, or null: the rows of x look for each other, none finds itself
    Metric metric;
    bool exact;        // false: the filter's error is taken as random, not as at its bound
    T* values;         // (M, k) out, best first: similarity, descending, or distance, ascending
    int64_t* indices;  // (M, k) out
};

/// Where the CSR entries go: asked for once, when their number E is known.
template <class T>
struct Edges {
    int64_t* col;  // (E) ascending in each row
    T* weights;    // (E)
};

/// W_ij = max(similarity, 0)^power for j among the neighbours of i, then none: W, sum: W + W^T, mean: half of it,
/// max: the greater of W_ij and W_ji. Entries of weight zero are left out.
template <class T>
struct Graph {
    int64_t n, k;
    const T* similarities;   // (N, k)
    const int64_t* indices;  // (N, k) in [0, N), none twice in a row, none its own row
    double power;
    Symmetrize symmetrize;
    int64_t* crow;  // (N + 1) out
    void* owner;
    Edges<T> (*allocate)(void* owner, int64_t count);
};

template <class S>
struct Kernels {
    void (*search)(const Search<S>&, const Context&);
    void (*graph)(const Graph<Computed<S>>&, const Context&);
};

FASTCLUST_DECLARE_KERNELS

}  // namespace fastclust::knn

// What the CUDA sources of this room share. S is what rows are stored as, T what is computed in. A group is one restart of one
// problem; groups are numbered problem by problem.
#pragma once

#include "common/half_tile_cuda.h"
#include "kmeans/kmeans.h"

namespace fastclust::kmeans::cuda {

/// Where a group stands. The device alone decides, so that the host need not wait for it.
enum Phase : int32_t { kRunning, kSettled, kMoved };  // kSettled: labels belong to the centroids; kMoved: assign once more

struct Group {
    unsigned long long changed;  // labels that the latest assignment changed
    int64_t iterations;
    int32_t phase;
};

/// The sums of the clusters' rows, kept from iteration to iteration; sums_cuda.h has their meaning.
struct Sums {
    static constexpr int kParts = 3;
    unsigned long long* totals;  // (groups, kParts, K, width), two's complement; null: not wanted
    const double* units;         // (B, width)
    int64_t width;               // D + 1
    double next_part;            // 2^bits
};

template <class S>
struct Assignment {
    using T = Computed<S>;
    int64_t groups, restarts, n, k, d;
    const S* x;                   // (groups / restarts, N, D)
    const T* centroids;           // (groups, K, D)
    const T* sample_weight;       // (groups / restarts, N), or null for ones
    const int64_t* fixed_labels;  // (groups / restarts, N), -1 for free rows, or null
    bool exact;
    int64_t* labels;  // (groups, N) out, and in where `group` is given: the labels before
    T* distances;     // (groups, N) out, or null
    Group* group;     // (groups) or null: only groups in phase `phase` are assigned, changes counted and summed
    Phase phase;
    Sums sums;

    __host__ __device__ int64_t problem(int64_t g) const { return g / restarts; }
    __device__ bool skips(int64_t g) const { return group != nullptr && group[g].phase != phase; }
    __device__ int64_t fixed_label(int64_t g, int64_t row) const {
        return fixed_labels == nullptr ? -1 : fixed_labels[problem(g) * n + row];
    }
};

/// Rows of a group that are assigned instead of all, where `rows` is not null.
struct Listed {
    int64_t* rows;              // (groups, N)
    unsigned long long* count;  // (groups)
};

/// a.distances from a.labels.
template <class S>
void measure_rows(const Assignment<S>& a, const Context& context);

/// Sums (x - c)^2 itself for every pair: nothing cancels and there is nothing to certify.
template <class S>
void assign_directly(const Assignment<S>& a, const Listed& listed, const Context& context);

/// The tensor cores' way: products of rows in half precision decide every label whose margin exceeds the bound of their error,
/// and leave the others to assign_directly. Prepared once for as many assignments of the same x as come.
struct Filter {
    const float* shift;              // (B, D) taken off rows and centroids alike
    const fastclust::cuda::Half* x;  // (B, N, padded D)
    const fastclust::cuda::RowInfo* x_info;
    fastclust::cuda::Half* centroids;  // (groups, K, padded D)
    fastclust::cuda::RowInfo* centroid_info;
    float2* columns;  // (groups, padded K) |c - shift|^2 and twice the factor
    Listed undecided;
};

/// Whether there is a filter for rows stored as S: where float is computed in.
template <class S>
constexpr bool kFilters = std::is_same_v<Computed<S>, float>;

/// Whether `a` is worth a filter: small products are done before it would be ready.
template <class S>
bool wants_filter(const Assignment<S>& a) {
    return kFilters<S> && a.k >= 2 && a.d >= 16;
}

template <class S>
Filter prepare_filter(const Assignment<S>& a, const Context& context);
template <class S>
void assign_filtered(const Assignment<S>& a, const Filter& filter, const Context& context);

/// Assigns by the filter where one was prepared.
template <class S>
void assign_rows(const Assignment<S>& a, const Filter* filter, const Context& context) {
    if constexpr (kFilters<S>) {
        if (filter != nullptr) return assign_filtered(a, *filter, context);
    }
    assign_directly(a, {}, context);
}

/// variances (B): the mean over columns of the variance over rows, without weights.
template <class S>
void mean_variances(const Lloyd<S>& a, double* variances, const Context& context);

/// Sums of no rows.
template <class S>
Sums prepare_sums(const Lloyd<S>& a, const Context& context);

template <class S>
void lloyd(const Lloyd<S>& a, const Context& context);

template <class S>
void plus_plus(const PlusPlus<S>& a, const Context& context);

}  // namespace fastclust::kmeans::cuda

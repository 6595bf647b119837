// What the CUDA sources of this room share. A group is one restart of one problem; groups are numbered problem by problem.
#pragma once

#include "common/cuda.h"
#include "kmeans/kmeans.h"

namespace fastclust::kmeans::cuda {

/// Where a group stands. The device alone decides, so that the host need not wait for it.
enum Phase : int32_t { kRunning, kSettled, kMoved };  // kSettled: labels belong to the centroids; kMoved: assign once more

struct Group {
    unsigned long long changed;  // labels that the latest assignment changed
    int64_t iterations;
    int32_t phase;
};

template <class T>
struct Assignment {
    int64_t groups, restarts, n, k, d;
    const T* x;                   // (groups / restarts, N, D)
    const T* centroids;           // (groups, K, D)
    const int64_t* fixed_labels;  // (groups / restarts, N), -1 for free rows, or null
    bool exact;
    int64_t* labels;  // (groups, N) out, and in where `group` is given: the labels before
    T* distances;     // (groups, N) out
    Group* group;     // (groups) or null: only groups in phase `phase` are assigned, changes counted
    Phase phase;
};

template <class T>
void assign_rows(const Assignment<T>& a, const Context& context);

template <class T>
void lloyd(const Lloyd<T>& a, const Context& context);

template <class T>
void plus_plus(const PlusPlus<T>& a, const Context& context);

}  // namespace fastclust::kmeans::cuda

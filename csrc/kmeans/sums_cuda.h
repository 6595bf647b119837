// The clusters' sums as whole numbers: no order of adding changes them, so each row that changes cluster is taken off one sum
// and added to another by integer atomics, in any order, and the sums of any iteration are to the bit those of a fresh start.
//
// A value v of a column whose greatest is below 2^e is v 2^(bits - e) = q_0 + q_1 2^-bits + q_2 2^(-2 bits) + ..., each q whole
// and at most 2^bits. Three are kept, the later ones hardly ever needed: a float has 24 bits, and q_0 holds 41 of them where
// there are a million rows.
#pragma once

#include <cmath>

#include "kmeans/kmeans_cuda.h"

namespace fastclust::kmeans::cuda {

/// A row that changed its cluster; `from` is -1 where it had none.
struct Moved {
    int64_t row;
    int32_t from, to;
};

/// Adds v, one of column `column`, to cluster `to` and takes it off `from`.
__device__ inline void move_value(const Sums& s, int64_t g, int64_t problem, int64_t k, int64_t column, double v, int32_t from,
                                  int32_t to) {
    double left = v * s.units[problem * s.width + column];
    unsigned long long* totals = s.totals + g * Sums::kParts * k * s.width + column;
    for (int part = 0; part < Sums::kParts && left != 0; ++part, totals += k * s.width) {
        const auto whole = static_cast<long long>(llrint(left));
        atomicAdd(&totals[to * s.width], static_cast<unsigned long long>(whole));
        if (from >= 0) atomicAdd(&totals[from * s.width], static_cast<unsigned long long>(-whole));
        left = (left - double(whole)) * s.next_part;
    }
}

/// Moves `count` rows between the sums of group g; the whole block calls. Neighbouring threads take neighbouring columns.
template <class S>
__device__ void move_rows(const Assignment<S>& a, int64_t g, const Moved* moved, int count) {
    if (a.sums.totals == nullptr) return;
    int columns = static_cast<int>(blockDim.x);
    while (columns / 2 >= a.d) columns /= 2;
    const int lanes = static_cast<int>(blockDim.x) / columns, column = static_cast<int>(threadIdx.x) % columns;
    const int64_t problem = a.problem(g);
    for (int i = static_cast<int>(threadIdx.x) / columns; i < count; i += lanes) {
        const auto [row, from, to] = moved[i];
        const S* x = a.x + (problem * a.n + row) * a.d;
        const double weight = a.sample_weight == nullptr ? 1.0 : double(a.sample_weight[problem * a.n + row]);
        for (int64_t c = column; c < a.d; c += columns) move_value(a.sums, g, problem, a.k, c, weight * double(x[c]), from, to);
        if (column == 0) move_value(a.sums, g, problem, a.k, a.d, weight, from, to);
    }
}

/// Labels a row, and notes it in the block's list where that is a change.
template <class S>
__device__ void note_label(const Assignment<S>& a, int64_t g, int64_t row, int64_t label, Moved* moved, int& changed) {
    const int64_t at = g * a.n + row;
    if (a.group != nullptr) {
        if (a.labels[at] == label) return;
        moved[atomicAdd(&changed, 1)] = {row, static_cast<int32_t>(a.labels[at]), static_cast<int32_t>(label)};
    }
    a.labels[at] = label;
}

/// Counts and moves what the whole block has noted; the whole block calls.
template <class S>
__device__ void move_noted(const Assignment<S>& a, int64_t g, const Moved* moved, const int& changed) {
    __syncthreads();
    if (changed == 0) return;
    if (threadIdx.x == 0) atomicAdd(&a.group[g].changed, static_cast<unsigned long long>(changed));
    move_rows(a, g, moved, changed);
}

/// Column `column` of cluster `cluster`: sum_i w_i x_i, or sum_i w_i in the last column.
__device__ inline double sum_of(const Sums& s, int64_t g, int64_t problem, int64_t k, int64_t cluster, int64_t column) {
    const unsigned long long* totals = s.totals + (g * Sums::kParts * k + cluster) * s.width + column;
    double sum = 0;
    for (int part = Sums::kParts - 1; part >= 0; --part)
        sum = sum / s.next_part + double(static_cast<long long>(totals[part * k * s.width]));
    return sum / s.units[problem * s.width + column];
}

}  // namespace fastclust::kmeans::cuda

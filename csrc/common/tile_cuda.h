// A tile of all-pairs sums in registers: out(i, j) = sum over t of Op(a_i[t], b_j[t]) for 64 rows a_i and 64 rows b_j, in the
// arithmetic of T and in the order of t. Rows come through functors, so that a tile may gather them.
#pragma once

#include "common/cuda.h"

namespace fastclust::cuda {

struct Product {
    template <class T>
    __device__ static T add(T sum, T a, T b) {
        return sum + a * b;
    }
};

struct SquaredDifference {
    template <class T>
    __device__ static T add(T sum, T a, T b) {
        return sum + (a - b) * (a - b);
    }
};

template <class T, class Op>
struct PairTile {
    static constexpr int kRows = 64, kCols = 64, kDepth = 16, kThreads = 256;
    static constexpr int kSide = 4;  // each thread owns kSide x kSide pairs; 16 neighbouring lanes share kSide rows
    static constexpr int kLoads = kRows * kDepth / kThreads;

    struct Shared {
        alignas(16) T a[kDepth][kRows + kSide];
        alignas(16) T b[kDepth][kCols + kSide];
    };

    /// Pair (i, j) of this thread is row first_row() + i with column first_col() + j.
    __device__ static int first_row() { return static_cast<int>(threadIdx.x) / 16 * kSide; }
    __device__ static int first_col() { return static_cast<int>(threadIdx.x) % 16 * kSide; }

    /// a_row(i), b_row(j): where row i, j < 64 starts, null for none (its pairs come out meaningless), of T or of what is
    /// widened to it. The whole block calls.
    template <class RowOfA, class RowOfB>
    __device__ static void run(const RowOfA& a_row, const RowOfB& b_row, int64_t d, Shared& shared, T (&out)[kSide][kSide]) {
        const int depth = static_cast<int>(threadIdx.x) % kDepth, row = static_cast<int>(threadIdx.x) / kDepth;
        decltype(a_row(0)) a[kLoads];
        decltype(b_row(0)) b[kLoads];
        for (int i = 0; i < kLoads; ++i) {
            a[i] = a_row(row + i * (kThreads / kDepth));
            b[i] = b_row(row + i * (kThreads / kDepth));
        }
        T next_a[kLoads], next_b[kLoads];
        const auto fetch = [&](int64_t t) {
            for (int i = 0; i < kLoads; ++i) {
                next_a[i] = a[i] != nullptr && t < d ? a[i][t] : T(0);
                next_b[i] = b[i] != nullptr && t < d ? b[i][t] : T(0);
            }
        };
        for (int i = 0; i < kSide; ++i)
            for (int j = 0; j < kSide; ++j) out[i][j] = T(0);
        fetch(depth);
        for (int64_t start = 0; start < d; start += kDepth) {
            __syncthreads();
            for (int i = 0; i < kLoads; ++i) {
                shared.a[depth][row + i * (kThreads / kDepth)] = next_a[i];
                shared.b[depth][row + i * (kThreads / kDepth)] = next_b[i];
            }
            __syncthreads();
            if (start + kDepth < d) fetch(start + kDepth + depth);
#pragma unroll
            for (int t = 0; t < kDepth; ++t) {
                T x[kSide], y[kSide];
#pragma unroll
                for (int i = 0; i < kSide; ++i) {
                    x[i] = shared.a[t][first_row() + i];
                    y[i] = shared.b[t][first_col() + i];
                }
#pragma unroll
                for (int i = 0; i < kSide; ++i)
#pragma unroll
                    for (int j = 0; j < kSide; ++j) out[i][j] = Op::add(out[i][j], x[i], y[j]);
            }
        }
    }
};

}  // namespace fastclust::cuda

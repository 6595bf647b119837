// What the CUDA sources of this room share: the lists that candidates are kept in. S is what rows are stored as once they are
// prepared, T what is computed in.
#pragma once

#include <cmath>

#include "common/half_tile_cuda.h"
#include "common/sort_cuda.h"
#include "knn/knn.h"

namespace fastclust::knn::cuda {

template <class T>
struct Candidate {
    T score;
    int32_t index;
};

/// Higher scores first, of equal scores the lower index.
template <class T>
__device__ bool ranks_before(const Candidate<T>& a, const Candidate<T>& b) {
    return a.score > b.score || (a.score == b.score && a.index < b.index);
}

template <class S>
struct Task {
    using T = Computed<S>;
    Search<S> a;                // of rows as prepared
    const S* queries;           // (M, D): a.queries, or a.x where its rows look for each other
    int64_t splits, per_split;  // of the tiles of x
    int64_t capacity;           // candidates a list holds
    Candidate<T>* lists;        // (gridDim.x, rows of a tile, capacity)
    Candidate<T>* found;        // (M, splits, k) where there are several splits
};

template <class S>
__device__ void put(const Search<S>& a, int64_t query, int64_t place, const Candidate<Computed<S>>& candidate) {
    const auto score = candidate.score;
    a.values[query * a.k + place] = a.metric == Metric::euclidean ? sqrt(-2 * score) : score;
    a.indices[query * a.k + place] = candidate.index;
}

/// The lists of a block's queries: up to k candidates in order, then others in any.
template <class S, int kRows, int kCols>
struct Lists {
    using T = Computed<S>;
    static constexpr int kWarps = 256 / fastclust::cuda::kWarp;

    struct Shared {
        Candidate<T> worst[kRows];  // the k-th of a full list: who does not rank before it is out
        int count[kRows];
    };

    const Task<S>& task;
    Candidate<T>* own;  // this block's
    Shared& shared;

    __device__ void clear() const {
        __syncthreads();
        for (int row = threadIdx.x; row < kRows; row += blockDim.x) {
            shared.worst[row] = {-static_cast<T>(INFINITY), INT32_MAX};
            shared.count[row] = 0;
        }
        __syncthreads();
    }

    /// A score that is not a number ranks last.
    __device__ static Candidate<T> candidate(T score, int64_t index) {
        return {score == score ? score : -static_cast<T>(INFINITY), static_cast<int32_t>(index)};
    }

    __device__ void add(int row, const Candidate<T>& candidate) const {
        own[row * task.capacity + atomicAdd(&shared.count[row], 1)] = candidate;
    }

    /// Sorts and cuts the lists that have no room for another tile, or all of them.
    __device__ void shrink(bool all) const {
        __syncthreads();
        for (int row = threadIdx.x / fastclust::cuda::kWarp; row < kRows; row += kWarps) {
            const int count = shared.count[row];
            if (!all && count + kCols <= task.capacity) continue;
            Candidate<T>* list = own + row * task.capacity;
            fastclust::cuda::warp_sort(list, count, [](const auto& a, const auto& b) { return ranks_before(a, b); });
            __syncwarp();
            if (threadIdx.x % fastclust::cuda::kWarp == 0 && count >= task.a.k) {
                shared.count[row] = static_cast<int>(task.a.k);
                shared.worst[row] = list[task.a.k - 1];
            }
        }
        __syncthreads();
    }

    /// Hands the k best of queries [start, start + kRows) on. A split may hold fewer than k rows: it leaves candidates that
    /// rank behind all others.
    __device__ void hand_over(int64_t start, int64_t split) const {
        const Search<S>& a = task.a;
        for (int64_t e = threadIdx.x; e < kRows * a.k; e += blockDim.x) {
            const int64_t row = e / a.k, place = e % a.k, query = start + row;
            if (query >= a.m) continue;
            const bool there = place < shared.count[row];
            const Candidate<T> candidate =
                there ? own[row * task.capacity + place] : Candidate<T>{-static_cast<T>(INFINITY), INT32_MAX};
            if (task.splits == 1)
                put(a, query, place, candidate);
            else
                task.found[(query * task.splits + split) * a.k + place] = candidate;
        }
    }
};

/// The tensor cores' way where float is computed in: what may rank among a list's k by its score in half precision, as wrong as
/// that may be, is scored again in float. Fills in task.splits and what follows, and runs the search but for the merging of
/// splits.
template <class S>
void search_filtered(Task<S>& task, const Context& context);

/// Sizes the splits of the search for tiles of kRows queries and kCols rows, and allocates its lists; returns the blocks.
template <class S>
int64_t plan(Task<S>& task, int64_t tile_rows, int64_t tile_cols, const Context& context) {
    constexpr int64_t kBlocksPerProcessor = 2;
    const Search<S>& a = task.a;
    const int64_t wanted = kBlocksPerProcessor * fastclust::cuda::processors(),
                  tiles = fastclust::cuda::ceil_div(a.n, tile_cols);
    const int64_t queries = fastclust::cuda::ceil_div(a.m, tile_rows), most = wanted / queries;
    task.per_split = fastclust::cuda::ceil_div(tiles, most < 1 ? 1 : most > tiles ? tiles : most);
    task.splits = fastclust::cuda::ceil_div(tiles, task.per_split);
    task.capacity = 2 * a.k + 2 * tile_cols;
    const int64_t blocks = wanted < queries * task.splits ? wanted : queries * task.splits;
    task.lists = context.scratch<Candidate<Computed<S>>>(blocks * tile_rows * task.capacity);
    if (task.splits > 1) task.found = context.scratch<Candidate<Computed<S>>>(a.m * task.splits * a.k);
    return blocks;
}

template <class S>
void search(const Search<S>& a, const Context& context);

template <class T>
void graph(const Graph<T>& a, const Context& context);

}  // namespace fastclust::knn::cuda

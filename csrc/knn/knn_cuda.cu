// Exact search: scores tile by tile in registers, each against its query's running threshold; what passes goes to the query's
// list, which a warp sorts and cuts to k when it is nearly full. Only the lists touch memory, never the M x N scores.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "common/sort_cuda.h"
#include "common/tile_cuda.h"
#include "knn/knn_cuda.h"

namespace fastclust::knn::cuda {
namespace {

using fastclust::cuda::ceil_div;
using fastclust::cuda::grid_of;
using fastclust::cuda::kWarp;
using fastclust::cuda::launch;
using fastclust::cuda::PairTile;
using fastclust::cuda::Product;
using fastclust::cuda::shared_memory;
using fastclust::cuda::SquaredDifference;
using fastclust::cuda::warp_sort;
using fastclust::cuda::warp_sum;

constexpr int kRows = 64, kCols = 64, kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

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

template <class T>
struct Task {
    Search<T> a;
    const T* x;                 // (N, D) as prepared
    const T* queries;           // (M, D) as prepared
    int64_t splits, per_split;  // of the tiles of x
    int64_t capacity;           // candidates a list holds
    Candidate<T>* lists;        // (gridDim.x, 64, capacity)
    Candidate<T>* found;        // (M, splits, k) where there are several splits
};

template <class T, class Op>
struct SearchShared {
    typename PairTile<T, Op>::Shared tile;
    Candidate<T> worst[kRows];  // the k-th of a full list: who does not rank before it is out
    int count[kRows];
};

template <class T>
__device__ void put(const Search<T>& a, int64_t query, int64_t place, const Candidate<T>& candidate) {
    const T score = candidate.score;
    a.values[query * a.k + place] = a.metric == Metric::euclidean ? sqrt(-2 * score) : score;
    a.indices[query * a.k + place] = candidate.index;
}

template <class T, class Op>
struct Lists {
    const Task<T>& task;
    Candidate<T>* own;  // this block's
    SearchShared<T, Op>& shared;

    __device__ void clear() const {
        __syncthreads();
        for (int row = threadIdx.x; row < kRows; row += kThreads) {
            shared.worst[row] = {-static_cast<T>(INFINITY), INT32_MAX};
            shared.count[row] = 0;
        }
        __syncthreads();
    }

    __device__ void offer(int row, T score, int64_t index) const {
        const Candidate<T> candidate{score == score ? score : -static_cast<T>(INFINITY), static_cast<int32_t>(index)};
        if (!ranks_before(candidate, shared.worst[row])) return;
        own[row * task.capacity + atomicAdd(&shared.count[row], 1)] = candidate;
    }

    /// Sorts and cuts the lists that have no room for another tile, or all of them.
    __device__ void shrink(bool all) const {
        const int lane = threadIdx.x % kWarp;
        __syncthreads();
        for (int row = threadIdx.x / kWarp; row < kRows; row += kWarps) {
            const int count = shared.count[row];
            if (!all && count + kCols <= task.capacity) continue;
            Candidate<T>* list = own + row * task.capacity;
            warp_sort(list, count, [](const auto& a, const auto& b) { return ranks_before(a, b); });
            __syncwarp();
            if (lane == 0 && count >= task.a.k) {
                shared.count[row] = static_cast<int>(task.a.k);
                shared.worst[row] = list[task.a.k - 1];
            }
        }
        __syncthreads();
    }
};

/// One block per 64 queries and split; blocks take further pieces in turn, so that only as many lists exist as blocks.
template <class T, class Op>
__global__ void __launch_bounds__(kThreads) search_tiles(Task<T> task) {
    using Tile = PairTile<T, Op>;
    constexpr int kSide = Tile::kSide;
    const Search<T>& a = task.a;
    auto& shared = *shared_memory<SearchShared<T, Op>>();
    const Lists<T, Op> lists{task, task.lists + int64_t(blockIdx.x) * kRows * task.capacity, shared};
    const int64_t tiles = ceil_div(a.n, kCols);
    for (int64_t piece = blockIdx.x; piece < ceil_div(a.m, kRows) * task.splits; piece += gridDim.x) {
        const int64_t start = piece / task.splits * kRows, split = piece % task.splits;
        lists.clear();
        for (int64_t tile = split * task.per_split; tile < (split + 1) * task.per_split && tile < tiles; ++tile) {
            const int64_t first = tile * kCols;
            T sum[kSide][kSide];
            Tile::run([&](int i) { return start + i < a.m ? task.queries + (start + i) * a.d : nullptr; },
                      [&](int j) { return first + j < a.n ? task.x + (first + j) * a.d : nullptr; }, a.d, shared.tile, sum);
            for (int i = 0; i < kSide; ++i)
                for (int j = 0; j < kSide; ++j) {
                    const int64_t query = start + Tile::first_row() + i, index = first + Tile::first_col() + j;
                    if (query >= a.m || index >= a.n || (a.queries == nullptr && query == index)) continue;
                    lists.offer(Tile::first_row() + i, a.metric == Metric::euclidean ? -sum[i][j] / 2 : sum[i][j], index);
                }
            lists.shrink(false);
        }
        lists.shrink(true);
        for (int64_t e = threadIdx.x; e < kRows * a.k; e += kThreads) {
            const int64_t row = e / a.k, place = e % a.k, query = start + row;
            if (query >= a.m) continue;
            // A split may hold fewer than k rows: it leaves candidates that rank behind all others.
            const bool there = place < shared.count[row];
            const Candidate<T> candidate =
                there ? lists.own[row * task.capacity + place] : Candidate<T>{-static_cast<T>(INFINITY), INT32_MAX};
            if (task.splits == 1)
                put(a, query, place, candidate);
            else
                task.found[(query * task.splits + split) * a.k + place] = candidate;
        }
    }
}

/// One warp per query: the best of what its splits found.
template <class T>
__global__ void __launch_bounds__(kThreads) merge_splits(Task<T> task) {
    const Search<T>& a = task.a;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t query = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; query < a.m; query += stride) {
        Candidate<T>* found = task.found + query * task.splits * a.k;
        warp_sort(found, task.splits * a.k, [](const auto& x, const auto& y) { return ranks_before(x, y); });
        for (int64_t place = threadIdx.x % kWarp; place < a.k; place += kWarp) put(a, query, place, found[place]);
    }
}

/// Rows divided by their norms; a zero row stays zero. One warp per row. The greatest element goes first, so that neither its
/// square nor the sum of squares leaves the range.
template <class T>
__global__ void __launch_bounds__(kThreads) normalise_rows(const T* x, int64_t rows, int64_t d, T* out) {
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < rows; row += stride) {
        double greatest = 0, squares = 0;
        for (int64_t t = lane; t < d; t += kWarp) greatest = fmax(greatest, fabs(double(x[row * d + t])));
        for (int bits = kWarp / 2; bits > 0; bits /= 2)
            greatest = fmax(greatest, __shfl_xor_sync(fastclust::cuda::kAllLanes, greatest, bits));
        const double unit = greatest > 0 ? greatest : 1;
        for (int64_t t = lane; t < d; t += kWarp) squares += x[row * d + t] / unit * (x[row * d + t] / unit);
        const double norm = sqrt(warp_sum(squares));
        for (int64_t t = lane; t < d; t += kWarp)
            out[row * d + t] = norm > 0 ? static_cast<T>(x[row * d + t] / unit / norm) : T(0);
    }
}

template <class T>
const T* prepare(const T* x, int64_t rows, const Search<T>& a, const Context& context) {
    if (a.metric != Metric::cosine) return x;
    T* out = context.scratch<T>(rows * a.d);
    launch("normalise_rows", normalise_rows<T>, grid_of(ceil_div(rows, kWarps)), dim3(kThreads), 0, context.stream, x, rows,
           a.d, out);
    return out;
}

int multiprocessors() {
    int device = 0, count = 0;
    fastclust::cuda::check(cudaGetDevice(&device), "knn");
    fastclust::cuda::check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "knn");
    return count;
}

template <class T, class Op>
void run(Task<T>& task, const Context& context) {
    constexpr int64_t kBlocksPerProcessor = 2;
    const Search<T>& a = task.a;
    const int64_t wanted = kBlocksPerProcessor * multiprocessors(), tiles = ceil_div(a.n, kCols),
                  queries = ceil_div(a.m, kRows);
    task.per_split = ceil_div(tiles, std::clamp<int64_t>(wanted / queries, 1, tiles));
    task.splits = ceil_div(tiles, task.per_split);
    task.capacity = 2 * a.k + 2 * kCols;
    const int64_t blocks = std::min(wanted, queries * task.splits);
    task.lists = context.scratch<Candidate<T>>(blocks * kRows * task.capacity);
    if (task.splits > 1) task.found = context.scratch<Candidate<T>>(a.m * task.splits * a.k);
    launch("search_tiles", search_tiles<T, Op>, grid_of(blocks), dim3(kThreads), sizeof(SearchShared<T, Op>), context.stream,
           task);
    if (task.splits > 1)
        launch("merge_splits", merge_splits<T>, grid_of(ceil_div(a.m, kWarps)), dim3(kThreads), 0, context.stream, task);
}

template <class T>
constexpr Kernels<T> kTable{search<T>, graph<T>};

}  // namespace

template <class T>
void search(const Search<T>& a, const Context& context) {
    if (a.n >= INT32_MAX) throw std::invalid_argument("knn: x holds 2^31 rows or more");
    if (a.m == 0 || a.k == 0) return;
    Task<T> task{a, prepare(a.x, a.n, a, context), nullptr, 0, 0, 0, nullptr, nullptr};
    task.queries = a.queries == nullptr ? task.x : prepare(a.queries, a.m, a, context);
    if (a.metric == Metric::euclidean)
        run<T, SquaredDifference>(task, context);
    else
        run<T, Product>(task, context);
}

template void search(const Search<float>&, const Context&);
template void search(const Search<double>&, const Context&);

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::knn::cuda

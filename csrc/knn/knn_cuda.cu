// Exact search: scores tile by tile in registers, each against its query's running threshold; what passes goes to the query's
// list, which a warp sorts and cuts to k when it is nearly full. Only the lists touch memory, never the M x N scores.
#include <cmath>
#include <stdexcept>

#include "common/tile_cuda.h"
#include "knn/knn_cuda.h"

namespace fastclust::knn::cuda {
namespace {

using namespace fastclust::cuda;

constexpr int kRows = 64, kCols = 64, kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <class S, class Op>
struct SearchShared {
    typename PairTile<Computed<S>, Op>::Shared tile;
    typename Lists<S, kRows, kCols>::Shared lists;
};

/// One block per 64 queries and split; blocks take further pieces in turn, so that only as many lists exist as blocks.
template <class S, class Op>
__global__ void __launch_bounds__(kThreads, 2) search_tiles(Task<S> task) {
    using T = Computed<S>;
    using Tile = PairTile<T, Op>;
    constexpr int kSide = Tile::kSide;
    const Search<S>& a = task.a;
    auto& shared = *shared_memory<SearchShared<S, Op>>();
    const Lists<S, kRows, kCols> lists{task, task.lists + int64_t(blockIdx.x) * kRows * task.capacity, shared.lists};
    const int64_t tiles = ceil_div(a.n, kCols);
    for (int64_t piece = blockIdx.x; piece < ceil_div(a.m, kRows) * task.splits; piece += gridDim.x) {
        const int64_t start = piece / task.splits * kRows, split = piece % task.splits;
        lists.clear();
        for (int64_t tile = split * task.per_split; tile < (split + 1) * task.per_split && tile < tiles; ++tile) {
            const int64_t first = tile * kCols;
            T sum[kSide][kSide];
            Tile::run([&](int i) { return start + i < a.m ? task.queries + (start + i) * a.d : nullptr; },
                      [&](int j) { return first + j < a.n ? a.x + (first + j) * a.d : nullptr; }, a.d, shared.tile, sum);
            for (int i = 0; i < kSide; ++i)
                for (int j = 0; j < kSide; ++j) {
                    const int row = Tile::first_row() + i;
                    const int64_t query = start + row, index = first + Tile::first_col() + j;
                    if (query >= a.m || index >= a.n || (a.queries == nullptr && query == index)) continue;
                    const auto found = lists.candidate(a.metric == Metric::euclidean ? -sum[i][j] / 2 : sum[i][j], index);
                    if (ranks_before(found, shared.lists.worst[row])) lists.add(row, found);
                }
            lists.shrink(false);
        }
        lists.shrink(true);
        lists.hand_over(start, split);
    }
}

/// One warp per query: the best of what its splits found.
template <class S>
__global__ void __launch_bounds__(kThreads, 4) merge_splits(Task<S> task) {
    const Search<S>& a = task.a;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t query = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; query < a.m; query += stride) {
        Candidate<Computed<S>>* found = task.found + query * task.splits * a.k;
        warp_sort(found, task.splits * a.k, [](const auto& x, const auto& y) { return ranks_before(x, y); });
        for (int64_t place = threadIdx.x % kWarp; place < a.k; place += kWarp) put(a, query, place, found[place]);
    }
}

/// Rows divided by their norms; a zero row stays zero. One warp per row. The greatest element goes first, so that neither its
/// square nor the sum of squares leaves the range.
template <class S>
__global__ void __launch_bounds__(kThreads, 4) normalise_rows(const S* x, int64_t rows, int64_t d, Computed<S>* out) {
    using T = Computed<S>;
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < rows; row += stride) {
        double greatest = 0, squares = 0;
        for (int64_t t = lane; t < d; t += kWarp) greatest = fmax(greatest, fabs(double(x[row * d + t])));
        for (int bits = kWarp / 2; bits > 0; bits /= 2) greatest = fmax(greatest, __shfl_xor_sync(kAllLanes, greatest, bits));
        const double unit = greatest > 0 ? greatest : 1;
        for (int64_t t = lane; t < d; t += kWarp) squares += x[row * d + t] / unit * (x[row * d + t] / unit);
        const double norm = sqrt(warp_sum(squares));
        for (int64_t t = lane; t < d; t += kWarp)
            out[row * d + t] = norm > 0 ? static_cast<T>(x[row * d + t] / unit / norm) : T(0);
    }
}

template <class S>
Search<Computed<S>> normalised(const Search<S>& a, const Context& context) {
    using T = Computed<S>;
    const auto normalise = [&](const S* rows, int64_t count) {
        T* out = context.scratch<T>(count * a.d);
        launch("normalise_rows", normalise_rows<S>, grid_of(ceil_div(count, kWarps)), dim3(kThreads), 0, context.stream, rows,
               count, a.d, out);
        return out;
    };
    return {
        a.n,      a.m,     a.k,      a.d,      normalise(a.x, a.n), a.queries == nullptr ? nullptr : normalise(a.queries, a.m),
        a.metric, a.exact, a.values, a.indices};
}

template <class S, class Op>
void search_directly(Task<S>& task, const Context& context) {
    const int64_t blocks = plan(task, kRows, kCols, context);
    launch("search_tiles", search_tiles<S, Op>, grid_of(blocks), dim3(kThreads), sizeof(SearchShared<S, Op>), context.stream,
           task);
}

/// Whether the halves are worth making.
template <class S>
bool wants_filter(const Search<S>& a) {
    return a.d >= 16 && a.n >= 128;
}

template <class S>
void fill_lists(Task<S>& task, const Context& context) {
    if constexpr (std::is_same_v<Computed<S>, float>) {
        if (wants_filter(task.a)) return search_filtered(task, context);
    }
    if (task.a.metric == Metric::euclidean)
        search_directly<S, SquaredDifference>(task, context);
    else
        search_directly<S, Product>(task, context);
}

/// The search among rows as prepared.
template <class S>
void run(const Search<S>& a, const Context& context) {
    Task<S> task{a, a.queries == nullptr ? a.x : a.queries, 0, 0, 0, nullptr, nullptr};
    fill_lists(task, context);
    if (task.splits > 1)
        launch("merge_splits", merge_splits<S>, grid_of(ceil_div(a.m, kWarps)), dim3(kThreads), 0, context.stream, task);
}

template <class S>
constexpr Kernels<S> kTable{search<S>, graph<Computed<S>>};

}  // namespace

template <class S>
void search(const Search<S>& a, const Context& context) {
    if (a.n >= INT32_MAX) throw std::invalid_argument("knn: x holds 2^31 rows or more");
    if (a.m == 0 || a.k == 0) return;
    if (a.metric == Metric::cosine)
        run(normalised(a, context), context);
    else
        run(a, context);
}

template void search(const Search<float>&, const Context&);
template void search(const Search<double>&, const Context&);
template void search(const Search<Float16>&, const Context&);
template void search(const Search<Bfloat16>&, const Context&);

FASTCLUST_DEFINE_KERNELS
FASTCLUST_DEFINE_KERNELS_OF_HALVES

}  // namespace fastclust::knn::cuda

#include "knn/knn_cuda.h"

namespace fastclust::knn::cuda {
namespace {

using namespace fastclust::cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

/// Rows in half precision.
struct Rounded {
    const Half* halves;    // (rows, padded D)
    const RowInfo* info;   // (rows)
    const float* squares;  // (rows) |x - shift|^2
};

template <class S>
__global__ void __launch_bounds__(kThreads)
    round_rows(const S* x, int64_t rows, int64_t d, const S* shift, Half* halves, RowInfo* info, float* squares) {
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < rows; row += stride) {
        const RowInfo found = round_row(x + row * d, shift, d, halves + row * padded_depth(d));
        double square = 0;
        for (int64_t t = lane; t < d; t += kWarp) {
            const double moved = double(x[row * d + t]) - (shift == nullptr ? 0.0 : double(shift[t]));
            square += moved * moved;
        }
        square = warp_sum(square);
        if (lane != 0) continue;
        info[row] = found;
        squares[row] = static_cast<float>(square);
    }
}

/// Every block leaves the greatest of its rows at worst[1 + block], the last launch of one block that of all at worst[0].
__global__ void __launch_bounds__(kThreads) reduce_worst(const RowInfo* info, int64_t rows, float2* worst, int blocks) {
    auto* slots = shared_memory<float2>();
    float2 greatest{0, 0};
    const auto take = [&](float norm, float error) {
        greatest.x = fmaxf(greatest.x, norm);
        greatest.y = fmaxf(greatest.y, error);
    };
    if (info != nullptr) {
        const int64_t stride = int64_t(gridDim.x) * kThreads;
        for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < rows; row += stride)
            take(info[row].norm, info[row].error);
    } else {
        for (int block = threadIdx.x; block < blocks; block += kThreads) take(worst[1 + block].x, worst[1 + block].y);
    }
    for (int bits = kWarp / 2; bits > 0; bits /= 2)
        take(__shfl_xor_sync(kAllLanes, greatest.x, bits), __shfl_xor_sync(kAllLanes, greatest.y, bits));
    if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = greatest;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) take(slots[warp].x, slots[warp].y);
    if (threadIdx.x == 0) worst[info != nullptr ? 1 + blockIdx.x : 0] = greatest;
}

template <class S>
struct FilterTask {
    Task<S> task;
    Rounded x, queries;
    const float2* worst;  // (1) the greatest norm and the greatest error of a row of x
};

template <class S>
using HalfLists = Lists<S, HalfTile::kRows, HalfTile::kCols>;

template <class S>
struct FilterShared {
    HalfTile::Shared tile;
    typename HalfLists<S>::Shared lists;
    int scored[HalfTile::kRows];  // how many of a list's candidates have their score in float
    float error[HalfTile::kRows];
};

/// How far a score in half precision of this query may be from the truth, for any row of x: the error of the product as
/// half_tile_cuda.h bounds it, and the rounding of squares and sums.
__device__ float score_error(const RowInfo& query, float2 worst, int64_t depth, bool exact) {
    constexpr float kLikely = 0.125f;  // of the bound, where errors of the elements are taken as random
    const float norm = worst.x + worst.y, own = query.norm + query.error;
    const float product = query.error * norm + query.norm * worst.y + float(depth) * 0x1p-22f * query.norm * worst.x;
    return (exact ? 1 : kLikely) * product + 0x1p-21f * (own * own + norm * norm);
}

/// The score in float of a candidate, for every lane of the warp that calls; equal rows get equal scores.
template <class S>
__device__ float score_exactly(const S* query, const S* x, const Search<S>& a) {
    float sum = 0;
    for (int64_t t = threadIdx.x % kWarp; t < a.d; t += kWarp)
        sum += a.metric == Metric::euclidean ? (query[t] - x[t]) * (query[t] - x[t]) : query[t] * x[t];
    sum = warp_sum(sum);
    return a.metric == Metric::euclidean ? -sum / 2 : sum;
}

/// Lists what may rank of a tile's scores: those at most the bound of the error below the worst of their query's list.
template <class S>
__device__ __forceinline__ void take_scores(const FilterTask<S>& f, const HalfLists<S>& lists, const FilterShared<S>& shared,
                                            int64_t start, int64_t first, const HalfTile::Sums& sum) {
    const Search<S>& a = f.task.a;
    const bool euclidean = a.metric == Metric::euclidean;
    float limit[HalfTile::kDown][2], factor[HalfTile::kDown][2];
    for (int i = 0; i < HalfTile::kDown; ++i)
        for (int half = 0; half < 2; ++half) {
            const int row = HalfTile::row_of(i, 2 * half);
            const int64_t query = start + row < a.m ? start + row : a.m - 1;
            limit[i][half] = shared.lists.worst[row].score - shared.error[row] + (euclidean ? f.queries.squares[query] / 2 : 0);
            factor[i][half] = f.queries.info[query].factor;
        }
    constexpr int kWord = 32, kOfColumn = 2 * HalfTile::kDown;  // scores of this thread in a column
    uint32_t passed[HalfTile::kAcross * 2 * kOfColumn / kWord] = {};
#pragma unroll
    for (int j = 0; j < HalfTile::kAcross; ++j)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int64_t index = first + HalfTile::col_of(j, side) < a.n ? first + HalfTile::col_of(j, side) : a.n - 1;
            const float own_factor = f.x.info[index].factor, own_square = euclidean ? f.x.squares[index] / 2 : 0;
#pragma unroll
            for (int i = 0; i < HalfTile::kDown; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int place = (2 * j + side) * kOfColumn + 2 * i + half;
                    const float product = sum[i][j][2 * half + side] * factor[i][half] * own_factor;
                    if (!(product - own_square < limit[i][half])) passed[place / kWord] |= 1u << place % kWord;
                }
        }
    for (int word = 0; word < static_cast<int>(sizeof passed / sizeof *passed); ++word)
        for (; passed[word] != 0; passed[word] &= passed[word] - 1) {
            const int place = word * kWord + __ffs(static_cast<int>(passed[word])) - 1, column = place / kOfColumn;
            const int row = HalfTile::row_of(place / 2 % HalfTile::kDown, 2 * (place % 2));
            const int64_t query = start + row, index = first + HalfTile::col_of(column / 2, column % 2);
            if (query < a.m && index < a.n && !(a.queries == nullptr && query == index))
                lists.add(row, {0, static_cast<int32_t>(index)});
        }
}

/// Gives the candidates that a tile has brought their scores in float, a warp each.
template <class S>
__device__ void score_candidates(const FilterTask<S>& f, const HalfLists<S>& lists, FilterShared<S>& shared, int64_t start) {
    const Task<S>& task = f.task;
    for (int row = threadIdx.x / kWarp; row < HalfTile::kRows; row += kWarps)
        for (int e = shared.scored[row]; e < shared.lists.count[row]; ++e) {
            Candidate<float>& candidate = lists.own[row * task.capacity + e];
            const float score =
                score_exactly(task.queries + (start + row) * task.a.d, task.a.x + candidate.index * task.a.d, task.a);
            if (threadIdx.x % kWarp == 0) candidate.score = HalfLists<S>::candidate(score, 0).score;
        }
}

/// One block per 128 queries and split, as search_tiles.
template <class S>
__global__ void __launch_bounds__(kThreads) filter_tiles(FilterTask<S> f) {
    constexpr int kRows = HalfTile::kRows, kCols = HalfTile::kCols;
    const Task<S>& task = f.task;
    const Search<S>& a = task.a;
    auto& shared = *shared_memory<FilterShared<S>>();
    const HalfLists<S> lists{task, task.lists + int64_t(blockIdx.x) * kRows * task.capacity, shared.lists};
    const int64_t tiles = ceil_div(a.n, kCols), depth = padded_depth(a.d);
    for (int64_t piece = blockIdx.x; piece < ceil_div(a.m, kRows) * task.splits; piece += gridDim.x) {
        const int64_t start = piece / task.splits * kRows, split = piece % task.splits;
        lists.clear();
        for (int row = threadIdx.x; row < kRows; row += kThreads) {
            shared.scored[row] = 0;
            shared.error[row] = start + row < a.m ? score_error(f.queries.info[start + row], *f.worst, depth, a.exact) : 0;
        }
        for (int64_t tile = split * task.per_split; tile < (split + 1) * task.per_split && tile < tiles; ++tile) {
            const int64_t first = tile * kCols;
            HalfTile::Sums sum;
            HalfTile::clear(sum);
            HalfTile::add({f.queries.halves + start * depth, a.m - start, depth},
                          {f.x.halves + first * depth, a.n - first, depth}, depth, shared.tile, sum);
            take_scores(f, lists, shared, start, first, sum);
            __syncthreads();
            score_candidates(f, lists, shared, start);
            lists.shrink(false);
            for (int row = threadIdx.x; row < kRows; row += kThreads) shared.scored[row] = shared.lists.count[row];
        }
        lists.shrink(true);
        lists.hand_over(start, split);
    }
}

template <class S>
Rounded round_all(const S* x, int64_t rows, int64_t d, const S* shift, const Context& context) {
    auto* halves = context.scratch<Half>(rows * padded_depth(d));
    auto* info = context.scratch<RowInfo>(rows);
    auto* squares = context.scratch<float>(rows);
    launch("round_rows", round_rows<S>, grid_of(ceil_div(rows, kWarps)), dim3(kThreads), 0, context.stream, x, rows, d, shift,
           halves, info, squares);
    return {halves, info, squares};
}

const float2* find_worst(const Rounded& rows, int64_t count, const Context& context) {
    constexpr int kBlocks = 64;
    auto* worst = context.scratch<float2>(1 + kBlocks);
    const size_t shared = kWarps * sizeof(float2);
    launch("reduce_worst", reduce_worst, dim3(kBlocks), dim3(kThreads), shared, context.stream, rows.info, count, worst,
           kBlocks);
    launch("reduce_worst", reduce_worst, dim3(1), dim3(kThreads), shared, context.stream, nullptr, int64_t{0}, worst, kBlocks);
    return worst;
}

}  // namespace

template <class S>
void search_filtered(Task<S>& task, const Context& context) {
    const Search<S>& a = task.a;
    // Distances do not change with a shift, and the first row is near the others more often than the origin is.
    const S* shift = a.metric == Metric::euclidean ? a.x : nullptr;
    const Rounded x = round_all(a.x, a.n, a.d, shift, context);
    const Rounded queries = a.queries == nullptr ? x : round_all(task.queries, a.m, a.d, shift, context);
    const float2* worst = find_worst(x, a.n, context);
    const int64_t blocks = plan(task, HalfTile::kRows, HalfTile::kCols, context);
    launch("filter_tiles", filter_tiles<S>, grid_of(blocks), dim3(kThreads), sizeof(FilterShared<S>), context.stream,
           FilterTask<S>{task, x, queries, worst});
}

template void search_filtered(Task<float>&, const Context&);
template void search_filtered(Task<Float16>&, const Context&);
template void search_filtered(Task<Bfloat16>&, const Context&);

}  // namespace fastclust::knn::cuda

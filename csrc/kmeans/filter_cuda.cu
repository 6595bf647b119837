#include <cmath>

#include "kmeans/sums_cuda.h"

namespace fastclust::kmeans::cuda {
namespace {

using namespace fastclust::cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerProcessor = 2;

__host__ __device__ int64_t padded_columns(int64_t k) {
    return ceil_div(k, HalfTile::kCols) * HalfTile::kCols;
}

/// shift (B, D): the mean of the first restart's centroids. Any would do; this one keeps the products small.
template <class S>
__global__ void average_centroids(Assignment<S> a, float* shift) {
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.groups / a.restarts * a.d; i += stride) {
        const float* centroids = a.centroids + i / a.d * a.restarts * a.k * a.d + i % a.d;
        double sum = 0;
        for (int64_t k = 0; k < a.k; ++k) sum += double(centroids[k * a.d]);
        shift[i] = static_cast<float>(sum / double(a.k));
    }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 4) round_rows(Assignment<S> a, const float* shift, Half* halves, RowInfo* info) {
    const int64_t stride = int64_t(gridDim.x) * kWarps, rows = a.groups / a.restarts * a.n;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < rows; row += stride) {
        const RowInfo found = round_row(a.x + row * a.d, shift + row / a.n * a.d, a.d, halves + row * padded_depth(a.d));
        if (threadIdx.x % kWarp == 0) info[row] = found;
    }
}

/// One warp per centroid or column of padding, whose infinite square keeps it from being nearest.
template <class S>
__global__ void __launch_bounds__(kThreads) round_centroids(Assignment<S> a, Filter f) {
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps, columns = padded_columns(a.k);
    for (int64_t piece = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; piece < a.groups * columns; piece += stride) {
        const int64_t g = piece / columns, k = piece % columns, row = g * a.k + k;
        if (lane == 0 && k == 0) f.undecided.count[g] = 0;
        if (a.skips(g)) continue;
        if (k >= a.k) {
            if (lane == 0) f.columns[piece] = {INFINITY, 0};
            continue;
        }
        const float *centroid = a.centroids + row * a.d, *shift = f.shift + a.problem(g) * a.d;
        const RowInfo info = round_row(centroid, shift, a.d, f.centroids + row * padded_depth(a.d));
        double square = 0;
        for (int64_t t = lane; t < a.d; t += kWarp) {
            const double moved = double(centroid[t]) - double(shift[t]);
            square += moved * moved;
        }
        square = warp_sum(square);
        if (lane != 0) continue;
        f.centroid_info[row] = info;
        f.columns[piece] = {static_cast<float>(square), 2 * info.factor};
    }
}

/// The least and the second least score of a row, and whose the least is.
struct Best {
    float least, second;
    int32_t label;

    __device__ void take(float score, int32_t k) {
        second = fminf(second, fmaxf(least, score));
        label = score < least ? k : label;
        least = fminf(least, score);
    }
    __device__ void merge(const Best& other) {
        second = fminf(fmaxf(least, other.least), fminf(second, other.second));
        label = other.least < least ? other.label : label;
        least = fminf(least, other.least);
    }
};

/// Each thread's rows of a tile, as HalfTile has them.
using Bests = Best[HalfTile::kDown][2];

struct FilterShared {
    HalfTile::Shared tile;
    Best best[HalfTile::kRows];
    float factor[HalfTile::kRows];
    Moved moved[HalfTile::kRows];
    float2 slots[kWarps];
    float2 worst;  // the greatest norm and the greatest error of a centroid
    int changed;
};

/// Fills in shared.worst; to be read after the next barrier.
__device__ void find_worst(const RowInfo* centroids, int64_t k, FilterShared& shared) {
    float2 worst{0, 0};
    const auto take = [&](float norm, float error) { worst = {fmaxf(worst.x, norm), fmaxf(worst.y, error)}; };
    for (int64_t i = threadIdx.x; i < k; i += kThreads) take(centroids[i].norm, centroids[i].error);
    for (int bits = kWarp / 2; bits > 0; bits /= 2) {
        const float norm = __shfl_xor_sync(kAllLanes, worst.x, bits), error = __shfl_xor_sync(kAllLanes, worst.y, bits);
        take(norm, error);
    }
    __syncthreads();
    if (threadIdx.x % kWarp == 0) shared.slots[threadIdx.x / kWarp] = worst;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) take(shared.slots[warp].x, shared.slots[warp].y);
    if (threadIdx.x == 0) shared.worst = worst;
}

/// How far a score |c|^2 - 2 x.c of this row may be from the truth, for any centroid: twice the error of the product as
/// half_tile_cuda.h bounds it, the rounding of |c|^2, and that of the score.
__device__ float score_error(const RowInfo& x, float2 worst, int64_t depth) {
    const float norm = worst.x + worst.y;
    const float product = x.error * norm + x.norm * worst.y + float(depth) * 0x1p-22f * x.norm * worst.x;
    return 2 * product + 0x1p-21f * (norm * norm + 2 * x.norm * norm);
}

/// Takes the scores of a tile's 128 centroids into `best`; columns (128): |c|^2 and twice the factor. |x|^2 never matters.
__device__ __forceinline__ void take_scores(const HalfTile::Sums& sum, const float2* columns, const float* factors,
                                            int32_t first, Bests& best) {
    float factor[HalfTile::kDown][2];
    for (int i = 0; i < HalfTile::kDown; ++i)
        for (int half = 0; half < 2; ++half) factor[i][half] = factors[HalfTile::row_of(i, 2 * half)];
#pragma unroll
    for (int j = 0; j < HalfTile::kAcross; ++j) {
        const int at = HalfTile::col_of(j, 0);
        const float4 pair = *reinterpret_cast<const float4*>(columns + at);
#pragma unroll
        for (int i = 0; i < HalfTile::kDown; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                best[i][half].take(pair.x - sum[i][j][2 * half] * pair.y * factor[i][half], first + at);
                best[i][half].take(pair.z - sum[i][j][2 * half + 1] * pair.w * factor[i][half], first + at + 1);
            }
    }
}

/// Merges what the threads of a row have found into the thread of its first column.
__device__ __forceinline__ void merge_rows(Bests& best, FilterShared& shared) {
    const bool right = threadIdx.x / kWarp % 2 != 0, leads = threadIdx.x % 4 == 0;
    for (int i = 0; i < HalfTile::kDown; ++i)
        for (int half = 0; half < 2; ++half) {
            for (int bits = 2; bits > 0; bits /= 2) {
                Best other;
                other.least = __shfl_xor_sync(kAllLanes, best[i][half].least, bits);
                other.second = __shfl_xor_sync(kAllLanes, best[i][half].second, bits);
                other.label = __shfl_xor_sync(kAllLanes, best[i][half].label, bits);
                best[i][half].merge(other);
            }
            if (right && leads) shared.best[HalfTile::row_of(i, 2 * half)] = best[i][half];
        }
    __syncthreads();
    if (right || !leads) return;
    for (int i = 0; i < HalfTile::kDown; ++i)
        for (int half = 0; half < 2; ++half) best[i][half].merge(shared.best[HalfTile::row_of(i, 2 * half)]);
}

/// The label of a row whose best scores are these, or its place in the list of the undecided.
template <class S>
__device__ void decide(const Assignment<S>& a, const Filter& f, int64_t g, int64_t row, const Best& best,
                       FilterShared& shared) {
    const float error = score_error(f.x_info[a.problem(g) * a.n + row], shared.worst, padded_depth(a.d));
    const bool decided = !a.exact || best.second - best.least > 2 * error;
    const int64_t fixed = a.fixed_label(g, row), at = g * a.n + row;
    if (fixed < 0 && !decided) {
        f.undecided.rows[g * a.n + static_cast<int64_t>(atomicAdd(&f.undecided.count[g], 1ULL))] = row;
        return;
    }
    note_label(a, g, row, fixed >= 0 ? fixed : best.label, shared.moved, shared.changed);
}

/// One block per 128 rows of a group.
template <class S>
__global__ void __launch_bounds__(HalfTile::kThreads, kBlocksPerProcessor) filter_tiles(Assignment<S> a, Filter f) {
    auto& shared = *shared_memory<FilterShared>();
    const int64_t tiles = ceil_div(a.n, HalfTile::kRows), depth = padded_depth(a.d), columns = padded_columns(a.k);
    int64_t group = -1;  // whose worst centroid is known and whose centroids lie in shared memory where they fit
    for (int64_t tile = blockIdx.x; tile < a.groups * tiles; tile += gridDim.x) {
        const int64_t g = tile / tiles, start = tile % tiles * HalfTile::kRows, first_row = a.problem(g) * a.n + start;
        if (a.skips(g)) continue;
        if (g != group) find_worst(f.centroid_info + g * a.k, a.k, shared);
        for (int row = threadIdx.x; row < HalfTile::kRows; row += kThreads)
            shared.factor[row] = start + row < a.n ? f.x_info[first_row + row].factor : 0;
        __syncthreads();
        Bests best;
        for (auto& pair : best) pair[0] = pair[1] = {INFINITY, INFINITY, 0};
        for (int64_t first = 0; first < a.k; first += HalfTile::kCols) {
            HalfTile::Sums sum;
            HalfTile::clear(sum);
            HalfTile::add({f.x + first_row * depth, a.n - start, depth},
                          {f.centroids + (g * a.k + first) * depth, a.k - first, depth}, depth, shared.tile, sum,
                          g == group && HalfTile::holds(a.k, depth));
            take_scores(sum, f.columns + g * columns + first, shared.factor, static_cast<int32_t>(first), best);
        }
        group = g;
        __syncthreads();
        if (threadIdx.x == 0) shared.changed = 0;
        merge_rows(best, shared);
        if (threadIdx.x / kWarp % 2 == 0 && threadIdx.x % 4 == 0)
            for (int i = 0; i < HalfTile::kDown; ++i)
                for (int half = 0; half < 2; ++half) {
                    const int64_t row = start + HalfTile::row_of(i, 2 * half);
                    if (row < a.n) decide(a, f, g, row, best[i][half], shared);
                }
        move_noted(a, g, shared.moved, shared.changed);
    }
}

/// One warp per row.
template <class S>
__global__ void __launch_bounds__(kThreads) measure(Assignment<S> a) {
    using T = Computed<S>;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t at = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; at < a.groups * a.n; at += stride) {
        const int64_t g = at / a.n;
        const S* x = a.x + (a.problem(g) * a.n + at % a.n) * a.d;
        const T* centroid = a.centroids + (g * a.k + a.labels[at]) * a.d;
        T sum = 0;
        for (int64_t t = threadIdx.x % kWarp; t < a.d; t += kWarp) sum += (x[t] - centroid[t]) * (x[t] - centroid[t]);
        sum = warp_sum(sum);
        if (threadIdx.x % kWarp == 0) a.distances[at] = sum;
    }
}

}  // namespace

template <class S>
Filter prepare_filter(const Assignment<S>& a, const Context& context) {
    const int64_t problems = a.groups / a.restarts, depth = padded_depth(a.d);
    auto* shift = context.scratch<float>(problems * a.d);
    auto* halves = context.scratch<Half>(problems * a.n * depth);
    auto* info = context.scratch<RowInfo>(problems * a.n);
    launch("average_centroids", average_centroids<S>, grid_of(ceil_div(problems * a.d, kThreads)), dim3(kThreads), 0,
           context.stream, a, shift);
    launch("round_rows", round_rows<S>, grid_of(ceil_div(problems * a.n, kWarps)), dim3(kThreads), 0, context.stream, a, shift,
           halves, info);
    return {shift,
            halves,
            info,
            context.scratch<Half>(a.groups * a.k * depth),
            context.scratch<RowInfo>(a.groups * a.k),
            context.scratch<float2>(a.groups * padded_columns(a.k)),
            {context.scratch<int64_t>(a.groups * a.n), context.scratch<unsigned long long>(a.groups)}};
}

template <class S>
void assign_filtered(const Assignment<S>& a, const Filter& filter, const Context& context) {
    void* stream = context.stream;
    launch("round_centroids", round_centroids<S>, grid_of(ceil_div(a.groups * padded_columns(a.k), kWarps)), dim3(kThreads), 0,
           stream, a, filter);
    launch("filter_tiles", filter_tiles<S>, grid_of(a.groups * ceil_div(a.n, HalfTile::kRows), kBlocksPerProcessor),
           dim3(HalfTile::kThreads), sizeof(FilterShared), stream, a, filter);
    if (a.exact) {
        Assignment<S> rest = a;
        rest.distances = nullptr;
        assign_directly(rest, filter.undecided, context);
    }
    if (a.distances != nullptr) measure_rows(a, context);
}

template <class S>
void measure_rows(const Assignment<S>& a, const Context& context) {
    launch("measure", measure<S>, grid_of(ceil_div(a.groups * a.n, kWarps)), dim3(kThreads), 0, context.stream, a);
}

template void measure_rows(const Assignment<float>&, const Context&);
template void measure_rows(const Assignment<double>&, const Context&);
template void measure_rows(const Assignment<Float16>&, const Context&);
template void measure_rows(const Assignment<Bfloat16>&, const Context&);

template Filter prepare_filter(const Assignment<float>&, const Context&);
template Filter prepare_filter(const Assignment<Float16>&, const Context&);
template Filter prepare_filter(const Assignment<Bfloat16>&, const Context&);

template void assign_filtered(const Assignment<float>&, const Filter&, const Context&);
template void assign_filtered(const Assignment<Float16>&, const Filter&, const Context&);
template void assign_filtered(const Assignment<Bfloat16>&, const Filter&, const Context&);

}  // namespace fastclust::kmeans::cuda

#include <cmath>

#include "kmeans/kmeans_cuda.h"

namespace fastclust::kmeans::cuda {
namespace {

using fastclust::cuda::ceil_div;
using fastclust::cuda::grid_of;
using fastclust::cuda::Half;
using fastclust::cuda::HalfTile;
using fastclust::cuda::kAllLanes;
using fastclust::cuda::kWarp;
using fastclust::cuda::launch;
using fastclust::cuda::padded_depth;
using fastclust::cuda::round_row;
using fastclust::cuda::RowInfo;
using fastclust::cuda::shared_memory;
using fastclust::cuda::warp_sum;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

__host__ __device__ int64_t padded_columns(int64_t k) {
    return ceil_div(k, HalfTile::kCols) * HalfTile::kCols;
}

/// shift (B, D): the mean of the first restart's centroids. Any would do; this one keeps the products small.
__global__ void average_centroids(Assignment<float> a, float* shift) {
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.groups / a.restarts * a.d; i += stride) {
        const float* centroids = a.centroids + i / a.d * a.restarts * a.k * a.d + i % a.d;
        double sum = 0;
        for (int64_t k = 0; k < a.k; ++k) sum += double(centroids[k * a.d]);
        shift[i] = static_cast<float>(sum / double(a.k));
    }
}

__global__ void __launch_bounds__(kThreads) round_rows(Assignment<float> a, const float* shift, Half* halves, RowInfo* info) {
    const int64_t stride = int64_t(gridDim.x) * kWarps, rows = a.groups / a.restarts * a.n;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < rows; row += stride) {
        const RowInfo found = round_row(a.x + row * a.d, shift + row / a.n * a.d, a.d, halves + row * padded_depth(a.d));
        if (threadIdx.x % kWarp == 0) info[row] = found;
    }
}

/// One warp per centroid or column of padding, whose infinite square keeps it from being nearest.
__global__ void __launch_bounds__(kThreads) round_centroids(Assignment<float> a, Filter f) {
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

/// One warp per group.
__global__ void find_worst(Assignment<float> a, Filter f) {
    const int lane = threadIdx.x;
    for (int64_t g = blockIdx.x; g < a.groups; g += gridDim.x) {
        if (a.skips(g)) continue;
        float norm = 0, error = 0;
        for (int64_t k = lane; k < a.k; k += kWarp) {
            norm = fmaxf(norm, f.centroid_info[g * a.k + k].norm);
            error = fmaxf(error, f.centroid_info[g * a.k + k].error);
        }
        for (int bits = kWarp / 2; bits > 0; bits /= 2) {
            norm = fmaxf(norm, __shfl_xor_sync(kAllLanes, norm, bits));
            error = fmaxf(error, __shfl_xor_sync(kAllLanes, error, bits));
        }
        if (lane == 0) f.worst[g] = {norm, error};
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

struct FilterShared {
    HalfTile::Shared tile;
    Best best[HalfTile::kRows];
    int changed;
};

/// How far a score |c|^2 - 2 x.c of this row may be from the truth, for any centroid: twice the error of the product as
/// half_tile_cuda.h bounds it, the rounding of |c|^2, and that of the score.
__device__ float score_error(const RowInfo& x, float2 worst, int64_t depth) {
    const float norm = worst.x + worst.y;
    const float product = x.error * norm + x.norm * worst.y + float(depth) * 0x1p-22f * x.norm * worst.x;
    return 2 * product + 0x1p-21f * (norm * norm + 2 * x.norm * norm);
}

/// One block per 128 rows of a group; |x|^2 never matters to the least score.
__global__ void __launch_bounds__(HalfTile::kThreads, 2) filter_tiles(Assignment<float> a, Filter f) {
    auto& shared = *shared_memory<FilterShared>();
    const int64_t tiles = ceil_div(a.n, HalfTile::kRows), depth = padded_depth(a.d), columns = padded_columns(a.k);
    for (int64_t tile = blockIdx.x; tile < a.groups * tiles; tile += gridDim.x) {
        const int64_t g = tile / tiles, start = tile % tiles * HalfTile::kRows, first_row = a.problem(g) * a.n + start;
        if (a.skips(g)) continue;
        Best best[HalfTile::kDown][2];
        float factor[HalfTile::kDown][2];
        for (int i = 0; i < HalfTile::kDown; ++i)
            for (int half = 0; half < 2; ++half) {
                const int row = HalfTile::row_of(i, 2 * half);
                best[i][half] = {INFINITY, INFINITY, 0};
                factor[i][half] = start + row < a.n ? f.x_info[first_row + row].factor : 0;
            }
        for (int64_t first = 0; first < a.k; first += HalfTile::kCols) {
            float sum[HalfTile::kDown][HalfTile::kAcross][4];
            HalfTile::run(f.x + first_row * depth, a.n - start, f.centroids + (g * a.k + first) * depth, a.k - first, depth,
                          shared.tile, sum);
#pragma unroll
            for (int j = 0; j < HalfTile::kAcross; ++j)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const int64_t k = first + HalfTile::col_of(j, side);
                    const float2 column = f.columns[g * columns + k];
#pragma unroll
                    for (int i = 0; i < HalfTile::kDown; ++i)
#pragma unroll
                        for (int half = 0; half < 2; ++half)
                            best[i][half].take(column.x - sum[i][j][2 * half + side] * column.y * factor[i][half],
                                               static_cast<int32_t>(k));
                }
        }
        __syncthreads();
        if (threadIdx.x == 0) shared.changed = 0;
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
        for (int i = 0; i < HalfTile::kDown; ++i)
            for (int half = 0; half < 2; ++half) {
                const int64_t row = start + HalfTile::row_of(i, 2 * half);
                if (right || !leads || row >= a.n) continue;
                best[i][half].merge(shared.best[row - start]);
                const float error = score_error(f.x_info[first_row + row - start], f.worst[g], depth);
                const bool decided = !a.exact || best[i][half].second - best[i][half].least > 2 * error;
                const int64_t fixed = a.fixed_label(g, row), at = g * a.n + row;
                if (fixed < 0 && !decided) {
                    f.undecided.rows[g * a.n + static_cast<int64_t>(atomicAdd(&f.undecided.count[g], 1ULL))] = row;
                    continue;
                }
                const int64_t label = fixed >= 0 ? fixed : best[i][half].label;
                if (a.group != nullptr && a.labels[at] != label) atomicAdd(&shared.changed, 1);
                a.labels[at] = label;
            }
        __syncthreads();
        if (threadIdx.x == 0 && shared.changed > 0)
            atomicAdd(&a.group[g].changed, static_cast<unsigned long long>(shared.changed));
    }
}

/// One warp per row.
template <class T>
__global__ void __launch_bounds__(kThreads) measure(Assignment<T> a) {
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t at = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; at < a.groups * a.n; at += stride) {
        const int64_t g = at / a.n;
        const T* x = a.x + (a.problem(g) * a.n + at % a.n) * a.d;
        const T* centroid = a.centroids + (g * a.k + a.labels[at]) * a.d;
        T sum = 0;
        for (int64_t t = threadIdx.x % kWarp; t < a.d; t += kWarp) sum += (x[t] - centroid[t]) * (x[t] - centroid[t]);
        sum = warp_sum(sum);
        if (threadIdx.x % kWarp == 0) a.distances[at] = sum;
    }
}

}  // namespace

Filter prepare_filter(const Assignment<float>& a, const Context& context) {
    const int64_t problems = a.groups / a.restarts, depth = padded_depth(a.d);
    auto* shift = context.scratch<float>(problems * a.d);
    auto* halves = context.scratch<Half>(problems * a.n * depth);
    auto* info = context.scratch<RowInfo>(problems * a.n);
    launch("average_centroids", average_centroids, grid_of(ceil_div(problems * a.d, kThreads)), dim3(kThreads), 0,
           context.stream, a, shift);
    launch("round_rows", round_rows, grid_of(ceil_div(problems * a.n, kWarps)), dim3(kThreads), 0, context.stream, a, shift,
           halves, info);
    return {shift,
            halves,
            info,
            context.scratch<Half>(a.groups * a.k * depth),
            context.scratch<RowInfo>(a.groups * a.k),
            context.scratch<float2>(a.groups * padded_columns(a.k)),
            context.scratch<float2>(a.groups),
            {context.scratch<int64_t>(a.groups * a.n), context.scratch<unsigned long long>(a.groups)}};
}

void assign_filtered(const Assignment<float>& a, const Filter& filter, const Context& context) {
    void* stream = context.stream;
    launch("round_centroids", round_centroids, grid_of(ceil_div(a.groups * padded_columns(a.k), kWarps)), dim3(kThreads), 0,
           stream, a, filter);
    launch("find_worst", find_worst, grid_of(a.groups), dim3(kWarp), 0, stream, a, filter);
    launch("filter_tiles", filter_tiles, grid_of(a.groups * ceil_div(a.n, HalfTile::kRows)), dim3(HalfTile::kThreads),
           sizeof(FilterShared), stream, a, filter);
    if (a.exact) {
        Assignment<float> rest = a;
        rest.distances = nullptr;
        assign_directly(rest, filter.undecided, context);
    }
    if (a.distances != nullptr) measure_rows(a, context);
}

template <class T>
void measure_rows(const Assignment<T>& a, const Context& context) {
    launch("measure", measure<T>, grid_of(ceil_div(a.groups * a.n, kWarps)), dim3(kThreads), 0, context.stream, a);
}

template void measure_rows(const Assignment<float>&, const Context&);
template void measure_rows(const Assignment<double>&, const Context&);

}  // namespace fastclust::kmeans::cuda

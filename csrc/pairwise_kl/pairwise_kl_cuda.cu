// Both directions of KL come from one tile of rows i against rows j: with the difference u = log p_i - log p_j, p_i u goes to
// KL_ij and -p_j u to KL_ji. Nothing of size B x B is stored; the gradient makes each tile again, since what a pair counts for
// is known only when all pairs are counted. float batches of any size go by products instead (products_cuda.cu).
#include <algorithm>
#include <climits>
#include <cmath>

#include "pairwise_kl/pairwise_kl_cuda.h"

namespace fastclust::pairwise_kl::cuda {
namespace {

using namespace fastclust::cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 64;   // of i and of j per tile
constexpr int kDepth = 16;  // of K per step
constexpr int kSide = 4;    // each thread owns kSide x kSide pairs
constexpr int kPadded = kRows + kSide;

template <class T>
struct TileShared {
    alignas(16) T log_i[kDepth][kPadded];
    alignas(16) T p_i[kDepth][kPadded];
    alignas(16) T log_j[kDepth][kPadded];
    alignas(16) T p_j[kDepth][kPadded];
};

__device__ int first_row() {
    return static_cast<int>(threadIdx.x) / 16 * kSide;
}
__device__ int first_col() {
    return static_cast<int>(threadIdx.x) % 16 * kSide;
}

/// forth[i][j] = KL of row i0 + first_row() + i from row j0 + first_col() + j, back[i][j] the other way round.
template <class T>
__device__ void divergences(const Batch<T>& a, int64_t i0, int64_t j0, TileShared<T>& s, T (&forth)[kSide][kSide],
                            T (&back)[kSide][kSide]) {
    for (int i = 0; i < kSide; ++i)
        for (int j = 0; j < kSide; ++j) forth[i][j] = back[i][j] = T(0);
    for (int64_t start = 0; start < a.k; start += kDepth) {
        __syncthreads();
        for (int e = threadIdx.x; e < kRows * kDepth; e += kThreads) {
            const int row = e / kDepth, t = e % kDepth;
            const bool inside = start + t < a.k;
            const T log_i = inside && i0 + row < a.b ? a.log_p[(i0 + row) * a.k + start + t] : -static_cast<T>(INFINITY);
            const T log_j = inside && j0 + row < a.b ? a.log_p[(j0 + row) * a.k + start + t] : -static_cast<T>(INFINITY);
            s.log_i[t][row] = log_i;
            s.p_i[t][row] = exp(log_i);
            s.log_j[t][row] = log_j;
            s.p_j[t][row] = exp(log_j);
        }
        __syncthreads();
#pragma unroll
        for (int t = 0; t < kDepth; ++t) {
            T log_i[kSide], p_i[kSide], log_j[kSide], p_j[kSide];
#pragma unroll
            for (int i = 0; i < kSide; ++i) {
                log_i[i] = s.log_i[t][first_row() + i];
                p_i[i] = s.p_i[t][first_row() + i];
                log_j[i] = s.log_j[t][first_col() + i];
                p_j[i] = s.p_j[t][first_col() + i];
            }
#pragma unroll
            for (int i = 0; i < kSide; ++i)
#pragma unroll
                for (int j = 0; j < kSide; ++j) {
                    const T u = log_i[i] - log_j[j];
                    if (p_i[i] > T(0)) forth[i][j] += p_i[i] * u;  // 0 log 0 = 0, even where u is not a number
                    if (p_j[j] > T(0)) back[i][j] -= p_j[j] * u;
                }
        }
    }
}

enum class Pair { none, similar, dissimilar };

template <class T>
__device__ Pair pair_of(const Batch<T>& a, int64_t i, int64_t j) {
    if (i >= a.b || j >= a.b || i == j || a.labels[i] < 0 || a.labels[j] < 0) return Pair::none;
    return a.labels[i] == a.labels[j] ? Pair::similar : Pair::dissimilar;
}

struct Partial {
    double sums[2];
    int64_t pairs[2];  // unordered
};

struct ReduceShared {
    double sums[kWarps];
    int64_t pairs[kWarps];
};

template <class T>
struct LossShared {
    TileShared<T> tile;
    ReduceShared reduce;
};

/// Tiles i0 <= j0, numbered row by row; partials (gridDim.x): what each block summed.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_pairs(Batch<T> a, Partial* partials) {
    auto& shared = *shared_memory<LossShared<T>>();
    const int64_t side = ceil_div(a.b, kRows);
    double sums[2] = {0, 0};
    int64_t pairs[2] = {0, 0};
    for (int64_t tile = blockIdx.x; tile < side * side; tile += gridDim.x) {
        const int64_t i0 = tile / side * kRows, j0 = tile % side * kRows;
        if (i0 > j0) continue;
        T forth[kSide][kSide], back[kSide][kSide];
        divergences(a, i0, j0, shared.tile, forth, back);
        for (int i = 0; i < kSide; ++i)
            for (int j = 0; j < kSide; ++j) {
                const int64_t row = i0 + first_row() + i, col = j0 + first_col() + j;
                const Pair pair = row < col ? pair_of(a, row, col) : Pair::none;
                if (pair == Pair::none) continue;
                const bool similar = pair == Pair::similar;
                const T hinge_forth = forth[i][j] < a.margin ? a.margin - forth[i][j] : T(0);
                const T hinge_back = back[i][j] < a.margin ? a.margin - back[i][j] : T(0);
                sums[similar ? 0 : 1] +=
                    similar ? double(forth[i][j]) + double(back[i][j]) : double(hinge_forth) + double(hinge_back);
                ++pairs[similar ? 0 : 1];
            }
    }
    Partial partial;
    for (int kind = 0; kind < 2; ++kind) {
        partial.sums[kind] = block_sum(sums[kind], shared.reduce.sums);
        partial.pairs[kind] = block_sum(pairs[kind], shared.reduce.pairs);
    }
    if (threadIdx.x == 0) partials[blockIdx.x] = partial;
}

/// The loss, and what a similar pair's and a counting dissimilar pair's divergence adds to it: slopes (2).
template <class T>
__global__ void __launch_bounds__(kThreads) average(Loss<T> a, T* slopes, const Partial* partials, int64_t count) {
    auto& shared = *shared_memory<ReduceShared>();
    double loss = 0;
    for (int kind = 0; kind < 2; ++kind) {
        double sum = 0;
        int64_t pairs = 0;
        for (int64_t i = threadIdx.x; i < count; i += kThreads) {
            sum += partials[i].sums[kind];
            pairs += partials[i].pairs[kind];
        }
        sum = block_sum(sum, shared.sums);
        pairs = block_sum(pairs, shared.pairs);
        if (threadIdx.x != 0) continue;
        loss += pairs > 0 ? sum / double(pairs) : 0;
        slopes[kind] = pairs > 0 ? static_cast<T>((kind == 0 ? 1 : -1) / double(pairs)) : T(0);
    }
    if (threadIdx.x == 0) *a.loss = static_cast<T>(loss);
}

constexpr int kPanel = 128;  // columns of the gradient that one block holds in registers
constexpr int kPieces = kPanel / 64;

template <class T>
struct GradientShared {
    TileShared<T> tile;
    uint32_t slopes[kRows][kPadded];  // at [j][i] that of G_ij, times 4 that of G_ji: 0 none, 1 similar, 2 dissimilar
    T log_j[kDepth][kPanel];          // a step of 16 rows j
    T p_j[kDepth][kPanel];
};

/// What one split of the rows j gives to a row i; the splits are added in their order.
template <class T>
struct GradientTask {
    Loss<T> a;
    const T* slopes;            // (2)
    int64_t splits, per_split;  // of the tiles of rows j
    T* weights;                 // (splits, B): sum_j G_ij
    T* logs;                    // (splits, B, K): sum_j G_ij log p_j
    T* masses;                  // (splits, B, K): sum_j G_ji p_j
};

/// One block per 64 rows i, panel of 128 columns and split.
template <class T>
__global__ void __launch_bounds__(kThreads) pull_pairs(GradientTask<T> task) {
    const Batch<T>& a = task.a.batch;
    auto& shared = *shared_memory<GradientShared<T>>();
    const int64_t side = ceil_div(a.b, kRows), panels = ceil_div(a.k, kPanel);
    const T similar = task.slopes[0], dissimilar = task.slopes[1];
    const auto value_of = [&](uint32_t slope) { return slope == 1 ? similar : slope == 2 ? dissimilar : T(0); };
    for (int64_t piece = blockIdx.x; piece < task.splits * panels * side; piece += gridDim.x) {
        const int64_t i0 = piece % side * kRows, panel = piece / side % panels * kPanel, split = piece / side / panels;
        T logs[kPieces][kSide][kSide] = {}, masses[kPieces][kSide][kSide] = {}, weights[kSide] = {};
        for (int64_t tile = split * task.per_split; tile < (split + 1) * task.per_split && tile < side; ++tile) {
            const int64_t j0 = tile * kRows;
            T forth[kSide][kSide], back[kSide][kSide];
            divergences(a, i0, j0, shared.tile, forth, back);
            for (int i = 0; i < kSide; ++i)
                for (int j = 0; j < kSide; ++j) {
                    const Pair pair = pair_of(a, i0 + first_row() + i, j0 + first_col() + j);
                    const auto slope = [&](T divergence) -> uint32_t {
                        if (pair == Pair::similar) return 1;
                        return pair == Pair::dissimilar && divergence < a.margin ? 2 : 0;
                    };
                    const uint32_t out = slope(forth[i][j]);
                    weights[i] += value_of(out);
                    shared.slopes[first_col() + j][first_row() + i] = out + 4 * slope(back[i][j]);
                }
            for (int first = 0; first < kRows; first += kDepth) {
                __syncthreads();
                for (int e = threadIdx.x; e < kDepth * kPanel; e += kThreads) {
                    const int t = e / kPanel, column = e % kPanel;
                    const bool inside = j0 + first + t < a.b && panel + column < a.k;
                    const T log_p = inside ? a.log_p[(j0 + first + t) * a.k + panel + column] : T(0);
                    shared.log_j[t][column] = log_p;
                    shared.p_j[t][column] = exp(log_p);
                }
                __syncthreads();
                for (int t = 0; t < kDepth; ++t)
#pragma unroll
                    for (int i = 0; i < kSide; ++i) {
                        const uint32_t slopes = shared.slopes[first + t][first_row() + i];
                        const T out = value_of(slopes % 4), in = value_of(slopes / 4);
#pragma unroll
                        for (int c = 0; c < kPieces; ++c)
#pragma unroll
                            for (int j = 0; j < kSide; ++j) {
                                const int column = c * 64 + first_col() + j;
                                if (out != T(0)) logs[c][i][j] += out * shared.log_j[t][column];
                                masses[c][i][j] += in * shared.p_j[t][column];
                            }
                    }
            }
        }
        for (int i = 0; i < kSide; ++i) {
            for (int bits = 8; bits > 0; bits /= 2) weights[i] += __shfl_xor_sync(kAllLanes, weights[i], bits);
            const int64_t row = i0 + first_row() + i;
            if (row >= a.b) continue;
            if (panel == 0 && first_col() == 0) task.weights[split * a.b + row] = weights[i];
            for (int c = 0; c < kPieces; ++c)
                for (int j = 0; j < kSide; ++j) {
                    const int64_t column = panel + c * 64 + first_col() + j;
                    if (column >= a.k) continue;
                    task.logs[(split * a.b + row) * a.k + column] = logs[c][i][j];
                    task.masses[(split * a.b + row) * a.k + column] = masses[c][i][j];
                }
        }
    }
}

/// grad_ik = p_ik ((log p_ik + 1) sum_j G_ij - sum_j G_ij log p_jk) - sum_j G_ji p_jk.
template <class T>
__global__ void add_splits(GradientTask<T> task) {
    const Batch<T>& a = task.a.batch;
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.b * a.k; i += stride) {
        double weight = 0, logs = 0, mass = 0;
        for (int64_t split = 0; split < task.splits; ++split) {
            weight += double(task.weights[split * a.b + i / a.k]);
            logs += double(task.logs[split * a.b * a.k + i]);
            mass += double(task.masses[split * a.b * a.k + i]);
        }
        const double log_p = a.log_p[i], p = exp(log_p);
        const double own = task.a.detach_target || !(p > 0) ? 0 : p * ((log_p + 1) * weight - logs);
        task.a.grad_log_p[i] = static_cast<T>(own - mass);
    }
}

/// One warp per row; result: count and first of the rows of log_p with NaN or +inf, then of the labels below -1.
template <class T>
__global__ void inspect_rows(Batch<T> a, unsigned long long* result) {
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < a.b; row += stride) {
        bool bad = false;
        for (int64_t i = lane; i < a.k; i += kWarp) bad |= !(a.log_p[row * a.k + i] < static_cast<T>(INFINITY));
        if (__any_sync(kAllLanes, bad) && lane == 0) {
            atomicAdd(&result[0], 1ULL);
            atomicMin(&result[1], static_cast<unsigned long long>(row));
        }
        if (lane == 0 && a.labels[row] < -1) {
            atomicAdd(&result[2], 1ULL);
            atomicMin(&result[3], static_cast<unsigned long long>(row));
        }
    }
}

template <class T>
Findings inspect(const Batch<T>& a, const Context& context) {
    if (is_capturing(context.stream)) return {};
    const auto stream = static_cast<cudaStream_t>(context.stream);
    unsigned long long host[4] = {0, ULLONG_MAX, 0, ULLONG_MAX};
    auto* result = context.scratch<unsigned long long>(4);
    check(cudaMemcpyAsync(result, host, sizeof host, cudaMemcpyHostToDevice, stream), "inspect_rows");
    launch("inspect_rows", inspect_rows<T>, grid_of(ceil_div(a.b, kWarps)), dim3(kThreads), 0, context.stream, a, result);
    check(cudaMemcpyAsync(host, result, sizeof host, cudaMemcpyDeviceToHost, stream), "inspect_rows");
    check(cudaStreamSynchronize(stream), "inspect_rows");
    const auto rows = [&](int i) {
        const auto count = static_cast<int64_t>(host[i]);
        return finite::BadRows{count, count == 0 ? -1 : static_cast<int64_t>(host[i + 1])};
    };
    return {rows(0), rows(2)};
}

template <class T>
void gradient(const Loss<T>& a, const T* slopes, const Context& context) {
    constexpr int64_t kWantedBlocks = 1024;  // a constant, so that the sums do not depend on the device
    const int64_t b = a.batch.b, k = a.batch.k;
    if (b == 0 || k == 0) return;
    const int64_t side = ceil_div(b, kRows), panels = ceil_div(k, kPanel);
    const int64_t splits = kWantedBlocks / (side * panels) < 1 ? 1 : kWantedBlocks / (side * panels);
    GradientTask<T> task{a, slopes, splits, ceil_div(side, splits), nullptr, nullptr, nullptr};
    task.splits = ceil_div(side, task.per_split);
    task.weights = context.scratch<T>(task.splits * b);
    task.logs = context.scratch<T>(task.splits * b * k);
    task.masses = context.scratch<T>(task.splits * b * k);
    launch("pull_pairs", pull_pairs<T>, grid_of(task.splits * panels * side), dim3(kThreads), sizeof(GradientShared<T>),
           context.stream, task);
    launch("add_splits", add_splits<T>, grid_of(ceil_div(b * k, kThreads)), dim3(kThreads), 0, context.stream, task);
}

template <class T>
void loss(const Loss<T>& a, const Context& context) {
    if constexpr (sizeof(T) == sizeof(float)) {
        constexpr int64_t kPanelBytes = int64_t{1} << 27;
        if (wants_products(a.batch))
            return loss_by_products(a, std::max<int64_t>(128, kPanelBytes / (4 * a.batch.b) / 128 * 128), context);
    }
    constexpr int64_t kLossBlocks = 4096;  // a constant, for the same reason
    const int64_t side = ceil_div(a.batch.b, kRows);
    const dim3 grid = grid_of(std::min(side * side, kLossBlocks));
    const auto blocks = static_cast<int64_t>(grid.x);
    auto* partials = context.scratch<Partial>(blocks);
    auto* slopes = context.scratch<T>(2);
    launch("sum_pairs", sum_pairs<T>, grid, dim3(kThreads), sizeof(LossShared<T>), context.stream, a.batch, partials);
    launch("average", average<T>, dim3(1), dim3(kThreads), sizeof(ReduceShared), context.stream, a, slopes, partials, blocks);
    if (a.grad_log_p != nullptr) gradient(a, slopes, context);
}

template <class T>
constexpr Kernels<T> kTable{inspect<T>, loss<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::pairwise_kl::cuda

#include <cmath>

#include "common/tile_cuda.h"
#include "soft_assign/soft_assign.h"

namespace fastclust::soft_assign::cuda {
namespace {

using namespace fastclust::cuda;

template <class T>
using Tile = PairTile<T, SquaredDifference>;

/// log sum exp as it grows: greatest + log(sum).
template <class T>
struct LogSum {
    T greatest, sum;

    __device__ void add(T other_greatest, T other_sum) {
        const T top = other_greatest > greatest ? other_greatest : greatest;
        if (!(top > -static_cast<T>(INFINITY))) return;
        sum = sum * exp(greatest - top) + other_sum * exp(other_greatest - top);
        greatest = top;
    }
};

/// One block per 64 rows: -|x - mu|^2 is written, then each thread takes log sum exp from the elements that it wrote itself.
template <class T>
__global__ void __launch_bounds__(Tile<T>::kThreads) assign_tiles(Forward<T> a) {
    constexpr int kSide = Tile<T>::kSide;
    auto& shared = *shared_memory<typename Tile<T>::Shared>();
    for (int64_t tile = blockIdx.x; tile < ceil_div(a.n, Tile<T>::kRows); tile += gridDim.x) {
        const int64_t start = tile * Tile<T>::kRows, first_row = start + Tile<T>::first_row();
        LogSum<T> total[kSide];
        for (auto& sum : total) sum = {-static_cast<T>(INFINITY), T(0)};
        for (int64_t first = 0; first < a.k; first += Tile<T>::kCols) {
            T distance[kSide][kSide];
            Tile<T>::run([&](int i) { return start + i < a.n ? a.x + (start + i) * a.d : nullptr; },
                         [&](int j) { return first + j < a.k ? a.centroids + (first + j) * a.d : nullptr; }, a.d, shared,
                         distance);
            for (int i = 0; i < kSide; ++i)
                for (int j = 0; j < kSide; ++j) {
                    const int64_t row = first_row + i, k = first + Tile<T>::first_col() + j;
                    if (row >= a.n || k >= a.k) continue;
                    a.log_p[row * a.k + k] = -distance[i][j];
                    total[i].add(-distance[i][j], T(1));
                }
        }
        for (auto& sum : total)
            for (int bits = 8; bits > 0; bits /= 2) {
                const T greatest = __shfl_xor_sync(kAllLanes, sum.greatest, bits);
                const T partial = __shfl_xor_sync(kAllLanes, sum.sum, bits);
                sum.add(greatest, partial);
            }
        for (int64_t first = Tile<T>::first_col(); first < a.k; first += Tile<T>::kCols)
            for (int i = 0; i < kSide; ++i)
                for (int j = 0; j < kSide; ++j) {
                    const int64_t row = first_row + i, k = first + j;
                    if (row >= a.n || k >= a.k) continue;
                    // Minus the greatest first: where distances are large, the logarithm of the sum would drown in it.
                    a.log_p[row * a.k + k] = a.log_p[row * a.k + k] - total[i].greatest - log(total[i].sum);
                }
    }
}

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

/// sums[n] = sum_k grad_nk, one warp per row.
template <class T>
__global__ void sum_rows(const T* grad, int64_t n, int64_t k, T* sums) {
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < n; row += stride) {
        T sum = 0;
        for (int64_t i = lane; i < k; i += kWarp) sum += grad[row * k + i];
        sum = warp_sum(sum);
        if (lane == 0) sums[row] = sum;
    }
}

/// out(i, j) = 2 sum_t weight(i, t) (value(t, j) - base(i, j)) for 64 x 64 elements of a gradient.
template <class T>
struct PullTile {
    static constexpr int kRows = 64, kCols = 64, kDepth = 16, kSide = 4;

    struct Shared {
        alignas(16) T weight[kDepth][kRows + kSide];
        alignas(16) T value[kDepth][kCols + kSide];
    };

    __device__ static int first_row() { return static_cast<int>(threadIdx.x) / 16 * kSide; }
    __device__ static int first_col() { return static_cast<int>(threadIdx.x) % 16 * kSide; }

    /// weight(t, i) and value(t, j) are 0 and anything where i, j or t lies outside; `depth_first` tells in which of its two
    /// arguments weight reads neighbouring memory.
    template <class Weight, class Value>
    __device__ static void run(const Weight& weight, const Value& value, int64_t begin, int64_t end, bool depth_first,
                               Shared& shared, const T (&base)[kSide][kSide], T (&out)[kSide][kSide]) {
        for (int i = 0; i < kSide; ++i)
            for (int j = 0; j < kSide; ++j) out[i][j] = T(0);
        for (int64_t start = begin; start < end; start += kDepth) {
            __syncthreads();
            for (int e = threadIdx.x; e < kDepth * kRows; e += kThreads) {
                const int i = depth_first ? e / kDepth : e % kRows, t = depth_first ? e % kDepth : e / kRows;
                shared.weight[t][i] = start + t < end ? weight(start + t, i) : T(0);
                const int u = e / kCols, j = e % kCols;
                shared.value[u][j] = start + u < end ? value(start + u, j) : T(0);
            }
            __syncthreads();
#pragma unroll
            for (int t = 0; t < kDepth; ++t)
#pragma unroll
                for (int i = 0; i < kSide; ++i)
#pragma unroll
                    for (int j = 0; j < kSide; ++j)
                        out[i][j] += shared.weight[t][first_row() + i] * (shared.value[t][first_col() + j] - base[i][j]);
        }
    }
};

template <class T>
struct Pull {
    Backward<T> a;
    const T* sums;          // (N)
    int64_t chunk, chunks;  // rows of x per partial sum of the centroids' gradient
    T* partials;            // (chunks, K, D)

    __device__ T weight(int64_t n, int64_t k) const { return a.grad[n * a.k + k] - exp(a.log_p[n * a.k + k]) * sums[n]; }
};

/// One block per 64 rows x 64 columns of grad_x.
template <class T>
__global__ void __launch_bounds__(kThreads) pull_rows(Pull<T> p) {
    using P = PullTile<T>;
    const Backward<T>& a = p.a;
    auto& shared = *shared_memory<typename P::Shared>();
    const int64_t across = ceil_div(a.d, P::kCols);
    for (int64_t tile = blockIdx.x; tile < ceil_div(a.n, P::kRows) * across; tile += gridDim.x) {
        const int64_t row = tile / across * P::kRows, col = tile % across * P::kCols;
        T base[P::kSide][P::kSide], out[P::kSide][P::kSide];
        const auto element = [&](int i, int j) -> int64_t {
            const int64_t n = row + P::first_row() + i, d = col + P::first_col() + j;
            return n < a.n && d < a.d ? n * a.d + d : -1;
        };
        for (int i = 0; i < P::kSide; ++i)
            for (int j = 0; j < P::kSide; ++j) base[i][j] = element(i, j) >= 0 ? a.x[element(i, j)] : T(0);
        P::run([&](int64_t k, int i) { return row + i < a.n ? p.weight(row + i, k) : T(0); },
               [&](int64_t k, int j) { return col + j < a.d ? a.centroids[k * a.d + col + j] : T(0); }, 0, a.k, true, shared,
               base, out);
        for (int i = 0; i < P::kSide; ++i)
            for (int j = 0; j < P::kSide; ++j)
                if (element(i, j) >= 0) a.grad_x[element(i, j)] = 2 * out[i][j];
    }
}

/// One block per 64 centroids x 64 columns and chunk of rows.
template <class T>
__global__ void __launch_bounds__(kThreads) pull_centroids(Pull<T> p) {
    using P = PullTile<T>;
    const Backward<T>& a = p.a;
    auto& shared = *shared_memory<typename P::Shared>();
    const int64_t across = ceil_div(a.d, P::kCols), down = ceil_div(a.k, P::kRows);
    for (int64_t tile = blockIdx.x; tile < p.chunks * down * across; tile += gridDim.x) {
        const int64_t chunk = tile / across / down, k0 = tile / across % down * P::kRows, col = tile % across * P::kCols;
        const int64_t begin = chunk * p.chunk, end = begin + p.chunk < a.n ? begin + p.chunk : a.n;
        T base[P::kSide][P::kSide], out[P::kSide][P::kSide];
        const auto element = [&](int i, int j) -> int64_t {
            const int64_t k = k0 + P::first_row() + i, d = col + P::first_col() + j;
            return k < a.k && d < a.d ? k * a.d + d : -1;
        };
        for (int i = 0; i < P::kSide; ++i)
            for (int j = 0; j < P::kSide; ++j) base[i][j] = element(i, j) >= 0 ? a.centroids[element(i, j)] : T(0);
        P::run([&](int64_t n, int i) { return k0 + i < a.k ? p.weight(n, k0 + i) : T(0); },
               [&](int64_t n, int j) { return col + j < a.d ? a.x[n * a.d + col + j] : T(0); }, begin, end, false, shared, base,
               out);
        for (int i = 0; i < P::kSide; ++i)
            for (int j = 0; j < P::kSide; ++j)
                if (element(i, j) >= 0) p.partials[chunk * a.k * a.d + element(i, j)] = out[i][j];
    }
}

template <class T>
__global__ void add_partials(Pull<T> p) {
    const int64_t size = p.a.k * p.a.d, stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size; i += stride) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum += double(p.partials[chunk * size + i]);
        p.a.grad_centroids[i] = static_cast<T>(2 * sum);
    }
}

template <class T>
void forward(const Forward<T>& a, const Context& context) {
    launch("assign_tiles", assign_tiles<T>, grid_of(ceil_div(a.n, Tile<T>::kRows)), dim3(Tile<T>::kThreads),
           sizeof(typename Tile<T>::Shared), context.stream, a);
}

template <class T>
void backward(const Backward<T>& a, const Context& context) {
    using P = PullTile<T>;
    constexpr int64_t kMostChunks = 64, kLeastChunk = 256;
    void* stream = context.stream;
    T* sums = context.scratch<T>(a.n);
    Pull<T> p{a, sums, 0, 0, nullptr};
    p.chunk = ceil_div(a.n, kMostChunks) > kLeastChunk ? ceil_div(a.n, kMostChunks) : kLeastChunk;
    p.chunks = ceil_div(a.n, p.chunk);
    p.partials = context.scratch<T>(p.chunks * a.k * a.d);
    const int64_t across = ceil_div(a.d, P::kCols);
    launch("sum_rows", sum_rows<T>, grid_of(ceil_div(a.n, kWarps)), dim3(kThreads), 0, stream, a.grad, a.n, a.k, sums);
    launch("pull_rows", pull_rows<T>, grid_of(ceil_div(a.n, P::kRows) * across), dim3(kThreads), sizeof(typename P::Shared),
           stream, p);
    launch("pull_centroids", pull_centroids<T>, grid_of(p.chunks * ceil_div(a.k, P::kRows) * across), dim3(kThreads),
           sizeof(typename P::Shared), stream, p);
    launch("add_partials", add_partials<T>, grid_of(ceil_div(a.k * a.d, kThreads)), dim3(kThreads), 0, stream, p);
}

template <class T>
constexpr Kernels<T> kTable{forward<T>, backward<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::soft_assign::cuda

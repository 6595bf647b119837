// Small building blocks over lists in memory: a warp's in-place sort, and prefix sums over the whole device.
#pragma once

#include "common/cuda.h"

namespace fastclust::cuda {

/// Sorts data[0 .. count) in place so that before(data[i + 1], data[i]) holds for no i; the whole warp calls. A bitonic network
/// whose every comparator puts the smaller element first, so that any count will do: what lies beyond counts as last.
template <class T, class Before>
__device__ void warp_sort(T* data, int64_t count, const Before& before) {
    const int64_t lane = threadIdx.x % kWarp;
    const auto order = [&](int64_t a, int64_t b) {
        if (b >= count || !before(data[b], data[a])) return;
        const T moved = data[a];
        data[a] = data[b];
        data[b] = moved;
    };
    __syncwarp();
    for (int64_t size = 2; size / 2 < count; size *= 2) {
        for (int64_t pair = lane; pair / (size / 2) * size < count; pair += kWarp) {
            const int64_t base = pair / (size / 2) * size, offset = pair % (size / 2);
            order(base + offset, base + size - 1 - offset);
        }
        __syncwarp();
        for (int64_t half = size / 4; half > 0; half /= 2) {
            for (int64_t pair = lane; pair / half * 2 * half < count; pair += kWarp) {
                const int64_t first = pair / half * 2 * half + pair % half;
                order(first, first + half);
            }
            __syncwarp();
        }
    }
}

/// Inclusive prefix sum over the warp's lanes.
template <class T>
__device__ T warp_prefix(T value) {
    for (int delta = 1; delta < kWarp; delta *= 2) {
        const T other = __shfl_up_sync(kAllLanes, value, delta);
        if (static_cast<int>(threadIdx.x % kWarp) >= delta) value += other;
    }
    return value;
}

namespace scan {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 2048;  // elements per warp

/// sums[chunk] = the sum of the chunk; one warp each.
static __global__ void sum_chunks(const int64_t* counts, int64_t n, int64_t* sums, int64_t chunks) {
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * (kThreads / kWarp);
    for (int64_t chunk = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; chunk < chunks; chunk += stride) {
        int64_t sum = 0;
        for (int64_t i = chunk * kChunk + lane; i < (chunk + 1) * kChunk && i < n; i += kWarp) sum += counts[i];
        sum = warp_sum(sum);
        if (lane == 0) sums[chunk] = sum;
    }
}

/// Exclusive prefix sums in place; one warp. starts[n], where given, is the sum of all.
static __global__ void scan_sums(int64_t* sums, int64_t chunks, int64_t* all) {
    int64_t before = 0;
    for (int64_t first = 0; first < chunks; first += kWarp) {
        const int64_t i = first + threadIdx.x, own = i < chunks ? sums[i] : 0, prefix = warp_prefix(own);
        if (i < chunks) sums[i] = before + prefix - own;
        before += __shfl_sync(kAllLanes, prefix, kWarp - 1);
    }
    if (threadIdx.x == 0) *all = before;
}

static __global__ void scan_chunks(int64_t* counts, int64_t n, const int64_t* sums, int64_t chunks) {
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * (kThreads / kWarp);
    for (int64_t chunk = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; chunk < chunks; chunk += stride) {
        int64_t before = sums[chunk];
        for (int64_t first = chunk * kChunk; first < (chunk + 1) * kChunk && first < n; first += kWarp) {
            const int64_t own = first + lane < n ? counts[first + lane] : 0, prefix = warp_prefix(own);
            if (first + lane < n) counts[first + lane] = before + prefix - own;
            before += __shfl_sync(kAllLanes, prefix, kWarp - 1);
        }
    }
}

}  // namespace scan

/// counts[0 .. n) become where each begins, counts[n] their sum. `sums` is scratch of ceil_div(n, scan::kChunk) numbers.
inline void exclusive_scan(int64_t* counts, int64_t n, int64_t* sums, void* stream) {
    using namespace scan;
    const int64_t chunks = ceil_div(n, kChunk);
    const dim3 grid = grid_of(ceil_div(chunks, kThreads / kWarp));
    launch("sum_chunks", sum_chunks, grid, dim3(kThreads), 0, stream, counts, n, sums, chunks);
    launch("scan_sums", scan_sums, dim3(1), dim3(kWarp), 0, stream, sums, chunks, counts + n);
    launch("scan_chunks", scan_chunks, grid, dim3(kThreads), 0, stream, counts, n, sums, chunks);
}

}  // namespace fastclust::cuda

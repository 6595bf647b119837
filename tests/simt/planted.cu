// Kernels with a fault each, and one without: what the shim must tell apart.
#include "common/cuda.h"
#include "planted.h"

namespace fastclust::planted {
namespace {

using fastclust::cuda::launch;
using fastclust::cuda::shared_memory;

constexpr int kThreads = 64;

/// Each block reverses its 64 numbers through shared memory.
__global__ void reverse(float* x, bool with_barrier) {
    float* tile = shared_memory<float>();
    const unsigned i = blockIdx.x * kThreads + threadIdx.x;
    tile[threadIdx.x] = x[i];
    if (with_barrier) __syncthreads();
    x[i] = tile[kThreads - 1 - threadIdx.x];
}

/// Lanes hand a number to their neighbour in the same warp, with and without a warp barrier between.
__global__ void rotate(float* x, bool with_barrier) {
    float* tile = shared_memory<float>();
    tile[threadIdx.x] = x[threadIdx.x];
    if (with_barrier) __syncwarp();
    x[threadIdx.x] = tile[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
}

__global__ void read_beyond(float* x, int64_t n) {
    if (threadIdx.x == 0) x[0] = x[n];
}

__global__ void write_beyond(float* x, int64_t n) {
    if (threadIdx.x == 0) x[n] = 0;
}

__global__ void read_before(float* x) {
    if (threadIdx.x == 0) x[0] = x[-1];
}

__global__ void shared_beyond(float* x) {
    float* tile = shared_memory<float>();
    tile[threadIdx.x + 1] = x[threadIdx.x];
}

__global__ void divergent_barrier(float* x) {
    if (threadIdx.x < 32) __syncthreads();
    x[threadIdx.x] = 0;
}

__global__ void two_barriers(float* x) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    x[threadIdx.x] = 0;
}

__global__ void divergent_shuffle(float* x) {
    if (threadIdx.x % 32 < 16) x[threadIdx.x] = __shfl_xor_sync(fastclust::cuda::kAllLanes, x[threadIdx.x], 1);
}

/// Several threads count in one place.
__global__ void count(unsigned* counts, bool atomically) {
    if (atomically)
        atomicAdd(&counts[0], 1u);
    else
        counts[0] += 1;
}

/// Block 1 reads what block 0 writes.
__global__ void across_blocks(float* x) {
    if (threadIdx.x == 0) x[blockIdx.x] = blockIdx.x == 0 ? 0 : x[blockIdx.x - 1];
}

/// The last thread to come decides: no race, and still the result depends on the order of threads.
__global__ void order_dependent(unsigned* x) {
    if (atomicAdd(&x[0], 1u) == 0) x[1] = threadIdx.x;
}

}  // namespace

void run(const std::string& fault, float* x, int64_t n) {
    auto* counts = reinterpret_cast<unsigned*>(x);
    const dim3 grid(2), block(kThreads);
    const size_t shared = kThreads * sizeof(float);
    if (fault == "none") {
        launch("reverse", reverse, grid, block, shared, nullptr, x, true);
        launch("rotate", rotate, dim3(1), block, shared, nullptr, x, true);
    } else if (fault == "missing barrier")
        launch("reverse", reverse, grid, block, shared, nullptr, x, false);
    else if (fault == "missing warp barrier")
        launch("rotate", rotate, dim3(1), block, shared, nullptr, x, false);
    else if (fault == "read beyond")
        launch("read_beyond", read_beyond, grid, block, 0, nullptr, x, n);
    else if (fault == "write beyond")
        launch("write_beyond", write_beyond, grid, block, 0, nullptr, x, n);
    else if (fault == "read before")
        launch("read_before", read_before, grid, block, 0, nullptr, x);
    else if (fault == "shared beyond")
        launch("shared_beyond", shared_beyond, grid, block, shared, nullptr, x);
    else if (fault == "divergent barrier")
        launch("divergent_barrier", divergent_barrier, grid, block, 0, nullptr, x);
    else if (fault == "two barriers")
        launch("two_barriers", two_barriers, grid, block, 0, nullptr, x);
    else if (fault == "divergent shuffle")
        launch("divergent_shuffle", divergent_shuffle, grid, block, 0, nullptr, x);
    else if (fault == "unordered count")
        launch("count", count, grid, block, 0, nullptr, counts, false);
    else if (fault == "across blocks")
        launch("across_blocks", across_blocks, grid, block, 0, nullptr, x);
    else if (fault == "order")
        launch("order_dependent", order_dependent, dim3(1), block, 0, nullptr, counts);
    else
        throw std::runtime_error("no such fault: " + fault);
}

}  // namespace fastclust::planted

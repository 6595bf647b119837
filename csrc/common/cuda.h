// How kernels are launched, CUDA's errors told and shared memory taken. Torch-free. Under FASTCLUST_SIMT_SHIM the same kernels
// run on the CPU (tests/simt), so none of them uses <<<>>>, static shared memory, or warp collectives of less than a warp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastclust::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

/// Launches `kernel` on `stream`; every launch error is thrown at the launch, under the kernel's name.
template <class... Params, class... Args>
inline void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   Args... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    constexpr size_t kDefaultSharedBytes = 48 * 1024;
    if (shared_bytes > kDefaultSharedBytes)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), name);
#ifdef FASTCLUST_SIMT_SHIM
    static_cast<void>(stream);
    simt::run(name, grid, block, shared_bytes, [&] { kernel(static_cast<Params>(args)...); });
#else
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
#endif
}

/// On the shim few, so that small problems already make blocks walk on.
inline int64_t most_blocks() {
#ifdef FASTCLUST_SIMT_SHIM
    return simt::most_blocks();
#else
    return int64_t{1} << 20;
#endif
}

/// A grid of at most most_blocks(): kernels walk over the rest of their `blocks` pieces of work with stride gridDim.x.
inline dim3 grid_of(int64_t blocks) {
    return dim3(static_cast<unsigned>(blocks < most_blocks() ? blocks : most_blocks()));
}

/// Of the current device.
inline int64_t processors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

/// A grid of `blocks`, but of no more than `each` per processor: a block that walks on spares the start of another.
inline dim3 grid_of(int64_t blocks, int64_t each) {
    const int64_t most = each * processors();
    return grid_of(blocks < most ? blocks : most);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/// While a CUDA graph is being captured nothing may wait for the device.
inline bool is_capturing(void* stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
}

/// The block's shared memory: as many bytes as its launch asked for, uninitialised.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef FASTCLUST_SIMT_SHIM
    return static_cast<T*>(simt::shared());
#else
    extern __shared__ __align__(128) unsigned char fastclust_shared[];
    return reinterpret_cast<T*>(fastclust_shared);
#endif
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
    for (int bits = kWarp / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(kAllLanes, value, bits);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
    for (int bits = kWarp / 2; bits > 0; bits /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, bits));
    return value;
}

/// Sum over the block, the same for every thread and on every run; `slots` holds one value per warp.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* slots) {
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = value;
    __syncthreads();
    T sum = 0;
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += slots[w];
    return sum;
}

}  // namespace fastclust::cuda

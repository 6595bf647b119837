// The one way kernels are launched and CUDA's errors are told. Torch-free. Under FASTCLUST_SIMT_SHIM the same kernels run on
// the CPU, so nothing here or in a kernel uses <<<>>>.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastclust::cuda {

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
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
}

}  // namespace fastclust::cuda

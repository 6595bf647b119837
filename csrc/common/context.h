// What a kernel may ask of its host. Torch-free: the same kernels run under torch, in the sanitizer tests and on the SIMT shim.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastclust {

struct Context {
    void* owner = nullptr;
    void* (*allocate)(void* owner, size_t bytes) = nullptr;  // 64-byte aligned, on the op's device, freed when the op returns
    void* stream = nullptr;                                  // cudaStream_t to launch on; null on the CPU

    /// Uninitialised memory for `count` elements.
    template <class T>
    T* scratch(int64_t count) const {
        return static_cast<T*>(allocate(owner, static_cast<size_t>(count) * sizeof(T)));
    }
};

}  // namespace fastclust

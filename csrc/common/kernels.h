// How a room offers its kernels: one table of function pointers, `Kernels<T>` (T = float, double; on CUDA also the halves of
// common/storage.h where the room says so), per backend.
//
// A room's <name>_cpu.cpp puts all it holds into `namespace fastclust::<room>::FASTCLUST_CAPABILITY`; the build compiles it
// once per capability with that macro set. No inline function may leave that namespace: the linker keeps one copy of each
// weak symbol, and an AVX-512 copy would crash an older CPU (tests/test_build.py looks for such symbols).
//
// The CUDA kernels live in a library of their own, which fills `cuda_kernels<T>()` when it is loaded.
#pragma once

#include "common/capability.h"
#include "common/storage.h"

#define FASTCLUST_KERNELS_IN(backend) \
    namespace backend {               \
    template <class T>                \
    const Kernels<T>& kernels();      \
    }

#if defined(__x86_64__)
#define FASTCLUST_CPU_BACKENDS    \
    FASTCLUST_KERNELS_IN(generic) \
    FASTCLUST_KERNELS_IN(avx2) FASTCLUST_KERNELS_IN(avx512) FASTCLUST_KERNELS_IN(avx512_vnni) FASTCLUST_KERNELS_IN(amx)
#define FASTCLUST_CHOOSE_CPU_KERNELS(T)        \
    switch (cpu_capability()) {                \
        case Capability::amx:                  \
            return &amx::kernels<T>();         \
        case Capability::avx512_vnni:          \
            return &avx512_vnni::kernels<T>(); \
        case Capability::avx512:               \
            return &avx512::kernels<T>();      \
        case Capability::avx2:                 \
            return &avx2::kernels<T>();        \
        default:                               \
            return &generic::kernels<T>();     \
    }
#else
#define FASTCLUST_CPU_BACKENDS FASTCLUST_KERNELS_IN(generic)
#define FASTCLUST_CHOOSE_CPU_KERNELS(T) return &generic::kernels<T>();
#endif

/// In a room's header, after `template <class T> struct Kernels`: declares every backend's table and the way to get it, null
/// where there is none.
#define FASTCLUST_DECLARE_KERNELS            \
    FASTCLUST_CPU_BACKENDS                   \
    FASTCLUST_KERNELS_IN(cuda)               \
    template <class T>                       \
    inline const Kernels<T>* cpu_kernels() { \
        if constexpr (kIsHalf<T>)            \
            return nullptr;                  \
        else                                 \
            FASTCLUST_CHOOSE_CPU_KERNELS(T)  \
    }                                        \
    template <class T>                       \
    FASTCLUST_API const Kernels<T>*& cuda_kernels();

/// In a room's .cpp, inside its namespace: where the CUDA library leaves its table.
#define FASTCLUST_DEFINE_CUDA_SLOT                         \
    template <class T>                                     \
    const Kernels<T>*& cuda_kernels() {                    \
        static const Kernels<T>* table = nullptr;          \
        return table;                                      \
    }                                                      \
    template const Kernels<float>*& cuda_kernels<float>(); \
    template const Kernels<double>*& cuda_kernels<double>();
#define FASTCLUST_DEFINE_CUDA_SLOT_OF_HALVES                   \
    template const Kernels<Float16>*& cuda_kernels<Float16>(); \
    template const Kernels<Bfloat16>*& cuda_kernels<Bfloat16>();

/// At the end of a room's <name>_cpu.cpp, inside its capability namespace, after `template <class T> constexpr Kernels<T>
/// kTable`.
#define FASTCLUST_DEFINE_KERNELS                     \
    template <class T>                               \
    const Kernels<T>& kernels() {                    \
        return kTable<T>;                            \
    }                                                \
    template const Kernels<float>& kernels<float>(); \
    template const Kernels<double>& kernels<double>();
#define FASTCLUST_DEFINE_KERNELS_OF_HALVES               \
    template const Kernels<Float16>& kernels<Float16>(); \
    template const Kernels<Bfloat16>& kernels<Bfloat16>();

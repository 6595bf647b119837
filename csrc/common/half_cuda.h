// Half precision: in bits, and in rows that are widened to float as they are read.
#pragma once

#include "common/cuda.h"
#include "common/storage.h"
#ifndef FASTCLUST_SIMT_SHIM
#include <cuda_fp16.h>
#endif

namespace fastclust::cuda {

/// An IEEE half in its bits.
using Half = uint16_t;

__device__ __forceinline__ Half to_half(float value) {
#ifdef FASTCLUST_SIMT_SHIM
    return std::bit_cast<Half>(static_cast<_Float16>(value));
#else
    return __half_as_ushort(__float2half_rn(value));
#endif
}

__device__ __forceinline__ float from_half(Half bits) {
#ifdef FASTCLUST_SIMT_SHIM
    return static_cast<float>(std::bit_cast<_Float16>(bits));
#else
    return __half2float(__ushort_as_half(bits));
#endif
}

}  // namespace fastclust::cuda

namespace fastclust {

struct Float16 {
    uint16_t bits;

    __device__ __forceinline__ operator float() const { return cuda::from_half(bits); }
};

struct Bfloat16 {
    uint16_t bits;

    __device__ __forceinline__ operator float() const {
        const uint32_t widened = uint32_t{bits} << 16;
#ifdef FASTCLUST_SIMT_SHIM
        return std::bit_cast<float>(widened);
#else
        return __uint_as_float(widened);
#endif
    }
};

}  // namespace fastclust

// Stands in for CUDA's own header where the kernels are compiled for the CPU: what csrc/*/*_cuda.cu use of it, and no more.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using dim3 = simt::Extent;
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

inline const char* cudaGetErrorString(cudaError_t) {
    return "invalid value";
}
inline cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(target, source, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
    std::memset(target, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? simt::processors() : 99 * 1024;
    return cudaSuccess;
}
template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int value) {
    return value <= 99 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

inline void __syncthreads(simt::Site site = simt::Site::current()) {
    simt::barrier(site);
}
inline void __syncwarp(simt::Site site = simt::Site::current()) {
    simt::warp_barrier(site);
}

namespace simt {

template <class T>
inline T lane_value(const unsigned char* slots, int lane) {
    T value;
    std::memcpy(&value, slots + static_cast<size_t>(lane) * kLaneBytes, sizeof value);
    return value;
}

inline void require_full(unsigned mask) {
    if (mask != 0xffffffffu) fail("warp collectives here take the full mask");
}

}  // namespace simt

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, simt::Site site = simt::Site::current()) {
    simt::require_full(mask);
    const int base = simt::lane() / width * width;
    return simt::lane_value<T>(simt::exchange(&value, sizeof value, site), base + (lane & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, simt::Site site = simt::Site::current()) {
    simt::require_full(mask);
    (void)width;
    return simt::lane_value<T>(simt::exchange(&value, sizeof value, site), simt::lane() ^ bits);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, simt::Site site = simt::Site::current()) {
    simt::require_full(mask);
    (void)width;
    const unsigned char* slots = simt::exchange(&value, sizeof value, site);
    return simt::lane() >= delta ? simt::lane_value<T>(slots, simt::lane() - delta) : value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
    simt::require_full(mask);
    const unsigned char* slots = simt::exchange(&predicate, sizeof predicate, site);
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= unsigned(simt::lane_value<int>(slots, i) != 0) << i;
    return votes;
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, simt::Site site = simt::Site::current()) {
    simt::require_full(mask);
    const unsigned char* slots = simt::exchange(&value, sizeof value, site);
    unsigned peers = 0;
    for (int i = 0; i < 32; ++i) peers |= unsigned(simt::lane_value<T>(slots, i) == value) << i;
    return peers;
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
    return __ballot_sync(mask, predicate, site) != 0;
}
inline int __popc(unsigned bits) {
    return std::popcount(bits);
}
inline int __ffs(int bits) {
    return __builtin_ffs(bits);
}
inline int __clz(int bits) {
    return std::countl_zero(static_cast<unsigned>(bits));
}

template <class T>
__attribute__((no_sanitize("thread"))) inline T simt_update(T* address, T value) {
    simt::note_atomic(address, sizeof value);
    const T old = *address;
    *address = value;
    return old;
}
template <class T>
__attribute__((no_sanitize("thread"))) inline T atomicAdd(T* address, std::type_identity_t<T> value) {
    return simt_update(address, static_cast<T>(*address + value));
}
template <class T>
__attribute__((no_sanitize("thread"))) inline T atomicMin(T* address, std::type_identity_t<T> value) {
    return simt_update(address, value < *address ? value : *address);
}
template <class T>
__attribute__((no_sanitize("thread"))) inline T atomicMax(T* address, std::type_identity_t<T> value) {
    return simt_update(address, *address < value ? value : *address);
}

template <class T>
inline T __ldg(const T* address) {
    return *address;
}
inline unsigned __float_as_uint(float value) {
    return std::bit_cast<unsigned>(value);
}
inline float __uint_as_float(unsigned bits) {
    return std::bit_cast<float>(bits);
}
inline long long __double_as_longlong(double value) {
    return std::bit_cast<long long>(value);
}
inline double __longlong_as_double(long long bits) {
    return std::bit_cast<double>(bits);
}
using std::max;
using std::min;
inline int64_t min(int64_t a, long long b) {
    return a < b ? a : static_cast<int64_t>(b);
}

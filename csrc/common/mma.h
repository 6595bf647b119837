// The few instructions that C++ has no words for: asynchronous copies to shared memory, matrix loads from it, and the tensor
// cores' product, each for sm_80 and newer. Under FASTCLUST_SIMT_SHIM each has a twin in plain C++.
#pragma once

#include "common/half_cuda.h"

namespace fastclust::cuda {

/// Copies 16 bytes to shared memory; of them only `valid` (0 or 16) are read, the rest are zeros.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid) {
#ifdef FASTCLUST_SIMT_SHIM
    simt::copy_later(shared, global, 16, static_cast<size_t>(valid));
#else
    const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(valid) : "memory");
#endif
}

/// Ends a group of copies.
__device__ __forceinline__ void commit_copies() {
#ifdef FASTCLUST_SIMT_SHIM
    simt::commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until at most kInFlight of this thread's groups are on their way; others' copies need a barrier after it.
template <int kInFlight>
__device__ __forceinline__ void wait_copies() {
#ifdef FASTCLUST_SIMT_SHIM
    simt::wait_copies(kInFlight);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
#endif
}

/// Four 8 x 8 matrices of halves: lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix the elements
/// (l / 4, 2 (l % 4)) and the next to its right.
__device__ __forceinline__ void load_matrices(const Half* row, uint32_t (&out)[4]) {
#ifdef FASTCLUST_SIMT_SHIM
    simt::note_read(row, 16);
    const unsigned char* rows = simt::exchange(&row, sizeof row, simt::Site::current());
    for (int m = 0; m < 4; ++m)
        std::memcpy(&out[m], simt::lane_value<const Half*>(rows, 8 * m + simt::lane() / 4) + 2 * (simt::lane() % 4), 4);
#else
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
#endif
}

/// sum (16 x 8) += a (16 x 16) b (16 x 8), halves summed in float. Lane l holds sum at rows l / 4 and l / 4 + 8, columns
/// 2 (l % 4) and the next: (row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1).
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef FASTCLUST_SIMT_SHIM
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const unsigned char* slots = simt::exchange(mine, sizeof mine, simt::Site::current());
    const auto half_of = [&](int lane, int word, int high) {
        Half bits;
        std::memcpy(&bits, slots + static_cast<size_t>(lane) * simt::kLaneBytes + 4 * word + 2 * high, sizeof bits);
        return from_half(bits);
    };
    for (int e = 0; e < 4; ++e) {
        const int row = simt::lane() / 4, column = 2 * (simt::lane() % 4) + e % 2;
        for (int t = 0; t < 16; ++t)
            sum[e] +=
                half_of(4 * row + t % 8 / 2, t / 8 * 2 + e / 2, t % 2) * half_of(4 * column + t % 8 / 2, 4 + t / 8, t % 2);
    }
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace fastclust::cuda

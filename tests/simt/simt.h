// A CUDA grid on one CPU core. Blocks run one after another; each thread of a block is a fiber that runs until it waits at a
// barrier or at a warp collective. The kernels are compiled with -fsanitize=thread, whose hooks report every memory access
// here:
//   - outside an exact-size allocation (AddressSanitizer's shadow memory knows) -> error;
//   - of two threads of a launch, at least one writing, neither both atomic nor ordered by a barrier between them -> error;
//   - a barrier or warp collective that not all threads reach, or reach at different lines -> error.
// An error prints one line that begins with "simt: " and ends the process with code 3.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

namespace simt {

using Site = std::source_location;

struct Extent {
    unsigned x = 1, y = 1, z = 1;
};

/// Runs `thread` once per thread of the grid, in an order drawn from `order`'s setting, with `shared_bytes` of shared memory.
void run(const char* kernel, Extent grid, Extent block, size_t shared_bytes, const std::function<void()>& thread);
/// 0: threads and blocks in ascending order; others: fixed adversarial orders. Results may not depend on it.
void set_order(int order);

/// For tensors that are too large to be gone through: of a large grid only the first and the last blocks run, grids are as
/// large as on a GPU, and memory begins as zeros, which take room only where they are written, if large between pages that may
/// not be touched.
void set_sparse(bool sparse);
int64_t most_blocks();
int processors();

void* allocate(size_t bytes);  // device memory: exact size, filled with 0xFF (NaN), checked
void release_all();

void* shared();
void barrier(Site site);
void warp_barrier(Site site);
constexpr size_t kLaneBytes = 32;
/// Hands in `mine` and returns, once all 32 lanes have, what lane i handed in at [i * kLaneBytes].
const unsigned char* exchange(const void* mine, size_t bytes, Site site);
int lane();

void note_read(const void* address, size_t bytes);
void note_write(const void* address, size_t bytes);
void note_atomic(const void* address, size_t bytes);

/// cp.async: the copy happens as late as the program allows, at the wait that asks for its group.
void copy_later(void* target, const void* source, size_t bytes, size_t valid_bytes);
void commit_copies();
void wait_copies(int groups_in_flight);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace simt

inline simt::Extent gridDim, blockDim;
inline simt::Extent threadIdx, blockIdx;

// Groups of equal labels: their sizes, their means, and what their rows add to the loss. All sums are in double, in the order
// of the rows.
#include <cmath>

#include "pairwise_kl/pairwise_kl_cuda.h"

namespace fastclust::pairwise_kl::cuda {
namespace {

using namespace fastclust::cuda;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

/// One warp per row.
__global__ void __launch_bounds__(kThreads) count_groups(Batch<float> a, Groups groups) {
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < a.b; row += stride) {
        const int64_t label = a.labels[row];
        int64_t size = 0, leader = row;
        if (label >= 0)
            for (int64_t j = lane; j < a.b; j += kWarp) {
                if (a.labels[j] != label) continue;
                ++size;
                leader = j < leader ? j : leader;
            }
        size = warp_sum(size);
        for (int bits = kWarp / 2; bits > 0; bits /= 2) {
            const int64_t other = __shfl_xor_sync(kAllLanes, leader, bits);
            leader = other < leader ? other : leader;
        }
        if (lane != 0) continue;
        groups.size[row] = size;
        groups.leader[row] = label >= 0 ? leader : -1;
        if (label < 0) continue;
        atomicAdd(&groups.pairs[0], static_cast<unsigned long long>(size - 1));
        atomicAdd(&groups.pairs[1], 1ULL);
    }
}

struct AverageShared {
    double p[kThreads], log[kThreads];
    int64_t members[kThreads];
    int found[kWarps];
};

/// The members of group `leader` among rows [first, first + kThreads), in order, into shared.members; their number.
__device__ int list_members(const Groups& groups, int64_t leader, int64_t first, int64_t b, AverageShared& shared) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t row = first + threadIdx.x;
    const bool member = row < b && groups.leader[row] == leader;
    const unsigned votes = __ballot_sync(kAllLanes, member);
    __syncthreads();
    if (lane == 0) shared.found[warp] = __popc(votes);
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += shared.found[w];
        all += shared.found[w];
    }
    if (member) shared.members[before + __popc(votes & ((1u << lane) - 1))] = row;
    __syncthreads();
    return all;
}

/// One block per group and as many of its columns as it has threads; spare threads share the rows.
__global__ void __launch_bounds__(kThreads) average_groups(Batch<float> a, Groups groups) {
    auto& shared = *shared_memory<AverageShared>();
    int columns = kThreads;
    while (columns / 2 >= a.k) columns /= 2;
    const int lanes = kThreads / columns, lane = threadIdx.x / columns, column = threadIdx.x % columns;
    for (int64_t leader = blockIdx.x; leader < a.b; leader += gridDim.x) {
        if (groups.leader[leader] != leader) continue;
        const auto size = double(groups.size[leader]);
        for (int64_t k = column; k - column < a.k; k += columns) {
            double p = 0, log = 0;
            for (int64_t first = leader; first < a.b; first += kThreads) {
                const int count = list_members(groups, leader, first, a.b, shared);
                if (k >= a.k) continue;
#pragma unroll 4
                for (int i = lane; i < count; i += lanes) {
                    const float log_p = a.log_p[shared.members[i] * a.k + k];
                    p += double(exp(log_p));
                    log += double(log_p);
                }
            }
            __syncthreads();
            shared.p[threadIdx.x] = p;
            shared.log[threadIdx.x] = log;
            __syncthreads();
            if (lane != 0 || k >= a.k) continue;
            for (int other = 1; other < lanes; ++other) {
                p += shared.p[other * columns + column];
                log += shared.log[other * columns + column];
            }
            groups.mean_p[leader * a.k + k] = p / size;
            groups.mean_log[leader * a.k + k] = p > 0 ? log / size : 0;  // a part that nobody has counts for nothing
        }
    }
}

/// One warp per row.
__global__ void __launch_bounds__(kThreads) spread_rows(Batch<float> a, Groups groups) {
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < a.b; row += stride) {
        const int64_t leader = groups.leader[row];
        double sum = 0;
        if (leader >= 0)
            for (int64_t k = lane; k < a.k; k += kWarp) {
                const double mean_p = groups.mean_p[leader * a.k + k], mean_log = groups.mean_log[leader * a.k + k];
                const float log_p = a.log_p[row * a.k + k];
                if (!(mean_p > 0)) continue;
                sum += mean_log > -INFINITY ? (double(exp(log_p)) - mean_p) * (double(log_p) - mean_log) : INFINITY;
            }
        sum = warp_sum(sum);
        if (lane == 0) groups.spread[row] = double(groups.size[row]) * sum;
    }
}

}  // namespace

Groups find_groups(const Batch<float>& a, const Context& context) {
    void* stream = context.stream;
    const Groups groups{context.scratch<int64_t>(a.b),      context.scratch<int64_t>(a.b),
                        context.scratch<double>(a.b * a.k), context.scratch<double>(a.b * a.k),
                        context.scratch<double>(a.b),       context.scratch<unsigned long long>(2)};
    check(cudaMemsetAsync(groups.pairs, 0, 2 * sizeof *groups.pairs, static_cast<cudaStream_t>(stream)), "pairwise_kl");
    const dim3 warps = grid_of(ceil_div(a.b, kWarps)), block(kThreads);
    launch("count_groups", count_groups, warps, block, 0, stream, a, groups);
    launch("average_groups", average_groups, grid_of(a.b), block, sizeof(AverageShared), stream, a, groups);
    launch("spread_rows", spread_rows, warps, block, 0, stream, a, groups);
    return groups;
}

}  // namespace fastclust::pairwise_kl::cuda

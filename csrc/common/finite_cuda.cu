#include <climits>

#include "common/finite.h"
#include "common/half_cuda.h"

namespace fastclust::finite::cuda {
namespace {

using namespace fastclust::cuda;

constexpr int kWarpsPerBlock = 8;

/// One warp per row; result[0] counts the bad rows, result[1] is the first of them.
template <class S>
__global__ void scan_rows(const S* x, int64_t rows, int64_t width, unsigned long long* result) {
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarpsPerBlock;
    for (int64_t row = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; row < rows; row += stride) {
        Computed<S> sum = 0;
        for (int64_t i = lane; i < width; i += kWarp) sum += x[row * width + i] * Computed<S>(0);
        if (__any_sync(kAllLanes, !(sum == 0)) && lane == 0) {
            atomicAdd(&result[0], 1ULL);
            atomicMin(&result[1], static_cast<unsigned long long>(row));
        }
    }
}

template <class S>
BadRows scan(const S* x, int64_t rows, int64_t width, const Context& context) {
    if (is_capturing(context.stream)) return {};
    const auto stream = static_cast<cudaStream_t>(context.stream);
    unsigned long long host[2] = {0, ULLONG_MAX};
    auto* result = context.scratch<unsigned long long>(2);
    check(cudaMemcpyAsync(result, host, sizeof host, cudaMemcpyHostToDevice, stream), "scan_rows");
    launch("scan_rows", scan_rows<S>, grid_of(ceil_div(rows, kWarpsPerBlock)), dim3(kWarp * kWarpsPerBlock), 0, context.stream,
           x, rows, width, result);
    check(cudaMemcpyAsync(host, result, sizeof host, cudaMemcpyDeviceToHost, stream), "scan_rows");
    check(cudaStreamSynchronize(stream), "scan_rows");
    return {static_cast<int64_t>(host[0]), host[0] == 0 ? -1 : static_cast<int64_t>(host[1])};
}

template <class S>
constexpr Kernels<S> kTable{scan<S>};

}  // namespace

FASTCLUST_DEFINE_KERNELS
FASTCLUST_DEFINE_KERNELS_OF_HALVES

}  // namespace fastclust::finite::cuda

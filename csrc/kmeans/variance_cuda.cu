// The scale of the tolerance: the mean over columns of their variance.
#include "kmeans/kmeans_cuda.h"

namespace fastclust::kmeans::cuda {
namespace {

using namespace fastclust::cuda;

constexpr int kThreads = 256;
constexpr int64_t kChunk = 2048;  // rows per partial sum

/// partials (B, chunks, 2, D): sums of x - x_0 and of its square over a chunk; shifted by x_0 so that little cancels.
template <class S>
__global__ void __launch_bounds__(kThreads) sum_columns(Lloyd<S> a, int64_t chunks, double* partials) {
    for (int64_t piece = blockIdx.x; piece < a.batch * chunks; piece += gridDim.x) {
        const S* x = a.x + piece / chunks * a.n * a.d;
        const int64_t start = piece % chunks * kChunk;
        const int64_t end = start + kChunk < a.n ? start + kChunk : a.n;
        for (int64_t column = threadIdx.x; column < a.d; column += kThreads) {
            double sum = 0, squares = 0;
            for (int64_t row = start; row < end; ++row) {
                const double value = double(x[row * a.d + column]) - double(x[column]);
                sum += value;
                squares += value * value;
            }
            partials[(piece * 2 + 0) * a.d + column] = sum;
            partials[(piece * 2 + 1) * a.d + column] = squares;
        }
    }
}

__global__ void __launch_bounds__(kThreads, 1)
    mean_variance(const double* partials, int64_t batch, int64_t chunks, int64_t d, double n, double* variances) {
    double* slots = shared_memory<double>();
    for (int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
        double variance = 0;
        for (int64_t column = threadIdx.x; column < d; column += kThreads) {
            double sum = 0, squares = 0;
            for (int64_t piece = b * chunks; piece < (b + 1) * chunks; ++piece) {
                sum += partials[(piece * 2 + 0) * d + column];
                squares += partials[(piece * 2 + 1) * d + column];
            }
            variance += squares / n - sum / n * (sum / n);
        }
        variance = block_sum(variance, slots);
        if (threadIdx.x == 0) variances[b] = variance / double(d);
    }
}

}  // namespace

template <class S>
void mean_variances(const Lloyd<S>& a, double* variances, const Context& context) {
    const int64_t chunks = ceil_div(a.n, kChunk);
    auto* partials = context.scratch<double>(a.batch * chunks * 2 * a.d);
    launch("sum_columns", sum_columns<S>, grid_of(a.batch * chunks), dim3(kThreads), 0, context.stream, a, chunks, partials);
    launch("mean_variance", mean_variance, grid_of(a.batch), dim3(kThreads), kThreads / kWarp * sizeof(double), context.stream,
           partials, a.batch, chunks, a.d, double(a.n), variances);
}

template void mean_variances(const Lloyd<float>&, double*, const Context&);
template void mean_variances(const Lloyd<double>&, double*, const Context&);
template void mean_variances(const Lloyd<Float16>&, double*, const Context&);
template void mean_variances(const Lloyd<Bfloat16>&, double*, const Context&);

}  // namespace fastclust::kmeans::cuda

// What the sums need before the first row is added: the unit of each column, from its greatest value.
#include "kmeans/sums_cuda.h"

namespace fastclust::kmeans::cuda {
namespace {

using namespace fastclust::cuda;

constexpr int kThreads = 256;
constexpr int64_t kChunk = 512;  // rows per block

/// greatest (B, D + 1): the bits of max_i |w_i x_i|, in the last column of max_i w_i; they order as the numbers do.
template <class S>
__global__ void __launch_bounds__(kThreads) find_greatest(Lloyd<S> a, unsigned long long* greatest) {
    double* slots = shared_memory<double>();
    int columns = kThreads;
    while (columns / 2 >= a.d + 1) columns /= 2;
    const int lanes = kThreads / columns, lane = threadIdx.x / columns, column = threadIdx.x % columns;
    const int64_t chunks = ceil_div(a.n, kChunk), width = a.d + 1;
    for (int64_t piece = blockIdx.x; piece < a.batch * chunks; piece += gridDim.x) {
        const int64_t b = piece / chunks, start = piece % chunks * kChunk;
        const int64_t end = start + kChunk < a.n ? start + kChunk : a.n;
        for (int64_t first = 0; first < width; first += columns) {
            const int64_t c = first + column;
            double value = 0;
            if (c < width)
                for (int64_t row = b * a.n + start + lane; row < b * a.n + end; row += lanes) {
                    const double weight = a.sample_weight == nullptr ? 1.0 : double(a.sample_weight[row]);
                    value = fmax(value, weight * (c < a.d ? fabs(double(a.x[row * a.d + c])) : 1.0));
                }
            __syncthreads();
            slots[threadIdx.x] = value;
            __syncthreads();
            if (lane != 0 || c >= width) continue;
            for (int other = 1; other < lanes; ++other) value = fmax(value, slots[other * columns + column]);
            atomicMax(&greatest[b * width + c], static_cast<unsigned long long>(__double_as_longlong(value)));
        }
    }
}

/// units (B, D + 1): 2^(bits - e), where the greatest is below 2^e.
__global__ void set_units(const unsigned long long* greatest, int64_t count, int bits, double* units) {
    constexpr int kMost = 1000;  // beyond it 2^(bits - e) would leave the range of double, and the first part is zero
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
        int exponent = 0;
        frexp(__longlong_as_double(static_cast<long long>(greatest[i])), &exponent);
        units[i] = ldexp(1.0, bits - exponent < kMost ? bits - exponent : kMost);
    }
}

}  // namespace

template <class S>
Sums prepare_sums(const Lloyd<S>& a, const Context& context) {
    const int64_t width = a.d + 1, count = a.batch * width, totals = a.batch * a.restarts * Sums::kParts * a.k * width;
    int bits = 61;
    while (bits > 1 && (a.n >> (61 - bits)) > 0) --bits;  // n 2^bits fits an int64
    auto* greatest = context.scratch<unsigned long long>(count);
    auto* units = context.scratch<double>(count);
    Sums sums{context.scratch<unsigned long long>(totals), units, width, ldexp(1.0, bits)};
    const auto stream = static_cast<cudaStream_t>(context.stream);
    check(cudaMemsetAsync(greatest, 0, static_cast<size_t>(count) * sizeof *greatest, stream), "lloyd");
    check(cudaMemsetAsync(sums.totals, 0, static_cast<size_t>(totals) * sizeof *sums.totals, stream), "lloyd");
    launch("find_greatest", find_greatest<S>, grid_of(a.batch * ceil_div(a.n, kChunk)), dim3(kThreads),
           kThreads * sizeof(double), context.stream, a, greatest);
    launch("set_units", set_units, grid_of(ceil_div(count, kThreads)), dim3(kThreads), 0, context.stream, greatest, count, bits,
           units);
    return sums;
}

template Sums prepare_sums(const Lloyd<float>&, const Context&);
template Sums prepare_sums(const Lloyd<double>&, const Context&);
template Sums prepare_sums(const Lloyd<Float16>&, const Context&);
template Sums prepare_sums(const Lloyd<Bfloat16>&, const Context&);

}  // namespace fastclust::kmeans::cuda

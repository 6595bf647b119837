#include "common/cuda.h"
#include "kmeans/kmeans.h"

namespace fastclust::kmeans::cuda {
namespace {

template <class T>
__global__ void assign_rows(Assign<T> a) {
    const int64_t stride = int64_t(gridDim.x) * blockDim.x;
    for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < a.batch * a.n; row += stride) {
        const T* x = a.x + row * a.d;
        const T* centroids = a.centroids + row / a.n * a.k * a.d;
        T best = 0;
        int64_t label = 0;
        for (int64_t k = 0; k < a.k; ++k) {
            T distance = 0;
            for (int64_t j = 0; j < a.d; ++j) distance += (x[j] - centroids[k * a.d + j]) * (x[j] - centroids[k * a.d + j]);
            if (k == 0 || distance < best) {
                best = distance;
                label = k;
            }
        }
        a.labels[row] = label;
        a.distances[row] = best;
    }
}

template <class T>
void assign(const Assign<T>& a, const Context& context) {
    const int64_t blocks = (a.batch * a.n + 127) / 128;
    fastclust::cuda::launch("assign_rows", assign_rows<T>, dim3(static_cast<unsigned>(blocks < 65536 ? blocks : 65536)),
                            dim3(128), 0, context.stream, a);
}

template <class T>
constexpr Kernels<T> kTable{assign<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::kmeans::cuda

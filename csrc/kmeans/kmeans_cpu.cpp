#include <limits>

#include "common/parallel.h"
#include "kmeans/kmeans.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {
namespace {

template <class T>
void assign(const Assign<T>& a, const Context&) {
    parallel_for(0, a.batch * a.n, 64, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* x = a.x + row * a.d;
            const T* centroids = a.centroids + row / a.n * a.k * a.d;
            T best = std::numeric_limits<T>::infinity();
            int64_t label = 0;
            for (int64_t k = 0; k < a.k; ++k) {
                T distance = 0;
                for (int64_t j = 0; j < a.d; ++j) distance += (x[j] - centroids[k * a.d + j]) * (x[j] - centroids[k * a.d + j]);
                if (distance < best) {
                    best = distance;
                    label = k;
                }
            }
            a.labels[row] = label;
            a.distances[row] = best;
        }
    });
}

template <class T>
constexpr Kernels<T> kTable{assign<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

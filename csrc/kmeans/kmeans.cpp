#include "kmeans/kmeans.h"

#include <tuple>

#include "common/tensor.h"

namespace fastclust::kmeans {

FASTCLUST_DEFINE_CUDA_SLOT

namespace {

std::tuple<Tensor, Tensor> kmeans_assign(const Tensor& x_in, const Tensor& centroids_in, bool exact) {
    const Tensor x = float_argument("kmeans_assign", "x", x_in, 3);
    const Tensor centroids = float_argument("kmeans_assign", "centroids", centroids_in, 3, x);
    const int64_t batch = x.size(0), n = x.size(1), d = x.size(2), k = centroids.size(1);
    require(centroids.size(0) == batch && centroids.size(2) == d, "kmeans_assign: centroids must be (", batch, ", K, ", d,
            "), got ", shape_of(centroids));
    require(k > 0, "kmeans_assign: centroids is empty");
    require_finite_rows("kmeans_assign", "x", x);
    require_finite_rows("kmeans_assign", "centroids", centroids);
    const Tensor labels = empty_on(x, {batch, n}, ScalarType::Long);
    const Tensor distances = empty_on(x, {batch, n}, x.scalar_type());
    const OpScope scope(x);
    dispatch_float(x, [&](auto zero) {
        using T = decltype(zero);
        const auto& kernels = kernels_for("kmeans_assign", x, cpu_kernels<T>(), cuda_kernels<T>());
        kernels.assign({batch, n, k, d, read<T>(x), read<T>(centroids), exact, write<int64_t>(labels), write<T>(distances)},
                       scope.context());
    });
    return {labels, distances};
}

}  // namespace

FASTCLUST_IMPLEMENT(m.impl("kmeans_assign", TORCH_BOX(&kmeans_assign));)

}  // namespace fastclust::kmeans

#include "soft_assign/soft_assign.h"

#include <tuple>

#include "common/tensor.h"

namespace fastclust::soft_assign {

FASTCLUST_DEFINE_CUDA_SLOT

namespace {

Tensor soft_assign(const Tensor& x_in, const Tensor& centroids_in) {
    const Tensor x = float_argument("soft_assign", "x", x_in, 2);
    const Tensor centroids = float_argument("soft_assign", "centroids", centroids_in, 2, x);
    const int64_t n = x.size(0), d = x.size(1), k = centroids.size(0);
    require(centroids.size(1) == d, "soft_assign: centroids must be (K, ", d, "), got ", shape_of(centroids));
    require(k > 0, "soft_assign: centroids is empty");
    require_finite_rows("soft_assign", "x", x);
    require_finite_rows("soft_assign", "centroids", centroids);
    const Tensor log_p = empty_on(x, {n, k}, x.scalar_type());
    const OpScope scope(x);
    dispatch_float(x, [&](auto zero) {
        using T = decltype(zero);
        const auto& kernels = kernels_for("soft_assign", x, cpu_kernels<T>(), cuda_kernels<T>());
        kernels.forward({n, k, d, read<T>(x), read<T>(centroids), write<T>(log_p)}, scope.context());
    });
    require_finite_rows("soft_assign", "distances of x to centroids", log_p);
    return log_p;
}

std::tuple<Tensor, Tensor> soft_assign_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& centroids_in,
                                                const Tensor& log_p_in) {
    const Tensor x = float_argument("soft_assign", "x", x_in, 2);
    const Tensor centroids = float_argument("soft_assign", "centroids", centroids_in, 2, x);
    const Tensor log_p = float_argument("soft_assign", "log_p", log_p_in, 2, x);
    const Tensor grad = float_argument("soft_assign", "grad", grad_in, 2, x);
    const int64_t n = x.size(0), d = x.size(1), k = centroids.size(0);
    require(centroids.size(1) == d, "soft_assign: centroids must be (K, ", d, "), got ", shape_of(centroids));
    for (const Tensor& tensor : {log_p, grad})
        require(tensor.size(0) == n && tensor.size(1) == k, "soft_assign: log_p and grad must be (", n, ", ", k, "), got ",
                shape_of(tensor));
    const Tensor grad_x = empty_on(x, {n, d}, x.scalar_type());
    const Tensor grad_centroids = empty_on(x, {k, d}, x.scalar_type());
    const OpScope scope(x);
    dispatch_float(x, [&](auto zero) {
        using T = decltype(zero);
        const auto& kernels = kernels_for("soft_assign", x, cpu_kernels<T>(), cuda_kernels<T>());
        kernels.backward({n, k, d, read<T>(grad), read<T>(x), read<T>(centroids), read<T>(log_p), write<T>(grad_x),
                          write<T>(grad_centroids)},
                         scope.context());
    });
    return {grad_x, grad_centroids};
}

}  // namespace

FASTCLUST_IMPLEMENT(m.impl("soft_assign", TORCH_BOX(&soft_assign));
                    m.impl("soft_assign_backward", TORCH_BOX(&soft_assign_backward));)

}  // namespace fastclust::soft_assign

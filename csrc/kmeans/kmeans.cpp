#include "kmeans/kmeans.h"

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "common/tensor.h"

namespace fastclust::kmeans {

FASTCLUST_DEFINE_CUDA_SLOT
FASTCLUST_DEFINE_CUDA_SLOT_OF_HALVES

namespace {

using torch::stable::amax;

/// The largest element, read back from the device.
template <class T>
T largest(const Tensor& tensor) {
    return *read<T>(
        torch::stable::to(amax(torch::stable::flatten(tensor), 0), torch::stable::Device(torch::headeronly::DeviceType::CPU)));
}

/// -tensor, which the stable headers lack.
Tensor negative(const Tensor& tensor) {
    std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
    if (torch_call_dispatcher("aten::neg", "", stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS)
        throw std::runtime_error("kmeans: torch failed to negate a tensor");
    return torch::stable::detail::to<Tensor>(stack[0]);
}

/// `squares` (distances, inertia) of a finished op: infinite or NaN where rows of x are not finite or too long to be squared.
template <class T>
void require_no_overflow(const char* op, const Tensor& x, const Tensor& squares) {
    if (squares.numel() == 0 || std::isfinite(largest<T>(squares))) return;
    require_finite_rows(op, "x", x);
    require(false, op, ": x is too large, squared distances overflow float", 8 * sizeof(T));
}

/// x (B, N, D) of a public function, with rows to cluster; whether they are finite may be left to the kernel to tell.
Tensor data_argument(const char* op, const Tensor& x_in, bool left_to_kernel = false) {
    const Tensor x = stored_argument(op, "x", x_in, 3);
    require(x.size(2) > 0, op, ": x has no features, its shape is ", shape_of(x));
    if (!left_to_kernel) require_finite_rows(op, "x", x);
    return x;
}

std::optional<Tensor> weight_argument(const std::optional<Tensor>& weight_in, const Tensor& x) {
    if (!weight_in) return std::nullopt;
    const Tensor weight = float_argument("kmeans", "sample_weight", *weight_in, 2, x);
    require(weight.size(0) == x.size(0) && weight.size(1) == x.size(1), "kmeans: sample_weight must be (", x.size(0), ", ",
            x.size(1), "), got ", shape_of(weight));
    if (weight.numel() == 0) return weight;
    require_finite_rows("kmeans", "sample_weight", torch::stable::reshape(weight, {weight.numel(), 1}));
    dispatch_float(weight, [&](auto zero) {
        using T = decltype(zero);
        require(largest<T>(negative(weight)) <= 0, "kmeans: sample_weight holds negative values");
        require(-largest<T>(negative(amax(weight, 1))) > 0, "kmeans: sample_weight is zero for every row of a problem");
    });
    return weight;
}

std::optional<Tensor> labels_argument(const std::optional<Tensor>& labels_in, const Tensor& x, int64_t k) {
    if (!labels_in) return std::nullopt;
    const Tensor labels = int64_argument("kmeans", "labels", *labels_in, 2, x);
    require(labels.size(0) == x.size(0) && labels.size(1) == x.size(1), "kmeans: labels must be (", x.size(0), ", ", x.size(1),
            "), got ", shape_of(labels));
    if (labels.numel() == 0) return labels;
    const int64_t highest = largest<int64_t>(labels), lowest = -largest<int64_t>(negative(labels));
    require(highest < k && lowest >= -1, "kmeans: labels must lie in [-1, ", k, "), -1 for free rows, got ",
            highest < k ? lowest : highest);
    return labels;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kmeans_lloyd(const Tensor& x_in, const Tensor& init_in,
                                                        std::optional<Tensor> weight_in, std::optional<Tensor> labels_in,
                                                        int64_t max_iter, double tol, bool spherical, bool exact) {
    const Tensor x = data_argument("kmeans", x_in, x_in.is_cpu());
    const Tensor init = float_argument("kmeans", "init", init_in, 4, x);
    const int64_t batch = x.size(0), n = x.size(1), d = x.size(2), restarts = init.size(1), k = init.size(2);
    require(init.size(0) == batch && init.size(3) == d, "kmeans: init must be (", batch, ", R, K, ", d, "), got ",
            shape_of(init));
    require(k > 0, "kmeans: n_clusters must be at least 1");
    require(k <= n || batch == 0, "kmeans: n_clusters must be at most the number of rows ", n, ", got ", k);
    require(max_iter >= 0, "kmeans: max_iter must not be negative, got ", max_iter);
    require(tol >= 0, "kmeans: tol must not be negative, got ", tol);
    require_finite_rows("kmeans", "init", init);
    const std::optional<Tensor> weight = weight_argument(weight_in, x);
    const std::optional<Tensor> fixed = labels_argument(labels_in, x, k);
    const Tensor centroids = empty_on(x, {batch, restarts, k, d}, computed_dtype(x));
    const Tensor labels = empty_on(x, {batch, restarts, n}, ScalarType::Long);
    const Tensor inertia = empty_on(x, {batch, restarts}, computed_dtype(x));
    const Tensor n_iter = empty_on(x, {batch, restarts}, ScalarType::Long);
    const OpScope scope(x);
    dispatch_stored(x, [&](auto stored) {
        using S = typename decltype(stored)::type;
        using T = Computed<S>;
        const auto& kernels = kernels_for("kmeans", x, cpu_kernels<S>(), cuda_kernels<S>());
        if (batch == 0 || restarts == 0) return;
        kernels.lloyd({batch, restarts, n, k, d, read<S>(x), read<T>(init), weight ? read<T>(*weight) : nullptr,
                       fixed ? read<int64_t>(*fixed) : nullptr, max_iter, tol, spherical, exact, write<T>(centroids),
                       write<int64_t>(labels), write<T>(inertia), write<int64_t>(n_iter)},
                      scope.context());
        require_no_overflow<T>("kmeans", x, inertia);
    });
    return {centroids, labels, inertia, n_iter};
}

Tensor kmeans_plus_plus(const Tensor& x_in, std::optional<Tensor> weight_in, const Tensor& uniforms_in) {
    const Tensor x = data_argument("kmeans", x_in);
    const Tensor uniforms = float_argument("kmeans", "uniforms", uniforms_in, 4, x);
    const int64_t batch = x.size(0), n = x.size(1), d = x.size(2);
    const int64_t restarts = uniforms.size(1), k = uniforms.size(2), candidates = uniforms.size(3);
    require(uniforms.size(0) == batch && candidates > 0, "kmeans: uniforms must be (", batch, ", R, K, L), got ",
            shape_of(uniforms));
    require(k > 0, "kmeans: n_clusters must be at least 1");
    require(k <= n || batch == 0, "kmeans: n_clusters must be at most the number of rows ", n, ", got ", k);
    const std::optional<Tensor> weight = weight_argument(weight_in, x);
    const Tensor rows = empty_on(x, {batch, restarts, k}, ScalarType::Long);
    const OpScope scope(x);
    dispatch_stored(x, [&](auto stored) {
        using S = typename decltype(stored)::type;
        using T = Computed<S>;
        const auto& kernels = kernels_for("kmeans", x, cpu_kernels<S>(), cuda_kernels<S>());
        if (batch == 0 || restarts == 0) return;
        kernels.plus_plus({batch, restarts, n, k, d, candidates, read<S>(x), weight ? read<T>(*weight) : nullptr,
                           read<T>(uniforms), write<int64_t>(rows)},
                          scope.context());
    });
    return rows;
}

std::tuple<Tensor, Tensor> kmeans_assign(const Tensor& x_in, const Tensor& centroids_in, bool exact) {
    const Tensor x = data_argument("kmeans_assign", x_in);
    const Tensor centroids = float_argument("kmeans_assign", "centroids", centroids_in, 3, x);
    const int64_t batch = x.size(0), n = x.size(1), d = x.size(2), k = centroids.size(1);
    require(centroids.size(0) == batch && centroids.size(2) == d, "kmeans_assign: centroids must be (", batch, ", K, ", d,
            "), got ", shape_of(centroids));
    require(k > 0, "kmeans_assign: centroids is empty");
    require_finite_rows("kmeans_assign", "centroids", centroids);
    const Tensor labels = empty_on(x, {batch, n}, ScalarType::Long);
    const Tensor distances = empty_on(x, {batch, n}, computed_dtype(x));
    const OpScope scope(x);
    dispatch_stored(x, [&](auto stored) {
        using S = typename decltype(stored)::type;
        using T = Computed<S>;
        const auto& kernels = kernels_for("kmeans_assign", x, cpu_kernels<S>(), cuda_kernels<S>());
        if (batch == 0 || n == 0) return;
        kernels.assign({batch, n, k, d, read<S>(x), read<T>(centroids), exact, write<int64_t>(labels), write<T>(distances)},
                       scope.context());
        require_no_overflow<T>("kmeans_assign", x, distances);
    });
    return {labels, distances};
}

}  // namespace

FASTCLUST_IMPLEMENT(m.impl("kmeans_lloyd", TORCH_BOX(&kmeans_lloyd)); m.impl("kmeans_plus_plus", TORCH_BOX(&kmeans_plus_plus));
                    m.impl("kmeans_assign", TORCH_BOX(&kmeans_assign));)

}  // namespace fastclust::kmeans

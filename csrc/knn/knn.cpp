#include "knn/knn.h"

#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "common/tensor.h"

namespace fastclust::knn {

FASTCLUST_DEFINE_CUDA_SLOT
FASTCLUST_DEFINE_CUDA_SLOT_OF_HALVES

namespace {

Metric metric_of(const std::string& name) {
    if (name == "cosine") return Metric::cosine;
    if (name == "inner_product") return Metric::inner_product;
    require(name == "euclidean", "knn: metric must be cosine, inner_product or euclidean, got ", name);
    return Metric::euclidean;
}

Symmetrize symmetrize_of(const std::string& name) {
    if (name == "none") return Symmetrize::none;
    if (name == "sum") return Symmetrize::sum;
    if (name == "mean") return Symmetrize::mean;
    require(name == "max", "knn_graph: symmetrize must be sum, mean, max or none, got ", name);
    return Symmetrize::max;
}

std::tuple<Tensor, Tensor> knn(const Tensor& x_in, const std::optional<Tensor>& queries_in, int64_t k, std::string metric,
                               bool exact) {
    const Metric kind = metric_of(metric);
    const Tensor x = stored_argument("knn", "x", x_in, 2);
    const int64_t n = x.size(0), d = x.size(1);
    require(k >= 1, "knn: k must be at least 1, got ", k);
    require(d >= 1, "knn: x has rows of no features");
    require(n <= std::numeric_limits<int32_t>::max(), "knn: x has ", n, " rows, more than an int32 counts");
    std::optional<Tensor> queries;
    if (queries_in.has_value()) {
        queries = stored_argument("knn", "queries", *queries_in, 2, x);
        require(queries->size(1) == d, "knn: queries must be (M, ", d, "), got ", shape_of(*queries));
        require(k <= n, "knn: k must be at most the ", n, " rows of x, got ", k);
        require_finite_rows("knn", "queries", *queries);
    } else {
        require(k < n || n == 0, "knn: k must be below the ", n, " rows of x, got ", k);
    }
    require_finite_rows("knn", "x", x);
    const int64_t m = queries ? queries->size(0) : n;
    const Tensor values = empty_on(x, {m, k}, computed_dtype(x));
    const Tensor indices = empty_on(x, {m, k}, ScalarType::Long);
    if (m == 0) return {values, indices};
    const OpScope scope(x);
    dispatch_stored(x, [&](auto stored) {
        using S = typename decltype(stored)::type;
        const auto& kernels = kernels_for("knn", x, cpu_kernels<S>(), cuda_kernels<S>());
        kernels.search({n, m, k, d, read<S>(x), queries ? read<S>(*queries) : nullptr, kind, exact, write<Computed<S>>(values),
                        write<int64_t>(indices)},
                       scope.context());
    });
    return {values, indices};
}

/// The CSR tensors of one call.
struct Output {
    const Tensor& like;
    Tensor col, weights;

    template <class T>
    static Edges<T> allocate(void* owner, int64_t count) {
        auto* self = static_cast<Output*>(owner);
        self->col = empty_on(self->like, {count}, ScalarType::Long);
        self->weights = empty_on(self->like, {count}, self->like.scalar_type());
        return {write<int64_t>(self->col), write<T>(self->weights)};
    }
};

std::tuple<Tensor, Tensor, Tensor> knn_to_csr(const Tensor& similarities_in, const Tensor& indices_in, double power,
                                              std::string symmetrize) {
    const Symmetrize kind = symmetrize_of(symmetrize);
    const Tensor similarities = float_argument("knn_graph", "similarities", similarities_in, 2);
    const Tensor indices = int64_argument("knn_graph", "indices", indices_in, 2, similarities);
    const int64_t n = similarities.size(0), k = similarities.size(1);
    require(indices.size(0) == n && indices.size(1) == k, "knn_graph: indices must be ", shape_of(similarities), ", got ",
            shape_of(indices));
    require(n <= std::numeric_limits<int32_t>::max(), "knn_graph: similarities has ", n, " rows, more than an int32 counts");
    require(power > 0 && power <= std::numeric_limits<double>::max(), "knn_graph: power must be positive and finite, got ",
            power);
    const Tensor crow = empty_on(similarities, {n + 1}, ScalarType::Long);
    Output output{similarities, empty_on(similarities, {0}, ScalarType::Long),
                  empty_on(similarities, {0}, similarities.scalar_type())};
    const OpScope scope(similarities);
    dispatch_float(similarities, [&](auto zero) {
        using T = decltype(zero);
        const auto& kernels = kernels_for("knn_graph", similarities, cpu_kernels<T>(), cuda_kernels<T>());
        kernels.graph({n, k, read<T>(similarities), read<int64_t>(indices), power, kind, write<int64_t>(crow), &output,
                       &Output::allocate<T>},
                      scope.context());
    });
    return {crow, output.col, output.weights};
}

}  // namespace

FASTCLUST_IMPLEMENT(m.impl("knn", TORCH_BOX(&knn)); m.impl("knn_to_csr", TORCH_BOX(&knn_to_csr));)

}  // namespace fastclust::knn

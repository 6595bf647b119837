#include "diffusion/diffusion.h"

#include <cmath>
#include <limits>
#include <tuple>

#include "common/tensor.h"

namespace fastclust::diffusion {

FASTCLUST_DEFINE_CUDA_SLOT

namespace {

void require_sound(const Finding& finding) {
    const int64_t row = finding.row;
    require(finding.fault != Fault::crow || row >= 0, "diffuse: graph has row offsets that do not run from 0 to its edges");
    require(finding.fault != Fault::crow, "diffuse: graph has row offsets that fall at row ", row);
    require(finding.fault != Fault::column_range, "diffuse: graph has a column outside [0, N) in row ", row);
    require(finding.fault != Fault::column_order, "diffuse: graph has columns that do not ascend in row ", row);
    require(finding.fault != Fault::weight, "diffuse: graph has a weight that is negative or not finite in row ", row);
}

std::tuple<Tensor, Tensor, Tensor> diffuse(const Tensor& crow_in, const Tensor& col_in, const Tensor& weights_in,
                                           const Tensor& y_in, double alpha, double tol, int64_t max_iter) {
    const Tensor y = float_argument("diffuse", "y", y_in, 2);
    const Tensor crow = int64_argument("diffuse", "graph's row offsets", crow_in, 1, y);
    const Tensor col = int64_argument("diffuse", "graph's columns", col_in, 1, y);
    const Tensor weights = float_argument("diffuse", "graph's weights", weights_in, 1, y);
    const int64_t n = y.size(0), c = y.size(1), edges = col.size(0);
    require(crow.size(0) == n + 1, "diffuse: y has ", n, " rows, but graph has ", crow.size(0) - 1);
    require(weights.size(0) == edges, "diffuse: graph has ", edges, " columns, but ", weights.size(0), " weights");
    require(n < std::numeric_limits<int32_t>::max(), "diffuse: graph has ", n, " rows, more than 2^31 - 2");
    require(alpha >= 0 && alpha < 1, "diffuse: alpha must be in [0, 1), got ", alpha);
    require(tol >= 0 && std::isfinite(tol), "diffuse: tol must be finite and not negative, got ", tol);
    require(max_iter >= 0, "diffuse: max_iter must not be negative, got ", max_iter);
    require_finite_rows("diffuse", "y", y);
    const Tensor f = empty_on(y, {n, c}, y.scalar_type());
    const Tensor residual = empty_on(y, {c}, y.scalar_type());
    const Tensor n_iter = empty_on(y, {c}, ScalarType::Long);
    const OpScope scope(y);
    dispatch_float(y, [&](auto zero) {
        using T = decltype(zero);
        const auto& kernels = kernels_for("diffuse", y, cpu_kernels<T>(), cuda_kernels<T>());
        const Graph<T> graph{n, edges, read<int64_t>(crow), read<int64_t>(col), read<T>(weights)};
        require_sound(kernels.inspect(graph, scope.context()));
        kernels.solve({graph, c, read<T>(y), alpha, tol, max_iter, write<T>(f), write<T>(residual), write<int64_t>(n_iter)},
                      scope.context());
    });
    return {f, residual, n_iter};
}

}  // namespace

FASTCLUST_IMPLEMENT(m.impl("diffuse", TORCH_BOX(&diffuse));)

}  // namespace fastclust::diffusion

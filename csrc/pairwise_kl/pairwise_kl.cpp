#include "pairwise_kl/pairwise_kl.h"

#include <cmath>
#include <tuple>

#include "common/tensor.h"

namespace fastclust::pairwise_kl {

FASTCLUST_DEFINE_CUDA_SLOT

namespace {

void require_sound(const Findings& findings) {
    const auto& [log_p, labels] = findings;
    require(log_p.count == 0, "pairwise_kl: log_p holds NaN or +inf in ", log_p.count, log_p.count == 1 ? " row, " : " rows, ",
            log_p.count == 1 ? "at " : "first at ", log_p.first);
    require(labels.count == 0, "pairwise_kl: labels holds ", labels.count,
            labels.count == 1 ? " value below -1, at " : " values below -1, first at ", labels.first);
}

std::tuple<Tensor, Tensor> pairwise_kl(const Tensor& log_p_in, const Tensor& labels_in, double margin, bool detach_target,
                                       bool with_grad) {
    const Tensor log_p = float_argument("pairwise_kl", "log_p", log_p_in, 2);
    const Tensor labels = int64_argument("pairwise_kl", "labels", labels_in, 1, log_p);
    const int64_t b = log_p.size(0), k = log_p.size(1);
    require(labels.size(0) == b, "pairwise_kl: labels must be (", b, ",), got ", shape_of(labels));
    require(margin >= 0 && std::isfinite(margin), "pairwise_kl: margin must be finite and not negative, got ", margin);
    const Tensor loss = empty_on(log_p, {}, log_p.scalar_type());
    const Tensor grad = empty_on(log_p, {with_grad ? b : 0, k}, log_p.scalar_type());
    const OpScope scope(log_p);
    dispatch_float(log_p, [&](auto zero) {
        using T = decltype(zero);
        const auto& kernels = kernels_for("pairwise_kl", log_p, cpu_kernels<T>(), cuda_kernels<T>());
        const Batch<T> batch{b, k, read<T>(log_p), read<int64_t>(labels), static_cast<T>(margin)};
        require_sound(kernels.inspect(batch, scope.context()));
        kernels.loss({batch, detach_target, write<T>(loss), with_grad ? write<T>(grad) : nullptr}, scope.context());
    });
    return {loss, grad};
}

}  // namespace

FASTCLUST_IMPLEMENT(m.impl("pairwise_kl", TORCH_BOX(&pairwise_kl));)

}  // namespace fastclust::pairwise_kl

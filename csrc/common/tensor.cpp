#include "common/tensor.h"

#include "common/finite.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastclust {
namespace {

CurrentStream current_stream = nullptr;

void require_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim) {
    require(tensor.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got shape ", shape_of(tensor));
}

void require_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
    require(tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index(), op, ": ", name,
            " is on another device than the first argument");
}

/// Touching fresh memory for the first time costs one fault per page. Where the kernel grants large pages only to those who ask
/// (Linux's default), this asks; where it does not, nothing changes.
void ask_for_huge_pages([[maybe_unused]] const Tensor& tensor) {
#if defined(MADV_HUGEPAGE)
    constexpr size_t kHugePage = size_t{2} << 20, kPage = 4096;
    const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
    if (!tensor.is_cpu() || bytes < 2 * kHugePage) return;
    const auto data = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    const auto begin = (data + kPage - 1) / kPage * kPage, end = (data + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

bool is_half(const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Half || tensor.scalar_type() == ScalarType::BFloat16;
}

}  // namespace

std::string shape_of(const Tensor& tensor) {
    std::ostringstream out;
    out << "(";
    for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
    out << (tensor.dim() == 1 ? ",)" : ")");
    return out.str();
}

Tensor float_argument(const char* op, const char* name, const Tensor& tensor, int64_t dim) {
    const ScalarType dtype = tensor.scalar_type();
    require(dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": ", name, " must be float32 or float64");
    require_dim(op, name, tensor, dim);
    return torch::stable::contiguous(tensor);
}

Tensor float_argument(const char* op, const char* name, const Tensor& tensor, int64_t dim, const Tensor& like) {
    require_device(op, name, tensor, like);
    require(tensor.scalar_type() == computed_dtype(like), op, ": ", name, " must ",
            is_half(like) ? "be float32, as the first argument is in half precision" : "have the dtype of the first argument");
    return float_argument(op, name, tensor, dim);
}

Tensor stored_argument(const char* op, const char* name, const Tensor& tensor, int64_t dim) {
    if (tensor.is_cpu() || !is_half(tensor)) return float_argument(op, name, tensor, dim);
    require_dim(op, name, tensor, dim);
    return torch::stable::contiguous(tensor);
}

Tensor stored_argument(const char* op, const char* name, const Tensor& tensor, int64_t dim, const Tensor& like) {
    require_device(op, name, tensor, like);
    require(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of the first argument");
    return stored_argument(op, name, tensor, dim);
}

ScalarType computed_dtype(const Tensor& tensor) {
    return is_half(tensor) ? ScalarType::Float : tensor.scalar_type();
}

Tensor int64_argument(const char* op, const char* name, const Tensor& tensor, int64_t dim, const Tensor& like) {
    require_device(op, name, tensor, like);
    require(tensor.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64");
    require_dim(op, name, tensor, dim);
    return torch::stable::contiguous(tensor);
}

void require_finite_rows(const char* op, const char* name, const Tensor& tensor) {
    const int64_t width = tensor.dim() == 0 ? 1 : tensor.size(tensor.dim() - 1);
    const int64_t rows = width == 0 ? 0 : tensor.numel() / width;
    if (rows == 0) return;
    const OpScope scope(tensor);
    finite::BadRows bad;
    dispatch_stored(tensor, [&](auto stored) {
        using S = typename decltype(stored)::type;
        const auto& kernels = kernels_for(op, tensor, finite::cpu_kernels<S>(), finite::cuda_kernels<S>());
        bad = kernels.scan(read<S>(tensor), rows, width, scope.context());
    });
    require(bad.count == 0, op, ": ", name, " holds ", bad.count, bad.count == 1 ? " row that is" : " rows that are",
            " not finite, ", bad.count == 1 ? "at " : "first at ", bad.first);
}

Tensor empty_on(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
    Tensor tensor = torch::stable::empty({sizes.data(), sizes.size()}, dtype, std::nullopt, like.device());
    ask_for_huge_pages(tensor);
    return tensor;
}

OpScope::OpScope(const Tensor& like) : like_(like) {
    context_.owner = this;
    context_.allocate = [](void* owner, size_t bytes) {
        auto* scope = static_cast<OpScope*>(owner);
        const auto size = static_cast<int64_t>(bytes);
        return scope->scratch_.emplace_back(empty_on(scope->like_, {size}, ScalarType::Byte)).mutable_data_ptr();
    };
    if (!like.is_cpu()) {
        guard_.emplace(like.get_device_index());
        if (current_stream != nullptr) context_.stream = current_stream(like.get_device_index());
    }
}

void set_current_stream(CurrentStream getter) {
    current_stream = getter;
}

}  // namespace fastclust

namespace fastclust::finite {
FASTCLUST_DEFINE_CUDA_SLOT
FASTCLUST_DEFINE_CUDA_SLOT_OF_HALVES
}  // namespace fastclust::finite

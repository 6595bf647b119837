// Every torch wrinkle of the op files: checks, allocation, devices, registration. Only <room>.cpp files include it.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/context.h"
#include "common/export.h"
#include "common/storage.h"

namespace fastclust {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Throws what Python sees as ValueError unless `condition`: require(k < n, "knn: k must be below N (", n, "), got ", k).
template <class... Parts>
inline void require(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

/// "(50, 3)", for messages.
FASTCLUST_API std::string shape_of(const Tensor& tensor);

/// `tensor` is an argument of `op` with `dim` dimensions, float32 or float64, and comes back contiguous.
FASTCLUST_API Tensor float_argument(const char* op, const char* name, const Tensor& tensor, int64_t dim);
/// As above, on the device of `like` and of the dtype that is computed in for `like`.
FASTCLUST_API Tensor float_argument(const char* op, const char* name, const Tensor& tensor, int64_t dim, const Tensor& like);
/// As float_argument, but on CUDA float16 and bfloat16 may come too.
FASTCLUST_API Tensor stored_argument(const char* op, const char* name, const Tensor& tensor, int64_t dim);
/// As above, and of the device and dtype of `like`.
FASTCLUST_API Tensor stored_argument(const char* op, const char* name, const Tensor& tensor, int64_t dim, const Tensor& like);
/// The dtype that is computed in, and returned, for rows like `tensor`: Computed of its own.
FASTCLUST_API ScalarType computed_dtype(const Tensor& tensor);
/// `tensor` is an int64 argument with `dim` dimensions on the device of `like`, and comes back contiguous.
FASTCLUST_API Tensor int64_argument(const char* op, const char* name, const Tensor& tensor, int64_t dim, const Tensor& like);
/// Throws "op: name holds 3 rows that are not finite, first at 17"; rows are the last dimension's. Contiguous tensors only.
FASTCLUST_API void require_finite_rows(const char* op, const char* name, const Tensor& tensor);

/// A new uninitialised tensor on the device of `like`.
FASTCLUST_API Tensor empty_on(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype);

template <class T>
inline const T* read(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
inline T* write(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

/// Runs call(T{}) with T = float or double after the dtype of `tensor`.
template <class Call>
inline void dispatch_float(const Tensor& tensor, const Call& call) {
    if (tensor.scalar_type() == ScalarType::Double)
        call(double{});
    else
        call(float{});
}

/// Runs call(std::type_identity<S>{}) with S as the rows of `tensor` are stored: float, double, Float16 or Bfloat16.
template <class Call>
inline void dispatch_stored(const Tensor& tensor, const Call& call) {
    const ScalarType dtype = tensor.scalar_type();
    if (dtype == ScalarType::Half)
        call(std::type_identity<Float16>{});
    else if (dtype == ScalarType::BFloat16)
        call(std::type_identity<Bfloat16>{});
    else
        dispatch_float(tensor, [&](auto zero) { call(std::type_identity<decltype(zero)>{}); });
}

/// The device guard, the stream and the scratch memory of one op call; scratch tensors live as long as it does.
class FASTCLUST_API OpScope {
   public:
    explicit OpScope(const Tensor& like);
    OpScope(const OpScope&) = delete;
    OpScope& operator=(const OpScope&) = delete;

    const Context& context() const { return context_; }

   private:
    Tensor like_;
    std::vector<Tensor> scratch_;
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
    Context context_;
};

/// Set by the CUDA library when it is loaded.
using CurrentStream = void* (*)(int32_t device_index);
FASTCLUST_API void set_current_stream(CurrentStream getter);

/// The room's kernels for the device of `like`: `cpu` or, when the CUDA library is loaded, `cuda`.
template <class Kernels>
inline const Kernels& kernels_for(const char* op, const Tensor& like, const Kernels* cpu, const Kernels* cuda) {
    if (like.is_cpu()) return *cpu;
    require(cuda != nullptr, op, ": fastclust has no CUDA kernels here (`python -m fastclust` tells why)");
    return *cuda;
}

}  // namespace fastclust

/// Registers `function` for every device fastclust has kernels for; at the end of a room's .cpp.
#define FASTCLUST_IMPLEMENT(...)                                                                              \
    STABLE_TORCH_LIBRARY_IMPL(fastclust, CPU, m){__VA_ARGS__} STABLE_TORCH_LIBRARY_IMPL(fastclust, CUDA, m) { \
        __VA_ARGS__                                                                                           \
    }

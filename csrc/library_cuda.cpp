// The CUDA library: loading it hands its kernels and torch's current stream to the ops library.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>

#include "common/finite.h"
#include "common/tensor.h"
#include "diffusion/diffusion.h"
#include "kmeans/kmeans.h"
#include "knn/knn.h"
#include "pairwise_kl/pairwise_kl.h"
#include "soft_assign/soft_assign.h"

namespace fastclust {
namespace {

void* current_stream(int32_t device_index) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(device_index, &stream) != AOTI_TORCH_SUCCESS)
        throw std::runtime_error("fastclust: torch gave no current CUDA stream");
    return stream;
}

template <class S>
void offer_row_kernels() {
    finite::cuda_kernels<S>() = &finite::cuda::kernels<S>();
    kmeans::cuda_kernels<S>() = &kmeans::cuda::kernels<S>();
    knn::cuda_kernels<S>() = &knn::cuda::kernels<S>();
}

template <class T>
void offer_kernels() {
    offer_row_kernels<T>();
    diffusion::cuda_kernels<T>() = &diffusion::cuda::kernels<T>();
    pairwise_kl::cuda_kernels<T>() = &pairwise_kl::cuda::kernels<T>();
    soft_assign::cuda_kernels<T>() = &soft_assign::cuda::kernels<T>();
}

const bool loaded = [] {
    set_current_stream(current_stream);
    offer_kernels<float>();
    offer_kernels<double>();
    offer_row_kernels<Float16>();
    offer_row_kernels<Bfloat16>();
    return true;
}();

}  // namespace
}  // namespace fastclust

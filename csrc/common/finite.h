// The rows that hold NaN or infinity: every op looks before it computes, so that none returns a silent wrong label.
#pragma once

#include <cstdint>

#include "common/context.h"
#include "common/kernels.h"

namespace fastclust::finite {

struct BadRows {
    int64_t count = 0;
    int64_t first = -1;
};

template <class T>
struct Kernels {
    /// x (rows, width), row-major. Waits for the device: its answer decides whether the op goes on. While a CUDA graph is
    /// captured nothing may wait, so there the rows go unchecked.
    BadRows (*scan)(const T* x, int64_t rows, int64_t width, const Context& context);
};

FASTCLUST_DECLARE_KERNELS

}  // namespace fastclust::finite

// How rows may lie in memory. CUDA's k-means and kNN take them in half precision too, widen each value as they read it
// (common/half_cuda.h) and compute in float: their results are to the bit those of the rows copied to float.
#pragma once

#include <type_traits>

#include "common/export.h"

namespace fastclust {

// Seen from other libraries, as what is made of them: the CUDA library fills the ops library's slots for them.
struct FASTCLUST_API Float16;   // an IEEE half
struct FASTCLUST_API Bfloat16;  // the upper half of a float

/// What is computed in, and returned, where rows are stored as S.
template <class S>
struct ComputedOf {
    using Type = S;
};
template <>
struct ComputedOf<Float16> {
    using Type = float;
};
template <>
struct ComputedOf<Bfloat16> {
    using Type = float;
};
template <class S>
using Computed = typename ComputedOf<S>::Type;

template <class S>
constexpr bool kIsHalf = !std::is_same_v<S, Computed<S>>;

}  // namespace fastclust

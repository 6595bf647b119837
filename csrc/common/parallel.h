// Parallel loops for the torch-free kernels.
#pragma once

#include <cstdint>

#include "common/export.h"

namespace fastclust {

using TaskRange = void (*)(int64_t begin, int64_t end, void* closure);

/// Runs `range` over disjoint pieces that cover [begin, end), on torch's intra-op threads.
FASTCLUST_API void run_parallel(int64_t begin, int64_t end, int64_t grain, TaskRange range, void* closure);

/// How many threads run_parallel may use: to size work, never to choose how sums are split (results may not depend on it).
FASTCLUST_API int num_threads();

/// Calls body(begin, end) on pieces of at least `grain` indices. How the range is cut depends on the number of threads:
/// reductions must go through partial sums per fixed block of indices, not per piece.
template <class Body>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
    run_parallel(
        begin, end, grain, [](int64_t b, int64_t e, void* closure) { (*static_cast<const Body*>(closure))(b, e); },
        const_cast<Body*>(&body));
}

}  // namespace fastclust

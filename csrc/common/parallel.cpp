#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace fastclust {

void run_parallel(int64_t begin, int64_t end, int64_t grain, TaskRange range, void* closure) {
    if (begin >= end) return;
    torch::stable::parallel_for(begin, end, grain < 1 ? 1 : grain,
                                [&](int64_t piece_begin, int64_t piece_end) { range(piece_begin, piece_end, closure); });
}

int num_threads() {
    return static_cast<int>(torch::stable::get_num_threads());
}

}  // namespace fastclust

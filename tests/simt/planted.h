#pragma once

#include <cstdint>
#include <string>

namespace fastclust::planted {

/// Runs the kernel with this fault on x, 128 numbers.
void run(const std::string& fault, float* x, int64_t n);

}  // namespace fastclust::planted

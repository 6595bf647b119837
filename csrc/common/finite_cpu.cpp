#include <algorithm>
#include <atomic>

#include "common/finite.h"
#include "common/parallel.h"

namespace fastclust::finite::FASTCLUST_CAPABILITY {
namespace {

/// x * 0 is 0 for every finite x and NaN otherwise, and a sum of those vectorises where std::isfinite does not.
template <class T>
bool all_finite(const T* x, int64_t count) {
    constexpr int kLanes = 64 / sizeof(T);
    T lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * T(0);
    for (; i < count; ++i) lanes[0] += x[i] * T(0);
    T sum = 0;
    for (const T lane : lanes) sum += lane;
    return sum == T(0);
}

template <class T>
BadRows scan(const T* x, int64_t rows, int64_t width, const Context&) {
    std::atomic<bool> found{false};
    const int64_t grain = 65536 / width + 1;
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
        if (!all_finite(x + begin * width, (end - begin) * width)) found.store(true, std::memory_order_relaxed);
    });
    BadRows bad;
    if (!found.load()) return bad;
    for (int64_t row = 0; row < rows; ++row) {  // the error path: counted by one thread
        if (all_finite(x + row * width, width)) continue;
        if (bad.count++ == 0) bad.first = row;
    }
    return bad;
}

template <class T>
constexpr Kernels<T> kTable{scan<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::finite::FASTCLUST_CAPABILITY

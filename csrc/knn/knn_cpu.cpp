#include "knn/filter.h"
#include "knn/finder.h"
#include "knn/graph.h"
#include "knn/knn.h"
#include "knn/rows.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {
namespace {

int64_t common_divisor(int64_t a, int64_t b) {
    while (b != 0) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/// Positions step through the rows by the golden ratio: any few hundred in succession are spread evenly over all of them.
const int32_t* spread_order(int64_t count, const Context& context) {
    int32_t* order = context.scratch<int32_t>(count);
    int64_t step = static_cast<int64_t>(static_cast<double>(count) * 0.6180339887498949) | 1;
    while (common_divisor(step, count) != 1) step += 2;
    int64_t row = 0;
    for (int64_t position = 0; position < count; ++position) {
        order[position] = static_cast<int32_t>(row);
        row = (row + step) % count;
    }
    return order;
}

const int32_t* given_order(int64_t count, const Context& context) {
    int32_t* order = context.scratch<int32_t>(count);
    for (int64_t position = 0; position < count; ++position) order[position] = static_cast<int32_t>(position);
    return order;
}

template <class T>
void search(const Search<T>& s, const Context& context) {
    int exponent = 0;
    if (s.metric != Metric::cosine) {
        T largest = largest_magnitude(s.x, s.n * s.d);
        if (s.queries != nullptr) {
            const T other = largest_magnitude(s.queries, s.m * s.d);
            largest = largest > other ? largest : other;
        }
        exponent = common_exponent(largest);
    }
    const Rows<T> x = prepare(s.metric, s.x, s.n, s.d, exponent, context);
    const T* centre = sample_centre(x, context);
    const FloatFilter<T> columns(s.metric, x, spread_order(s.n, context), centre, true, context);
    if (s.queries == nullptr) {
        Finder<T, FloatFilter<T>>(s, exponent, columns, columns, context).run();
        return;
    }
    const Rows<T> queries = prepare(s.metric, s.queries, s.m, s.d, exponent, context);
    const FloatFilter<T> rows(s.metric, queries, given_order(s.m, context), centre, false, context);
    Finder<T, FloatFilter<T>>(s, exponent, rows, columns, context).run();
}

template <class T>
constexpr Kernels<T> kTable{search<T>, graph<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

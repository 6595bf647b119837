#include "knn/clustered_finder.h"
#include "knn/clusters.h"
#include "knn/filter.h"
#include "knn/finder.h"
#include "knn/graph.h"
#include "knn/int8_filter.h"
#include "knn/knn.h"
#include "knn/residual_filter.h"
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

/// A search with its rows prepared.
template <class T>
struct Problem {
    const Search<T>& search;
    int exponent;
    const Context& context;
    Rows<T> x = prepare(search.metric, search.x, search.n, search.d, exponent, context);
    Rows<T> queries =
        search.queries == nullptr ? x : prepare(search.metric, search.queries, search.m, search.d, exponent, context);
    const int32_t* order = spread_order(search.n, context);
    const int32_t* query_order = search.queries == nullptr ? order : given_order(search.m, context);
    const T* centre = sample_centre(x, context);

    template <class Filter>
    bool run(const Filter& rows, const Filter& columns, double affordable) const {
        return Finder<T, Filter>(search, exponent, rows, columns, context).run(affordable);
    }
};

template <class T>
void search_with_float(const Problem<T>& p) {
    constexpr double kAny = std::numeric_limits<double>::infinity();
    const Metric metric = p.search.metric;
    const FloatFilter<T> columns(metric, p.x, p.order, p.centre, true, p.context);
    if (p.search.queries == nullptr) {
        p.run(columns, columns, kAny);
        return;
    }
    p.run(FloatFilter<T>(metric, p.queries, p.query_order, p.centre, false, p.context), columns, kAny);
}

#if defined(__AVX512VNNI__)
/// False where 8 bits are not the better filter: few features, few rows, or scores too close to each other.
template <class T>
bool search_with_int8(const Problem<T>& p) {
    constexpr int64_t kLeastDepth = 32, kLeastRows = 512;
    const Search<T>& s = p.search;
    if (s.d < kLeastDepth || s.d > Int8Filter<T>::kMostDepth || s.n < kLeastRows) return false;
    const Quantiser quantiser = Quantiser::choose(p.x, p.order, s.n, [&](int64_t) { return p.centre; });
    const Int8Filter<T> columns(s.metric, p.x, p.order, p.centre, quantiser, s.exact, p.context);
    if (!columns.usable) return false;
    // About where what the products gain over single precision, a cycle for 85 features of a pair, goes into exact scores of
    // candidates beyond those that there is room for.
    const double gain = static_cast<double>(s.n * s.d) / 85 / (100 + static_cast<double>(s.d) / 4);
    const double affordable = gain + static_cast<double>(Candidates<int32_t>::capacity_for(s.k));
    if (s.queries == nullptr) return p.run(columns, columns, affordable);
    const Int8Filter<T> rows(s.metric, p.queries, p.query_order, p.centre, quantiser, s.exact, p.context);
    return rows.usable && p.run(rows, columns, affordable);
}

/// False where a clustering would not help: few rows, or no clusters among them.
template <class T>
bool search_in_clusters(const Problem<T>& p) {
    constexpr int64_t kLeastDepth = 32, kLeastClusters = 8;
    const Search<T>& s = p.search;
    const int64_t count = Clusters<T>::count_for(s.n, s.k);
    if (s.queries != nullptr || s.d < kLeastDepth || s.d > ResidualFilter<T>::kMostDepth || count < kLeastClusters)
        return false;
    const auto clusters = Clusters<T>::of(p.x, count, s.k + s.k / 2 + 16, p.context);
    const double affordable = 1.5 * static_cast<double>(Candidates<int32_t>::capacity_for(s.k));
    if (clusters.count < kLeastClusters || clusters.expected_candidates(p.x, s.metric, s.k) > affordable) return false;
    ResidualFilter<T> filter(s.metric, p.x, clusters, p.centre, s.exact, p.context);
    if (!filter.usable) return false;
    return ClusteredFinder<T>(s, p.exponent, filter, p.context).run(affordable);
}
#endif

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
    const Problem<T> problem{s, exponent, context};
#if defined(__AVX512VNNI__)
    if (search_in_clusters(problem) || search_with_int8(problem)) return;
#endif
    search_with_float(problem);
}

template <class T>
constexpr Kernels<T> kTable{search<T>, graph<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

#include "kmeans/kmeans_cpu.h"

#include <algorithm>

#include "kmeans/search.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {
namespace {

template <class T>
void assign(const Assign<T>& a, const Context& context) {
    const int pieces = num_threads();
    Search<T> search(a.n, a.k, a.d, 1, a.exact, pieces, context);
    for (int64_t problem = 0; problem < a.batch; ++problem) {
        const T* x = a.x + problem * a.n * a.d;
        const T* centroids = a.centroids + problem * a.k * a.d;
        int64_t* labels = a.labels + problem * a.n;
        search.set_rows(x);
        search.set_centroids(centroids);
        for_pieces(pieces, span_count(a.n), [&](int piece, int64_t first, int64_t last) {
            int64_t rows[kSpanRows];
            T scores[kSpanRows], leads[kSpanRows], gaps[kSpanRows];
            int32_t nearest[kSpanRows], rivals[kRivals][kSpanRows];
            for (int64_t span = first; span < last; ++span) {
                const int64_t begin = span * kSpanRows, end = span_end(span, a.n);
                for (int64_t row = begin; row < end; ++row) rows[row - begin] = row;
                search.assign(piece, rows, end - begin, {nearest, scores, {rivals[0], rivals[1]}, leads, gaps, false});
                std::copy_n(nearest, end - begin, labels + begin);
                for (int64_t row = begin; row < end; ++row)
                    a.distances[problem * a.n + row] =
                        static_cast<T>(squared_distance(x + row * a.d, centroids + labels[row] * a.d, a.d));
            }
        });
    }
}

template <class T>
constexpr Kernels<T> kTable{assign<T>, lloyd<T>, plus_plus<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

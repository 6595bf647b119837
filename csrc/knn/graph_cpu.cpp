// Neighbour lists to a symmetrised CSR matrix without a comparison sort: a transposition by counting leaves each row's entries
// in ascending order, so W^T is W transposed, and W in order is W^T transposed. Then each row of the result merges two lists.
#include <atomic>
#include <cmath>
#include <stdexcept>

#include "common/parallel.h"
#include "knn/graph.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {
namespace {

/// Sparse rows: those of row i at [starts[i], starts[i + 1]).
template <class T>
struct Lists {
    int64_t* starts;  // (N + 1)
    int32_t* col;
    T* weights;
};

template <class T>
Lists<T> make_lists(int64_t n, int64_t room, const Context& context) {
    return {context.scratch<int64_t>(n + 1), context.scratch<int32_t>(room), context.scratch<T>(room)};
}

template <class T>
T weight_of(T similarity, double power) {
    constexpr int kMostFactors = 8;
    if (!(similarity > T(0))) return 0;
    const int factors = power <= kMostFactors ? static_cast<int>(power) : 0;
    if (factors == 0 || factors != power) return static_cast<T>(std::pow(similarity, static_cast<T>(power)));
    T weight = similarity;
    for (int f = 1; f < factors; ++f) weight *= similarity;
    return weight;
}

/// counts[1 .. n] become starts[0 .. n]; counts[0] is not read.
void sum_up(int64_t* starts, int64_t n) {
    starts[0] = 0;
    for (int64_t i = 0; i < n; ++i) starts[i + 1] += starts[i];
}

/// The neighbour lists with their weights, as they come, without the entries of weight zero.
template <class T>
void weigh(const Graph<T>& g, const Lists<T>& out) {
    std::atomic<bool> outside{false};
    parallel_for(0, g.n, 256, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            int64_t count = 0;
            for (int64_t c = 0; c < g.k; ++c) {
                const int64_t col = g.indices[i * g.k + c];
                if (col < 0 || col >= g.n) outside.store(true, std::memory_order_relaxed);
                count += weight_of(g.similarities[i * g.k + c], g.power) != T(0);
            }
            out.starts[i + 1] = count;
        }
    });
    if (outside.load()) throw std::invalid_argument("knn_graph: indices must be in [0, N)");
    sum_up(out.starts, g.n);
    parallel_for(0, g.n, 256, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            int64_t at = out.starts[i];
            for (int64_t c = 0; c < g.k; ++c) {
                const T weight = weight_of(g.similarities[i * g.k + c], g.power);
                if (weight == T(0)) continue;
                out.col[at] = static_cast<int32_t>(g.indices[i * g.k + c]);
                out.weights[at++] = weight;
            }
        }
    });
}

/// Each part of the source rows counts, then places, its own entries: the same result on any number of threads.
template <class T>
void transpose(int64_t n, const Lists<T>& in, const Lists<T>& out, int32_t* counts, int64_t parts) {
    const int64_t length = (n + parts - 1) / parts;
    const auto for_each_part = [&](const auto& body) {
        parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p)
                body(counts + p * n, p * length < n ? p * length : n, (p + 1) * length < n ? (p + 1) * length : n);
        });
    };
    for_each_part([&](int32_t* count, int64_t first, int64_t last) {
        for (int64_t j = 0; j < n; ++j) count[j] = 0;
        for (int64_t e = in.starts[first]; e < in.starts[last]; ++e) ++count[in.col[e]];
    });
    parallel_for(0, n, 4096, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
            int32_t before = 0;
            for (int64_t p = 0; p < parts; ++p) {
                const int32_t count = counts[p * n + j];
                counts[p * n + j] = before;
                before += count;
            }
            out.starts[j + 1] = before;
        }
    });
    sum_up(out.starts, n);
    for_each_part([&](int32_t* placed, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
            for (int64_t e = in.starts[i]; e < in.starts[i + 1]; ++e) {
                const int64_t at = out.starts[in.col[e]] + placed[in.col[e]]++;
                out.col[at] = static_cast<int32_t>(i);
                out.weights[at] = in.weights[e];
            }
    });
}

template <class T>
T combine(Symmetrize symmetrize, T a, T b) {
    if (symmetrize == Symmetrize::max) return a > b ? a : b;
    return symmetrize == Symmetrize::mean ? (a + b) / 2 : a + b;
}

/// Calls entry(column, a, b) for each column of either list, ascending; a or b is 0 where only the other has it.
template <class T, class Entry>
void merge_row(const Lists<T>& a, const Lists<T>& b, int64_t row, const Entry& entry) {
    int64_t i = a.starts[row], j = b.starts[row];
    const int64_t a_end = a.starts[row + 1], b_end = b.starts[row + 1];
    while (i < a_end && j < b_end) {
        const int32_t left = a.col[i], right = b.col[j];
        entry(left < right ? left : right, left <= right ? a.weights[i] : T(0), right <= left ? b.weights[j] : T(0));
        i += left <= right;
        j += right <= left;
    }
    for (; i < a_end; ++i) entry(a.col[i], a.weights[i], T(0));
    for (; j < b_end; ++j) entry(b.col[j], T(0), b.weights[j]);
}

template <class T>
void copy_out(const Graph<T>& g, const Lists<T>& lists) {
    for (int64_t i = 0; i <= g.n; ++i) g.crow[i] = lists.starts[i];
    const Edges<T> edges = g.allocate(g.owner, g.crow[g.n]);
    parallel_for(0, g.crow[g.n], 16384, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) {
            edges.col[e] = lists.col[e];
            edges.weights[e] = lists.weights[e];
        }
    });
}

template <class T>
void merge_out(const Graph<T>& g, const Lists<T>& own, const Lists<T>& others) {
    parallel_for(0, g.n, 256, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            int64_t count = 0;
            merge_row(own, others, i, [&](int32_t, T a, T b) { count += combine(g.symmetrize, a, b) != T(0); });
            g.crow[i + 1] = count;
        }
    });
    sum_up(g.crow, g.n);
    const Edges<T> edges = g.allocate(g.owner, g.crow[g.n]);
    parallel_for(0, g.n, 256, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            int64_t at = g.crow[i];
            merge_row(own, others, i, [&](int32_t col, T a, T b) {
                const T weight = combine(g.symmetrize, a, b);
                if (weight == T(0)) return;
                edges.col[at] = col;
                edges.weights[at++] = weight;
            });
        }
    });
}

}  // namespace

template <class T>
void graph(const Graph<T>& g, const Context& context) {
    constexpr int64_t kParts = 16;
    const Lists<T> own = make_lists<T>(g.n, g.n * g.k, context);
    weigh(g, own);
    const Lists<T> others = make_lists<T>(g.n, own.starts[g.n], context);
    int32_t* counts = context.scratch<int32_t>(kParts * g.n);
    transpose(g.n, own, others, counts, kParts);
    transpose(g.n, others, own, counts, kParts);
    if (g.symmetrize == Symmetrize::none)
        copy_out(g, own);
    else
        merge_out(g, own, others);
}

template void graph<float>(const Graph<float>&, const Context&);
template void graph<double>(const Graph<double>&, const Context&);

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

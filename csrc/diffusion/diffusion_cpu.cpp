#include <atomic>

#include "diffusion/panel.h"

namespace fastclust::diffusion::FASTCLUST_CAPABILITY {
namespace {

template <class T>
Fault fault_in_row(const Graph<T>& graph, int64_t row) {
    const int64_t begin = graph.crow[row], end = graph.crow[row + 1];
    bool outside = false, unordered = false, bad_weight = false;
    for (int64_t e = begin; e < end; ++e) outside |= (graph.col[e] < 0) | (graph.col[e] >= graph.n);
    for (int64_t e = begin + 1; e < end; ++e) unordered |= graph.col[e] <= graph.col[e - 1];
    for (int64_t e = begin; e < end; ++e) bad_weight |= !(graph.weights[e] >= 0) | (graph.weights[e] - graph.weights[e] != 0);
    return outside ? Fault::column_range : unordered ? Fault::column_order : bad_weight ? Fault::weight : Fault::none;
}

template <class T>
Finding inspect(const Graph<T>& graph, const Context&) {
    if (graph.crow[0] != 0 || graph.crow[graph.n] != graph.edges) return {Fault::crow, -1};
    for (int64_t row = 0; row < graph.n; ++row)
        if (graph.crow[row + 1] < graph.crow[row]) return {Fault::crow, row};
    std::atomic<bool> found{false};
    parallel_for(0, graph.n, 512, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end && !found.load(std::memory_order_relaxed); ++row)
            if (fault_in_row(graph, row) != Fault::none) found.store(true);
    });
    if (!found.load()) return {};
    int64_t row = 0;  // the error path: looked for by one thread
    while (fault_in_row(graph, row) == Fault::none) ++row;
    return {fault_in_row(graph, row), row};
}

template <class T, int kWidth>
void solve_panels(const System<T>& system, const Solve<T>& a, int64_t first, int64_t last, const Context& context) {
    if (first >= last) return;
    Panel<T, kWidth> panel(system, context);
    for (; first < last; first += kWidth)
        panel.solve(a, first, static_cast<int>(last - first < kWidth ? last - first : kWidth));
}

/// Panels of the widest kind, then one as narrow as the columns left over allow.
template <class T>
void solve(const Solve<T>& a, const Context& context) {
    constexpr int64_t kWidest = (kVectorBytes > 16 ? 256 : 128) / sizeof(T), kQuarter = kWidest / 4;
    if (a.c == 0) return;
    const System<T> system = build_system(a.graph, a.alpha, context);
    const int64_t rest = a.c % kWidest, full = a.c - rest;
    solve_panels<T, kWidest>(system, a, 0, full, context);
    if (rest > 3 * kQuarter)
        solve_panels<T, kWidest>(system, a, full, a.c, context);
    else if (rest > 2 * kQuarter)
        solve_panels<T, 3 * kQuarter>(system, a, full, a.c, context);
    else if (rest > kQuarter)
        solve_panels<T, 2 * kQuarter>(system, a, full, a.c, context);
    else if (rest > 4)
        solve_panels<T, kQuarter>(system, a, full, a.c, context);
    else if (rest > 1)
        solve_panels<T, 4>(system, a, full, a.c, context);
    else
        solve_panels<T, 1>(system, a, full, a.c, context);
}

template <class T>
constexpr Kernels<T> kTable{inspect<T>, solve<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::diffusion::FASTCLUST_CAPABILITY

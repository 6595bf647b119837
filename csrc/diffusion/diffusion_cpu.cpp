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

/// The panels of one solve, one after the other in the same memory: the first is the widest.
template <class T>
class Panels {
   public:
    Panels(const Solve<T>& a, const Context& context)
        : a_(a), context_(context), system_(build_system(a.graph, a.alpha, context)) {}

    /// Solves the columns up to `last` that are not yet solved.
    template <int kWidth>
    void solve(int64_t last) {
        using Panel = Panel<T, kWidth>;
        if (!rows_) {
            rows_ = context_.scratch<std::byte>(system_.n * Panel::kRowBytes);
            partial_ = context_.scratch<std::byte>(system_.blocks * Panel::kBlockBytes);
        }
        Panel panel(system_, rows_, partial_);
        for (; first_ < last; first_ += kWidth)
            panel.solve(a_, first_, static_cast<int>(last - first_ < kWidth ? last - first_ : kWidth));
    }

   private:
    const Solve<T>& a_;
    const Context& context_;
    const System<T> system_;
    std::byte *rows_ = nullptr, *partial_ = nullptr;
    int64_t first_ = 0;
};

/// Panels of the widest kind, then one as narrow as the columns left over allow.
template <class T>
void solve(const Solve<T>& a, const Context& context) {
    constexpr int64_t kWidest = (kVectorBytes > 16 ? 256 : 128) / sizeof(T), kQuarter = kWidest / 4;
    if (a.c == 0) return;
    Panels<T> panels(a, context);
    const int64_t rest = a.c % kWidest;
    if (a.c > rest) panels.template solve<kWidest>(a.c - rest);
    if (rest > 3 * kQuarter)
        panels.template solve<kWidest>(a.c);
    else if (rest > 2 * kQuarter)
        panels.template solve<3 * kQuarter>(a.c);
    else if (rest > kQuarter)
        panels.template solve<2 * kQuarter>(a.c);
    else if (rest > 4)
        panels.template solve<kQuarter>(a.c);
    else if (rest > 1)
        panels.template solve<4>(a.c);
    else if (rest > 0)
        panels.template solve<1>(a.c);
}

template <class T>
constexpr Kernels<T> kTable{inspect<T>, solve<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::diffusion::FASTCLUST_CAPABILITY

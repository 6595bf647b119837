// The matrix of the solve on the CPU: I - alpha S with its rows re-ordered for locality, 32-bit columns and scaled values.
// Included by diffusion_cpu.cpp alone.
#pragma once

#include <cmath>

#include "common/parallel.h"
#include "diffusion/diffusion.h"

namespace fastclust::diffusion::FASTCLUST_CAPABILITY {
namespace {

constexpr int64_t kAhead = 4;  // rows

/// A place is a row's position in the solve.
template <class T>
struct System {
    int64_t n;
    const int32_t* order;  // (N) the graph's row at each place
    const int64_t* start;  // (N + 1) where the entries of each place begin
    const int32_t* col;    // (E) places
    const T* value;        // (E) alpha s_ij
    int64_t blocks;
    const int32_t* block;  // (blocks + 1) first places of blocks of about equal work; the sums are split along them
};

/// Rows are visited in an order that no hardware foresees: their entries are asked for a few rows ahead.
template <class T>
void prefetch_entries(const T* of, int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; e += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(of + e);
}

/// Rows in breadth-first order, begun anew every kPiece rows: the neighbours of a piece's rows are mostly its own, so the
/// product finds them in the cache. `order` has room for N + 1.
template <class T>
void order_rows(const Graph<T>& graph, int32_t* order, uint8_t* placed) {
    constexpr int64_t kPiece = 8192;
    for (int64_t row = 0; row < graph.n; ++row) placed[row] = 0;
    int64_t count = 0;
    for (int64_t seed = 0; seed < graph.n; ++seed) {
        if (placed[seed]) continue;
        const int64_t first = count;
        placed[seed] = 1;
        order[count++] = static_cast<int32_t>(seed);
        for (int64_t head = first; head < count && count - first < kPiece; ++head) {
            if (head + kAhead < count) {
                const int64_t ahead = order[head + kAhead];
                prefetch_entries(graph.col, graph.crow[ahead], graph.crow[ahead + 1]);
            }
            for (int64_t e = graph.crow[order[head]]; e < graph.crow[order[head] + 1]; ++e) {
                const int64_t row = graph.col[e];
                order[count] = static_cast<int32_t>(row);  // kept if new: no branch, which could not be foretold
                count += placed[row] ^ 1;
                placed[row] = 1;
            }
        }
    }
}

/// Cuts the places into blocks of about kWork entries.
template <class T>
void cut_blocks(System<T>& system, const Context& context) {
    constexpr int64_t kWork = 8192, kRowWork = 16;
    const auto work_before = [&](int64_t place) { return system.start[place] + kRowWork * place; };
    system.blocks = work_before(system.n) / kWork + 1;
    int32_t* block = context.scratch<int32_t>(system.blocks + 1);
    int64_t place = 0;
    for (int64_t b = 0; b < system.blocks; ++b) {
        while (place < system.n && work_before(place) < b * kWork) ++place;
        block[b] = static_cast<int32_t>(place);
    }
    block[system.blocks] = static_cast<int32_t>(system.n);
    system.block = block;
}

template <class T>
struct Place {
    T scale;  // d^-1/2, 1 where the degree is 0
    int32_t place;
};

template <class T>
Place<T>* place_rows(const Graph<T>& graph, const int32_t* order, const Context& context) {
    auto* places = context.scratch<Place<T>>(graph.n);
    parallel_for(0, graph.n, 256, [&](int64_t begin, int64_t end) {
        for (int64_t place = begin; place < end; ++place) {
            const int64_t row = order[place];
            if (place + kAhead < graph.n) {
                const int64_t ahead = order[place + kAhead];
                prefetch_entries(graph.weights, graph.crow[ahead], graph.crow[ahead + 1]);
            }
            double degree = 0;
            for (int64_t e = graph.crow[row]; e < graph.crow[row + 1]; ++e) degree += static_cast<double>(graph.weights[e]);
            places[row] = {static_cast<T>(degree > 0 ? 1 / __builtin_sqrt(degree) : 1), static_cast<int32_t>(place)};
        }
    });
    return places;
}

template <class T>
System<T> build_system(const Graph<T>& graph, double alpha, const Context& context) {
    const int64_t n = graph.n;
    auto* order = context.scratch<int32_t>(n + 1);
    auto* start = context.scratch<int64_t>(n + 1);
    auto* col = context.scratch<int32_t>(graph.edges);
    auto* value = context.scratch<T>(graph.edges);
    order_rows(graph, order, context.scratch<uint8_t>(n));
    const Place<T>* places = place_rows(graph, order, context);
    start[0] = 0;
    for (int64_t p = 0; p < n; ++p) start[p + 1] = start[p] + graph.crow[order[p] + 1] - graph.crow[order[p]];
    System<T> system{n, order, start, col, value, 0, nullptr};
    cut_blocks(system, context);
    parallel_for(0, system.blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = system.block[begin]; p < system.block[end]; ++p) {
            const int64_t row = order[p], from = graph.crow[row] - start[p];
            if (p + kAhead < n) {
                const int64_t ahead = order[p + kAhead];
                prefetch_entries(graph.col, graph.crow[ahead], graph.crow[ahead + 1]);
                prefetch_entries(graph.weights, graph.crow[ahead], graph.crow[ahead + 1]);
            }
            const T own = static_cast<T>(alpha) * places[row].scale;
            for (int64_t e = start[p]; e < start[p + 1]; ++e) {
                const Place<T> other = places[graph.col[from + e]];
                col[e] = other.place;
                value[e] = own * graph.weights[from + e] * other.scale;
            }
        }
    });
    return system;
}

}  // namespace
}  // namespace fastclust::diffusion::FASTCLUST_CAPABILITY

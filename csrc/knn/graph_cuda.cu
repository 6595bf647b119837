// Neighbour lists to a symmetrised CSR matrix: each row gathers its own entries and those that name it, sorts them by column
// and joins the two of a column. Which thread comes first decides only the order before the sort.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/sort_cuda.h"
#include "knn/knn_cuda.h"

namespace fastclust::knn::cuda {
namespace {

using namespace fastclust::cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <class T>
struct Entry {
    T weight;
    int32_t col;
};

template <class T>
struct Build {
    Graph<T> g;
    T* weights;                   // (N, k) W, in the order of indices
    int64_t* starts;              // (N + 1) where a row's entries begin
    unsigned long long* cursors;  // (N) how many entries a row has placed
    Entry<T>* entries;            // (2 N k at most)
    int32_t* outside;             // (1) set where an index is not in [0, N)

    __device__ int64_t first_row() const { return int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; }
    __device__ int64_t stride() const { return int64_t(gridDim.x) * kWarps; }
    __device__ bool begins(int64_t e, int64_t row) const { return e == starts[row] || entries[e].col != entries[e - 1].col; }
};

/// max(similarity, 0)^power; small whole powers by products, which are exact to a rounding each.
template <class T>
__device__ T weight_of(T similarity, double power) {
    constexpr int kMostFactors = 8;
    if (!(similarity > T(0))) return T(0);
    const int factors = power <= kMostFactors ? static_cast<int>(power) : 0;
    if (factors == 0 || double(factors) != power) return static_cast<T>(pow(similarity, static_cast<T>(power)));
    T weight = similarity;
    for (int f = 1; f < factors; ++f) weight *= similarity;
    return weight;
}

/// starts[i] = how many entries row i will gather: its own, and with symmetrisation those that name it.
template <class T>
__global__ void __launch_bounds__(kThreads) weigh(Build<T> b) {
    const Graph<T>& g = b.g;
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x; e < g.n * g.k; e += stride) {
        const int64_t col = g.indices[e];
        const bool inside = col >= 0 && col < g.n;
        if (!inside) atomicMax(b.outside, 1);
        const T weight = inside ? weight_of(g.similarities[e], g.power) : T(0);
        b.weights[e] = weight;
        if (weight == T(0)) continue;
        auto* counts = reinterpret_cast<unsigned long long*>(b.starts);
        atomicAdd(&counts[e / g.k], 1ULL);
        if (g.symmetrize != Symmetrize::none) atomicAdd(&counts[col], 1ULL);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) gather(Build<T> b) {
    const Graph<T>& g = b.g;
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x; e < g.n * g.k; e += stride) {
        if (b.weights[e] == T(0)) continue;
        const int64_t row = e / g.k, col = g.indices[e];
        b.entries[b.starts[row] + static_cast<int64_t>(atomicAdd(&b.cursors[row], 1ULL))] = {b.weights[e],
                                                                                             static_cast<int32_t>(col)};
        if (g.symmetrize == Symmetrize::none) continue;
        b.entries[b.starts[col] + static_cast<int64_t>(atomicAdd(&b.cursors[col], 1ULL))] = {b.weights[e],
                                                                                             static_cast<int32_t>(row)};
    }
}

/// One warp per row: sorts its entries; crow[row] = how many columns they have.
template <class T>
__global__ void __launch_bounds__(kThreads) sort_entries(Build<T> b) {
    for (int64_t row = b.first_row(); row < b.g.n; row += b.stride()) {
        const int64_t begin = b.starts[row], end = b.starts[row + 1];
        warp_sort(b.entries + begin, end - begin, [](const auto& x, const auto& y) { return x.col < y.col; });
        int64_t count = 0;
        for (int64_t e = begin + threadIdx.x % kWarp; e < end; e += kWarp) count += b.begins(e, row);
        count = warp_sum(count);
        if (threadIdx.x % kWarp == 0) b.g.crow[row] = count;
    }
}

template <class T>
__device__ T combine(Symmetrize symmetrize, T a, T b) {
    if (symmetrize == Symmetrize::max) return a > b ? a : b;
    return symmetrize == Symmetrize::mean ? (a + b) / 2 : a + b;
}

/// One warp per row writes its columns and weights.
template <class T>
__global__ void __launch_bounds__(kThreads) join_entries(Build<T> b, Edges<T> edges) {
    const int lane = threadIdx.x % kWarp;
    for (int64_t row = b.first_row(); row < b.g.n; row += b.stride()) {
        const int64_t end = b.starts[row + 1];
        int64_t place = b.g.crow[row];
        for (int64_t first = b.starts[row]; first < end; first += kWarp) {
            const int64_t e = first + lane;
            const bool begins = e < end && b.begins(e, row);
            const unsigned all = __ballot_sync(kAllLanes, begins);
            if (begins) {
                const int64_t at = place + __popc(all & ((1u << lane) - 1));
                const bool paired = e + 1 < end && b.entries[e + 1].col == b.entries[e].col;
                edges.col[at] = b.entries[e].col;
                edges.weights[at] = b.g.symmetrize == Symmetrize::none
                                        ? b.entries[e].weight
                                        : combine(b.g.symmetrize, b.entries[e].weight, paired ? b.entries[e + 1].weight : T(0));
            }
            place += __popc(all);
        }
    }
}

}  // namespace

/// Waits for the device once: the number of edges depends on the data.
template <class T>
void graph(const Graph<T>& g, const Context& context) {
    void* stream = context.stream;
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const int64_t edges = g.n * g.k, sides = g.symmetrize == Symmetrize::none ? 1 : 2;
    Build<T> b{g,
               context.scratch<T>(edges),
               context.scratch<int64_t>(g.n + 1),
               context.scratch<unsigned long long>(g.n),
               context.scratch<Entry<T>>(sides * edges),
               context.scratch<int32_t>(1)};
    auto* sums = context.scratch<int64_t>(ceil_div(g.n, scan::kChunk));
    check(cudaMemsetAsync(b.starts, 0, static_cast<size_t>(g.n + 1) * sizeof(int64_t), cuda_stream), "knn_graph");
    check(cudaMemsetAsync(b.cursors, 0, static_cast<size_t>(g.n) * sizeof(int64_t), cuda_stream), "knn_graph");
    check(cudaMemsetAsync(b.outside, 0, sizeof(int32_t), cuda_stream), "knn_graph");
    const dim3 block(kThreads), rows = grid_of(ceil_div(g.n, kWarps)), elements = grid_of(ceil_div(edges, kThreads));
    launch("weigh", weigh<T>, elements, block, 0, stream, b);
    exclusive_scan(b.starts, g.n, sums, stream);
    launch("gather", gather<T>, elements, block, 0, stream, b);
    launch("sort_entries", sort_entries<T>, rows, block, 0, stream, b);
    exclusive_scan(g.crow, g.n, sums, stream);
    int32_t outside = 0;
    int64_t count = 0;
    check(cudaMemcpyAsync(&outside, b.outside, sizeof outside, cudaMemcpyDeviceToHost, cuda_stream), "knn_graph");
    check(cudaMemcpyAsync(&count, g.crow + g.n, sizeof count, cudaMemcpyDeviceToHost, cuda_stream), "knn_graph");
    check(cudaStreamSynchronize(cuda_stream), "knn_graph");
    if (outside != 0) throw std::invalid_argument("knn_graph: indices must be in [0, N)");
    launch("join_entries", join_entries<T>, rows, block, 0, stream, b, g.allocate(g.owner, count));
}

template void graph(const Graph<float>&, const Context&);
template void graph(const Graph<double>&, const Context&);

}  // namespace fastclust::knn::cuda

// Conjugate gradients for all columns at once. One iteration is five launches and no wait: the product with partial sums of
// p.q, the steps, the residuals with partial sums of r.r, the next directions' weights, and the directions. A column that has
// stopped costs no more loads; when all have, the kernels return at once.
#include <algorithm>
#include <cmath>

#include "common/cuda.h"
#include "diffusion/diffusion.h"

namespace fastclust::diffusion::cuda {
namespace {

using namespace fastclust::cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <class T>
struct Cg {
    Solve<T> a;
    int64_t chunk, chunks;  // rows per partial sum
    int width;              // neighbouring lanes of a row, a power of two
    double* scale;          // (N) d^-1/2
    int32_t* col;           // (E)
    T* value;               // (E) alpha s_ij
    T *r, *p, *q;           // (N, C); x is a.f
    double* partials;       // (C, chunks)
    double *norm2, *rr;     // (C) |y|^2, |r|^2
    T *step, *next;         // (C)
    int32_t* going;         // (C)
    int32_t* active;        // (1) how many go on

    /// sum_j alpha s_ij in_jc.
    __device__ T neighbours(const T* in, int64_t row, int64_t c) const {
        T sum = 0;
        for (int64_t e = a.graph.crow[row]; e < a.graph.crow[row + 1]; ++e) sum += value[e] * in[int64_t(col[e]) * a.c + c];
        return sum;
    }
};

template <class T>
__global__ void scale_rows(Cg<T> s) {
    const Graph<T>& graph = s.a.graph;
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < graph.n; row += stride) {
        double degree = 0;
        for (int64_t e = graph.crow[row] + lane; e < graph.crow[row + 1]; e += kWarp) degree += double(graph.weights[e]);
        degree = warp_sum(degree);
        if (lane == 0) s.scale[row] = degree > 0 ? 1 / sqrt(degree) : 1;
    }
}

template <class T>
__global__ void scale_edges(Cg<T> s) {
    const Graph<T>& graph = s.a.graph;
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < graph.n; row += stride)
        for (int64_t e = graph.crow[row] + lane; e < graph.crow[row + 1]; e += kWarp) {
            s.col[e] = static_cast<int32_t>(graph.col[e]);
            s.value[e] = static_cast<T>(s.a.alpha * s.scale[row] * double(graph.weights[e]) * s.scale[graph.col[e]]);
        }
}

/// Calls element(row, column) -> a number to add up, for the rows of chunk blockIdx.x and `width` columns of blockIdx.y, and
/// leaves the columns' sums in partials. The order of adding is fixed by the shape alone.
template <class T, class Element>
__device__ void sum_columns(const Cg<T>& s, const Element& element) {
    double* sums = shared_memory<double>();
    const int rows = kThreads / s.width, lane = threadIdx.x % s.width, first = threadIdx.x / s.width;
    for (int64_t c = int64_t(blockIdx.y) * s.width + lane; c - lane < s.a.c; c += int64_t(gridDim.y) * s.width) {
        const int64_t begin = int64_t(blockIdx.x) * s.chunk,
                      end = begin + s.chunk < s.a.graph.n ? begin + s.chunk : s.a.graph.n;
        double sum = 0;
        if (c < s.a.c)
            for (int64_t row = begin + first; row < end; row += rows) sum += double(element(row, c));
        __syncthreads();
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (first == 0 && c < s.a.c) {
            for (int other = 1; other < rows; ++other) sum += sums[other * s.width + lane];
            s.partials[c * s.chunks + blockIdx.x] = sum;
        }
    }
}

/// x = 0, r = p = y, with |y|^2.
template <class T>
__global__ void __launch_bounds__(kThreads) load(Cg<T> s) {
    sum_columns(s, [&](int64_t row, int64_t c) {
        const int64_t i = row * s.a.c + c;
        s.a.f[i] = 0;
        s.r[i] = s.p[i] = s.a.y[i];
        return s.a.y[i] * s.a.y[i];
    });
}

/// q = (I - alpha S) p, with p.q.
template <class T>
__global__ void __launch_bounds__(kThreads) multiply(Cg<T> s) {
    if (*s.active == 0) return;
    sum_columns(s, [&](int64_t row, int64_t c) {
        if (s.going[c] == 0) return T(0);
        const int64_t i = row * s.a.c + c;
        s.q[i] = s.p[i] - s.neighbours(s.p, row, c);
        return s.p[i] * s.q[i];
    });
}

/// r -= step q, with |r|^2.
template <class T>
__global__ void __launch_bounds__(kThreads) descend(Cg<T> s) {
    if (*s.active == 0) return;
    sum_columns(s, [&](int64_t row, int64_t c) {
        if (s.going[c] == 0) return T(0);
        const int64_t i = row * s.a.c + c;
        const T r = s.r[i] - s.step[c] * s.q[i];
        s.r[i] = r;
        return r * r;
    });
}

/// x += step p, p = r + next p, once more for a column that `decide` has just stopped: `step` alone tells.
template <class T>
__global__ void advance(Cg<T> s) {
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < s.a.graph.n * s.a.c; i += stride) {
        const int64_t c = i % s.a.c;
        if (s.step[c] == T(0)) continue;
        s.a.f[i] += s.step[c] * s.p[i];
        s.p[i] = s.r[i] + s.next[c] * s.p[i];
    }
}

/// |y - (I - alpha S) x|^2.
template <class T>
__global__ void __launch_bounds__(kThreads) measure(Cg<T> s) {
    sum_columns(s, [&](int64_t row, int64_t c) {
        const int64_t i = row * s.a.c + c;
        const T error = s.a.y[i] - s.a.f[i] + s.neighbours(s.a.f, row, c);
        return error * error;
    });
}

/// A column's sum of partials, for every lane of the warp that calls.
template <class T>
__device__ double total(const Cg<T>& s, int64_t c) {
    double sum = 0;
    for (int64_t chunk = threadIdx.x % kWarp; chunk < s.chunks; chunk += kWarp) sum += s.partials[c * s.chunks + chunk];
    return warp_sum(sum);
}

enum class Stage { start, step, next, report };

/// One warp per column draws the consequence of the sums that `stage` names.
template <class T>
__global__ void __launch_bounds__(kThreads) decide(Cg<T> s, Stage stage) {
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t c = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; c < s.a.c; c += stride) {
        const double sum = total(s, c);
        if (threadIdx.x % kWarp != 0) continue;
        const bool going = stage == Stage::start || s.going[c] != 0;
        if (stage == Stage::report) {
            s.a.residual[c] = s.norm2[c] > 0 ? static_cast<T>(sqrt(sum / s.norm2[c])) : T(0);
        } else if (stage == Stage::step) {
            const bool descends = going && sum > 0;
            s.step[c] = descends ? static_cast<T>(s.rr[c] / sum) : T(0);
            if (descends) ++s.a.n_iter[c];
        } else {
            if (stage == Stage::start) {
                s.norm2[c] = sum;
                s.a.n_iter[c] = 0;
            } else if (going) {
                s.next[c] = static_cast<T>(sum / s.rr[c]);
            }
            if (going) s.rr[c] = sum;
            const bool goes_on = going && s.rr[c] > s.a.tol * s.a.tol * s.norm2[c];
            if (stage == Stage::next && going && !goes_on) atomicAdd(s.active, -1);
            if (stage == Stage::start && goes_on) atomicAdd(s.active, 1);
            s.going[c] = goes_on;
        }
    }
}

template <class T>
Cg<T> allocate(const Solve<T>& a, const Context& context) {
    constexpr int64_t kMostChunks = 1024;  // a constant, so that the sums do not depend on the device
    Cg<T> s{};
    s.a = a;
    s.width = 1;
    while (s.width < kWarp && s.width < a.c) s.width *= 2;
    s.chunk = std::max(ceil_div(a.graph.n, kMostChunks), int64_t{kThreads} / s.width);
    s.chunks = ceil_div(a.graph.n, s.chunk);
    s.scale = context.scratch<double>(a.graph.n);
    s.col = context.scratch<int32_t>(a.graph.edges);
    s.value = context.scratch<T>(a.graph.edges);
    s.r = context.scratch<T>(a.graph.n * a.c);
    s.p = context.scratch<T>(a.graph.n * a.c);
    s.q = context.scratch<T>(a.graph.n * a.c);
    s.partials = context.scratch<double>(a.c * s.chunks);
    s.norm2 = context.scratch<double>(a.c);
    s.rr = context.scratch<double>(a.c);
    s.step = context.scratch<T>(a.c);
    s.next = context.scratch<T>(a.c);
    s.going = context.scratch<int32_t>(a.c);
    s.active = context.scratch<int32_t>(1);
    return s;
}

/// Waits for the device, so it is asked once in kAskEvery iterations and never in a capture.
bool all_stopped(const int32_t* active, void* stream) {
    int32_t count = 0;
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    check(cudaMemcpyAsync(&count, active, sizeof count, cudaMemcpyDeviceToHost, cuda_stream), "diffuse");
    check(cudaStreamSynchronize(cuda_stream), "diffuse");
    return count == 0;
}

template <class T>
void solve(const Solve<T>& a, const Context& context) {
    constexpr int64_t kAskEvery = 16;
    constexpr size_t kSums = kThreads * sizeof(double);
    if (a.c == 0) return;
    void* stream = context.stream;
    const Cg<T> s = allocate(a, context);
    const dim3 block(kThreads), columns = grid_of(ceil_div(a.c, kWarps));
    const dim3 rows = grid_of(ceil_div(a.graph.n, kWarps)), elements = grid_of(ceil_div(a.graph.n * a.c, kThreads));
    const auto panels = static_cast<unsigned>(std::min<int64_t>(ceil_div(a.c, s.width), 65535));
    const dim3 chunks(static_cast<unsigned>(s.chunks), panels);
    check(cudaMemsetAsync(s.active, 0, sizeof(int32_t), static_cast<cudaStream_t>(stream)), "diffuse");
    launch("scale_rows", scale_rows<T>, rows, block, 0, stream, s);
    launch("scale_edges", scale_edges<T>, rows, block, 0, stream, s);
    launch("load", load<T>, chunks, block, kSums, stream, s);
    launch("decide", decide<T>, columns, block, 0, stream, s, Stage::start);
    const bool capturing = is_capturing(stream);
    for (int64_t iteration = 0; iteration < a.max_iter; ++iteration) {
        launch("multiply", multiply<T>, chunks, block, kSums, stream, s);
        launch("decide", decide<T>, columns, block, 0, stream, s, Stage::step);
        launch("descend", descend<T>, chunks, block, kSums, stream, s);
        launch("decide", decide<T>, columns, block, 0, stream, s, Stage::next);
        launch("advance", advance<T>, elements, block, 0, stream, s);
        if (!capturing && (iteration + 1) % kAskEvery == 0 && all_stopped(s.active, stream)) break;
    }
    launch("measure", measure<T>, chunks, block, kSums, stream, s);
    launch("decide", decide<T>, columns, block, 0, stream, s, Stage::report);
}

/// What inspect finds: is crow wrong as a whole, the first row where it falls, the lowest row * kFaults + fault.
struct Found {
    unsigned long long ends, falls, fault;
};
constexpr unsigned long long kFaults = 8, kNone = ~0ULL;

template <class T>
__global__ void inspect_crow(Graph<T> graph, Found* found) {
    const int64_t stride = int64_t(gridDim.x) * kThreads, first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (first == 0 && (graph.crow[0] != 0 || graph.crow[graph.n] != graph.edges)) atomicMin(&found->ends, 0ULL);
    for (int64_t row = first; row < graph.n; row += stride)
        if (graph.crow[row + 1] < graph.crow[row]) atomicMin(&found->falls, static_cast<unsigned long long>(row));
}

template <class T>
__global__ void inspect_rows(Graph<T> graph, Found* found) {
    if (found->ends != kNone || found->falls != kNone) return;
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < graph.n; row += stride) {
        Fault fault = Fault::none;
        const auto report = [&](Fault other) {
            if (fault == Fault::none || other < fault) fault = other;
        };
        for (int64_t e = graph.crow[row] + lane; e < graph.crow[row + 1]; e += kWarp) {
            if (graph.col[e] < 0 || graph.col[e] >= graph.n) report(Fault::column_range);
            if (e > graph.crow[row] && graph.col[e] <= graph.col[e - 1]) report(Fault::column_order);
            if (!(graph.weights[e] >= 0 && graph.weights[e] < static_cast<T>(INFINITY))) report(Fault::weight);
        }
        if (fault != Fault::none)
            atomicMin(&found->fault, static_cast<unsigned long long>(row) * kFaults + static_cast<unsigned long long>(fault));
    }
}

template <class T>
Finding inspect(const Graph<T>& graph, const Context& context) {
    if (is_capturing(context.stream)) return {};
    const auto stream = static_cast<cudaStream_t>(context.stream);
    Found host{};
    auto* found = context.scratch<Found>(1);
    check(cudaMemsetAsync(found, 0xFF, sizeof host, stream), "inspect");
    launch("inspect_crow", inspect_crow<T>, grid_of(ceil_div(graph.n + 1, kThreads)), dim3(kThreads), 0, context.stream, graph,
           found);
    launch("inspect_rows", inspect_rows<T>, grid_of(ceil_div(graph.n, kWarps)), dim3(kThreads), 0, context.stream, graph,
           found);
    check(cudaMemcpyAsync(&host, found, sizeof host, cudaMemcpyDeviceToHost, stream), "inspect");
    check(cudaStreamSynchronize(stream), "inspect");
    if (host.ends != kNone) return {Fault::crow, -1};
    if (host.falls != kNone) return {Fault::crow, static_cast<int64_t>(host.falls)};
    if (host.fault == kNone) return {};
    return {static_cast<Fault>(host.fault % kFaults), static_cast<int64_t>(host.fault / kFaults)};
}

template <class T>
constexpr Kernels<T> kTable{inspect<T>, solve<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::diffusion::cuda

// Lloyd's iteration without waiting for the host: assign, whereby each row that changes cluster moves from sum to sum, then
// move the centroids. No sum depends on the order in which threads run.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kmeans/sums_cuda.h"

namespace fastclust::kmeans::cuda {
namespace {

using namespace fastclust::cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSumThreads = 128;
constexpr int64_t kChunk = 2048;  // rows per partial sum of the inertia

/// The iteration's state, on the device.
template <class S>
struct State {
    using T = Computed<S>;
    Lloyd<S> a;
    int64_t groups, chunks;  // chunks per group
    bool later;              // false in the first iteration, where no labels were there to change
    Sums sums;
    Group* group;      // (groups)
    T* distances;      // (groups, N)
    int64_t* rows;     // (groups, N): those of the largest cluster where another is empty
    T* previous;       // (groups, K, D): the centroids that the labels were assigned by
    double* weights;   // (groups, K)
    double* shifts;    // (groups, K): |c - c before|^2
    double* variance;  // (B): the mean over columns, filled where tol > 0
    double* partials;  // (groups, chunks): of the inertia

    __device__ bool running(int64_t g) const { return group[g].phase == kRunning && !(later && group[g].changed == 0); }
};

/// The place of this block's and thread's piece in a grid of one block per piece.
__device__ int64_t first_piece() {
    return int64_t(blockIdx.x);
}

/// One block per cluster: its sum becomes the centroid.
template <class S>
__global__ void __launch_bounds__(kSumThreads) move_centroids(State<S> s) {
    const Lloyd<S>& a = s.a;
    double* slots = shared_memory<double>();
    for (int64_t piece = first_piece(); piece < s.groups * a.k; piece += gridDim.x) {
        const int64_t g = piece / a.k, k = piece % a.k;
        if (!s.running(g)) continue;
        const auto sum = [&](int64_t column) { return sum_of(s.sums, g, g / a.restarts, a.k, k, column); };
        const double weight = sum(a.d);
        double squares = 0, shift = 0;
        if (a.spherical) {
            for (int64_t column = threadIdx.x; column < a.d; column += kSumThreads) squares += sum(column) * sum(column);
            squares = block_sum(squares, slots);
        }
        const double divisor = a.spherical ? sqrt(squares) : weight;
        for (int64_t column = threadIdx.x; column < a.d; column += kSumThreads) {
            Computed<S>& centroid = a.centroids[piece * a.d + column];
            const auto moved = weight > 0 && divisor > 0 ? static_cast<Computed<S>>(sum(column) / divisor) : centroid;
            s.previous[piece * a.d + column] = centroid;
            shift += (double(moved) - double(centroid)) * (double(moved) - double(centroid));
            centroid = moved;
        }
        shift = block_sum(shift, slots);
        if (threadIdx.x == 0) {
            s.weights[piece] = weight;
            s.shifts[piece] = shift;
        }
    }
}

/// The pair with the greater value, of equals the lower index, over the block; every thread gets it.
struct Greatest {
    double value;
    int64_t index;

    __device__ void take(double other_value, int64_t other_index) {
        if (other_value > value || (other_value == value && other_index < index)) {
            value = other_value;
            index = other_index;
        }
    }

    __device__ void reduce(Greatest* slots) {
        for (int bits = kWarp / 2; bits > 0; bits /= 2) {
            const double other_value = __shfl_xor_sync(kAllLanes, value, bits);
            const int64_t other_index = __shfl_xor_sync(kAllLanes, index, bits);
            take(other_value, other_index);
        }
        __syncthreads();
        if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = *this;
        __syncthreads();
        for (unsigned w = 0; w < blockDim.x / kWarp; ++w) take(slots[w].value, slots[w].index);
    }
};

struct ConcludeShared {
    Greatest greatest[kWarps];
    double sums[kWarps];
    unsigned long long listed;
};

/// Lists the rows of a cluster that an empty one may take, in any order, with their distances to its centroid; their number.
template <class S>
__device__ int64_t list_rows(const State<S>& s, int64_t g, int64_t cluster, ConcludeShared& shared) {
    const Lloyd<S>& a = s.a;
    const int64_t first = g / a.restarts * a.n;
    int64_t* rows = s.rows + g * a.n;
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();
#pragma unroll 4
    for (int64_t row = threadIdx.x; row < a.n; row += kThreads) {
        if (a.labels[g * a.n + row] != cluster) continue;
        const bool fixed = a.fixed_labels != nullptr && a.fixed_labels[first + row] >= 0;
        const bool weightless = a.sample_weight != nullptr && !(a.sample_weight[first + row] > 0);
        if (!fixed && !weightless) rows[atomicAdd(&shared.listed, 1ULL)] = row;
    }
    __syncthreads();
    const auto count = static_cast<int64_t>(shared.listed);
    const Computed<S>* centroid = s.previous + (g * a.k + cluster) * a.d;
    for (int64_t i = threadIdx.x / kWarp; i < count; i += kWarps) {
        const S* x = a.x + (first + rows[i]) * a.d;
        Computed<S> distance = 0;
        for (int64_t t = threadIdx.x % kWarp; t < a.d; t += kWarp) distance += (x[t] - centroid[t]) * (x[t] - centroid[t]);
        distance = warp_sum(distance);
        if (threadIdx.x % kWarp == 0) s.distances[g * a.n + i] = distance;
    }
    __syncthreads();
    return count;
}

/// Puts each empty cluster on the farthest row of the largest that none before it took.
template <class S>
__device__ void seed_empty_clusters(const State<S>& s, int64_t g, ConcludeShared& shared) {
    const Lloyd<S>& a = s.a;
    const double* weights = s.weights + g * a.k;
    Greatest largest{-1, a.k};
    int empty = 0;
    for (int64_t k = threadIdx.x; k < a.k; k += kThreads) {
        largest.take(weights[k], k);
        empty |= weights[k] == 0;
    }
    largest.reduce(shared.greatest);
    if (block_sum(double(empty), shared.sums) == 0) return;
    const int64_t count = list_rows(s, g, largest.index, shared);
    Greatest last{INFINITY, -1};
    for (int64_t k = 0; k < a.k; ++k) {
        if (weights[k] != 0) continue;
        Greatest farthest{0, a.n};
        for (int64_t i = threadIdx.x; i < count; i += kThreads) {
            const int64_t row = s.rows[g * a.n + i];
            const double distance = s.distances[g * a.n + i];
            const bool taken = distance > last.value || (distance == last.value && row <= last.index);
            if (!taken) farthest.take(distance, row);
        }
        farthest.reduce(shared.greatest);
        if (!(farthest.value > 0)) return;
        double shift = 0;
        for (int64_t column = threadIdx.x; column < a.d; column += kThreads) {
            Computed<S>& centroid = a.centroids[(g * a.k + k) * a.d + column];
            const Computed<S> moved = a.x[(g / a.restarts * a.n + farthest.index) * a.d + column];
            shift += (double(moved) - double(centroid)) * (double(moved) - double(centroid));
            centroid = moved;
        }
        shift = block_sum(shift, shared.sums);
        if (threadIdx.x == 0) s.shifts[g * a.k + k] = shift;
        last = farthest;
    }
}

/// One block per group ends the iteration: empty clusters, then the two stopping rules.
template <class S>
__global__ void __launch_bounds__(kThreads, 1) conclude(State<S> s) {
    auto& shared = *shared_memory<ConcludeShared>();
    for (int64_t g = first_piece(); g < s.groups; g += gridDim.x) {
        Group& group = s.group[g];
        if (group.phase != kRunning) continue;
        const bool moved = s.running(g);
        double shift = 0;
        if (moved) {
            seed_empty_clusters(s, g, shared);
            __syncthreads();
            for (int64_t k = threadIdx.x; k < s.a.k; k += kThreads) shift += s.shifts[g * s.a.k + k];
            shift = block_sum(shift, shared.sums);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            ++group.iterations;
            group.changed = 0;
            const double variance = s.a.tol > 0 ? s.variance[g / s.a.restarts] : 0;
            if (!moved)
                group.phase = kSettled;
            else if (shift <= s.a.tol * variance)
                group.phase = kMoved;
        }
    }
}

/// Before the first iteration, and for the last assignment of the groups that still run.
__global__ void set_phase(Group* group, int64_t groups, bool start) {
    const int64_t stride = int64_t(gridDim.x) * blockDim.x;
    for (int64_t g = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; g < groups; g += stride) {
        if (start)
            group[g] = {0, 0, kRunning};
        else if (group[g].phase == kRunning)
            group[g].phase = kMoved;
    }
}

/// partials (groups, chunks): sum_i w_i |x_i - c|^2 over a chunk of rows.
template <class S>
__global__ void __launch_bounds__(kThreads) sum_distances(State<S> s) {
    const Lloyd<S>& a = s.a;
    double* slots = shared_memory<double>();
    for (int64_t piece = first_piece(); piece < s.groups * s.chunks; piece += gridDim.x) {
        const int64_t g = piece / s.chunks, start = piece % s.chunks * kChunk;
        const int64_t end = start + kChunk < a.n ? start + kChunk : a.n;
        double sum = 0;
        for (int64_t row = start + threadIdx.x; row < end; row += kThreads) {
            const double weight = a.sample_weight == nullptr ? 1.0 : double(a.sample_weight[g / a.restarts * a.n + row]);
            sum += weight * double(s.distances[g * a.n + row]);
        }
        sum = block_sum(sum, slots);
        if (threadIdx.x == 0) s.partials[piece] = sum;
    }
}

template <class S>
__global__ void __launch_bounds__(kThreads) report(State<S> s) {
    double* slots = shared_memory<double>();
    for (int64_t g = first_piece(); g < s.groups; g += gridDim.x) {
        double sum = 0;
        for (int64_t chunk = threadIdx.x; chunk < s.chunks; chunk += kThreads) sum += s.partials[g * s.chunks + chunk];
        sum = block_sum(sum, slots);
        if (threadIdx.x != 0) continue;
        s.a.inertia[g] = static_cast<Computed<S>>(sum);
        s.a.n_iter[g] = s.group[g].iterations;
    }
}

template <class S>
State<S> allocate(const Lloyd<S>& a, const Context& context) {
    State<S> s{};
    s.a = a;
    s.groups = a.batch * a.restarts;
    s.chunks = ceil_div(a.n, kChunk);
    s.sums = prepare_sums(a, context);
    s.group = context.scratch<Group>(s.groups);
    s.distances = context.scratch<Computed<S>>(s.groups * a.n);
    s.rows = context.scratch<int64_t>(s.groups * a.n);
    s.previous = context.scratch<Computed<S>>(s.groups * a.k * a.d);
    s.weights = context.scratch<double>(s.groups * a.k);
    s.shifts = context.scratch<double>(s.groups * a.k);
    s.variance = context.scratch<double>(a.batch);
    s.partials = context.scratch<double>(s.groups * s.chunks);
    return s;
}

/// From sums to new centroids, and whether to go on.
template <class S>
void update(const State<S>& s, void* stream) {
    launch("move_centroids", move_centroids<S>, grid_of(s.groups * s.a.k), dim3(kSumThreads),
           kSumThreads / kWarp * sizeof(double), stream, s);
    launch("conclude", conclude<S>, grid_of(s.groups), dim3(kThreads), sizeof(ConcludeShared), stream, s);
}

/// True where every group has stopped. Waits for the device, so it is asked once in kAskEvery iterations and never in a
/// capture.
bool all_stopped(const Group* group, int64_t groups, void* stream) {
    std::vector<Group> host(static_cast<size_t>(groups));
    check(cudaMemcpyAsync(host.data(), group, host.size() * sizeof(Group), cudaMemcpyDeviceToHost,
                          static_cast<cudaStream_t>(stream)),
          "lloyd");
    check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "lloyd");
    return std::all_of(host.begin(), host.end(), [](const Group& g) { return g.phase != kRunning; });
}

}  // namespace

template <class S>
void lloyd(const Lloyd<S>& a, const Context& context) {
    constexpr int64_t kAskEvery = 16;
    constexpr size_t kSlots = kWarps * sizeof(double);
    void* stream = context.stream;
    State<S> s = allocate(a, context);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const size_t centroid_bytes = static_cast<size_t>(s.groups * a.k * a.d) * sizeof(Computed<S>);
    check(cudaMemcpyAsync(a.centroids, a.init, centroid_bytes, cudaMemcpyDeviceToDevice, cuda_stream), "lloyd");
    check(cudaMemsetAsync(a.labels, 0xFF, static_cast<size_t>(s.groups * a.n) * sizeof(int64_t), cuda_stream), "lloyd");
    launch("set_phase", set_phase, grid_of(ceil_div(s.groups, kThreads)), dim3(kThreads), 0, stream, s.group, s.groups, true);
    if (a.tol > 0) mean_variances(a, s.variance, context);
    Assignment<S> assignment{s.groups,       a.restarts, a.n,      a.k,     a.d,     a.x,      a.centroids, a.sample_weight,
                             a.fixed_labels, a.exact,    a.labels, nullptr, s.group, kRunning, s.sums};
    Filter filter{};
    const bool filtered = wants_filter(assignment);
    if constexpr (kFilters<S>) {
        if (filtered) filter = prepare_filter(assignment, context);
    }
    const bool capturing = is_capturing(stream);
    for (int64_t iteration = 0; iteration < a.max_iter; ++iteration) {
        assign_rows(assignment, filtered ? &filter : nullptr, context);
        s.later = iteration > 0;
        update(s, stream);
        if (!capturing && (iteration + 1) % kAskEvery == 0 && all_stopped(s.group, s.groups, stream)) break;
    }
    launch("set_phase", set_phase, grid_of(ceil_div(s.groups, kThreads)), dim3(kThreads), 0, stream, s.group, s.groups, false);
    assignment.phase = kMoved;
    assignment.sums.totals = nullptr;
    assign_rows(assignment, filtered ? &filter : nullptr, context);
    assignment.group = nullptr;
    assignment.distances = s.distances;
    measure_rows(assignment, context);
    launch("sum_distances", sum_distances<S>, grid_of(s.groups * s.chunks), dim3(kThreads), kSlots, stream, s);
    launch("report", report<S>, grid_of(s.groups), dim3(kThreads), kSlots, stream, s);
}

template void lloyd(const Lloyd<float>&, const Context&);
template void lloyd(const Lloyd<double>&, const Context&);
template void lloyd(const Lloyd<Float16>&, const Context&);
template void lloyd(const Lloyd<Bfloat16>&, const Context&);

}  // namespace fastclust::kmeans::cuda

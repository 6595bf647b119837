// Lloyd's iteration without waiting for the host: assign, sort the rows by label (a stable counting sort), sum each cluster's
// rows in that order, move the centroids. No sum depends on the order in which threads run.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kmeans/kmeans_cuda.h"

namespace fastclust::kmeans::cuda {
namespace {

using fastclust::cuda::block_sum;
using fastclust::cuda::ceil_div;
using fastclust::cuda::check;
using fastclust::cuda::grid_of;
using fastclust::cuda::kAllLanes;
using fastclust::cuda::kWarp;
using fastclust::cuda::launch;
using fastclust::cuda::shared_memory;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSumThreads = 128;
constexpr int64_t kSliceRows = 256;  // rows of one cluster that one block sums

/// The iteration's state, on the device.
template <class T>
struct State {
    Lloyd<T> a;
    int64_t groups, chunk, chunks, slices;  // rows per chunk of the sort; chunks; room for slices, both per group
    bool later;                             // false in the first iteration, where no labels were there to change
    Group* group;                           // (groups)
    T* distances;                           // (groups, N)
    uint32_t* counts;                       // (groups, chunks, K): rows per label in a chunk, then where they go
    int64_t* starts;                        // (groups, K + 1): where a cluster begins in `order`
    int64_t* slice_starts;                  // (groups, K + 1): its first slice
    int64_t* order;                         // (groups, N): rows, sorted by label
    T* slice_sums;                          // (groups, slices, D)
    double* slice_weights;                  // (groups, slices)
    T* previous;                            // (groups, K, D): the centroids that the labels were assigned by
    double* weights;                        // (groups, K)
    double* shifts;                         // (groups, K): |c - c before|^2
    double* variance;                       // (B): the mean over columns, filled where tol > 0
    double* partials;                       // scratch of the reductions over rows

    __device__ bool running(int64_t g) const { return group[g].phase == kRunning && !(later && group[g].changed == 0); }
};

/// The place of this block's and thread's piece in a grid of one block per piece.
__device__ int64_t first_piece() {
    return int64_t(blockIdx.x);
}

template <class T>
__global__ void count_labels(State<T> s) {
    const Lloyd<T>& a = s.a;
    for (int64_t piece = first_piece(); piece < s.groups * s.chunks; piece += gridDim.x) {
        const int64_t g = piece / s.chunks, start = piece % s.chunks * s.chunk;
        if (!s.running(g)) continue;
        uint32_t* counts = s.counts + piece * a.k;
        for (int64_t k = threadIdx.x; k < a.k; k += kThreads) counts[k] = 0;
        __syncthreads();
        const int64_t end = start + s.chunk < a.n ? start + s.chunk : a.n;
        for (int64_t row = start + threadIdx.x; row < end; row += kThreads) atomicAdd(&counts[a.labels[g * a.n + row]], 1u);
    }
}

/// One warp per cluster: its counts become offsets within the cluster, their total goes to `starts`.
template <class T>
__global__ void scan_chunks(State<T> s) {
    const int64_t k_all = s.a.k;
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t piece = first_piece() * kWarps + threadIdx.x / kWarp; piece < s.groups * k_all; piece += stride) {
        const int64_t g = piece / k_all, k = piece % k_all;
        if (!s.running(g)) continue;
        uint32_t* counts = s.counts + g * s.chunks * k_all + k;
        uint32_t before = 0;
        for (int64_t first = 0; first < s.chunks; first += kWarp) {
            const bool inside = first + lane < s.chunks;
            const uint32_t count = inside ? counts[(first + lane) * k_all] : 0;
            uint32_t sum = count;
            for (int delta = 1; delta < kWarp; delta *= 2) {
                const uint32_t other = __shfl_up_sync(kAllLanes, sum, delta);
                if (lane >= delta) sum += other;
            }
            if (inside) counts[(first + lane) * k_all] = before + sum - count;
            before += __shfl_sync(kAllLanes, sum, kWarp - 1);
        }
        if (lane == 0) s.starts[g * (k_all + 1) + k] = before;
    }
}

/// One warp per group: exclusive prefix sums of the clusters' sizes and of their numbers of slices.
template <class T>
__global__ void scan_sizes(State<T> s) {
    const int64_t k_all = s.a.k;
    const int lane = threadIdx.x;
    for (int64_t g = first_piece(); g < s.groups; g += gridDim.x) {
        if (!s.running(g)) continue;
        int64_t* starts = s.starts + g * (k_all + 1);
        int64_t* slice_starts = s.slice_starts + g * (k_all + 1);
        int64_t rows_before = 0, slices_before = 0;
        for (int64_t first = 0; first <= k_all; first += kWarp) {
            const int64_t size = first + lane < k_all ? starts[first + lane] : 0;
            const int64_t slices = ceil_div(size, kSliceRows);
            int64_t rows_sum = size, slices_sum = slices;
            for (int delta = 1; delta < kWarp; delta *= 2) {
                const int64_t other_rows = __shfl_up_sync(kAllLanes, rows_sum, delta);
                const int64_t other_slices = __shfl_up_sync(kAllLanes, slices_sum, delta);
                if (lane >= delta) {
                    rows_sum += other_rows;
                    slices_sum += other_slices;
                }
            }
            if (first + lane <= k_all) {
                starts[first + lane] = rows_before + rows_sum - size;
                slice_starts[first + lane] = slices_before + slices_sum - slices;
            }
            rows_before += __shfl_sync(kAllLanes, rows_sum, kWarp - 1);
            slices_before += __shfl_sync(kAllLanes, slices_sum, kWarp - 1);
        }
    }
}

/// One warp per chunk places its rows, in their order, behind those of the same label in earlier chunks.
template <class T>
__global__ void sort_rows(State<T> s) {
    const Lloyd<T>& a = s.a;
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t piece = first_piece() * kWarps + threadIdx.x / kWarp; piece < s.groups * s.chunks; piece += stride) {
        const int64_t g = piece / s.chunks, start = piece % s.chunks * s.chunk;
        if (!s.running(g)) continue;
        uint32_t* next = s.counts + piece * a.k;
        const int64_t* starts = s.starts + g * (a.k + 1);
        const int64_t end = start + s.chunk < a.n ? start + s.chunk : a.n;
        for (int64_t first = start; first < end; first += kWarp) {
            const int64_t row = first + lane;
            const int64_t label = row < end ? a.labels[g * a.n + row] : -1;
            const unsigned peers = __match_any_sync(kAllLanes, label);
            const int rank = __popc(peers & ((1u << lane) - 1));
            if (label >= 0) s.order[g * a.n + starts[label] + next[label] + rank] = row;
            __syncwarp();
            if (label >= 0 && rank == 0) next[label] += static_cast<uint32_t>(__popc(peers));
            __syncwarp();
        }
    }
}

/// The cluster that slice `slice` of a group belongs to.
__device__ int64_t cluster_of(const int64_t* slice_starts, int64_t k, int64_t slice) {
    int64_t low = 0, high = k;  // slice_starts[low] <= slice < slice_starts[high]
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (slice_starts[middle] <= slice ? low : high) = middle;
    }
    return low;
}

/// One block per slice. The threads split into row lanes x columns; the row lanes are added in their order.
template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_slices(State<T> s) {
    const Lloyd<T>& a = s.a;
    T* sums = shared_memory<T>();
    int columns = kSumThreads;
    while (columns / 2 >= a.d) columns /= 2;
    const int lanes = kSumThreads / columns, lane = threadIdx.x / columns, column = threadIdx.x % columns;
    for (int64_t piece = first_piece(); piece < s.groups * s.slices; piece += gridDim.x) {
        const int64_t g = piece / s.slices, slice = piece % s.slices;
        const int64_t* starts = s.starts + g * (a.k + 1);
        const int64_t* slice_starts = s.slice_starts + g * (a.k + 1);
        if (!s.running(g) || slice >= slice_starts[a.k]) continue;
        const int64_t k = cluster_of(slice_starts, a.k, slice);
        const int64_t begin = starts[k] + (slice - slice_starts[k]) * kSliceRows;
        const int64_t end = begin + kSliceRows < starts[k + 1] ? begin + kSliceRows : starts[k + 1];
        const int64_t* order = s.order + g * a.n;
        const T* x = a.x + g / a.restarts * a.n * a.d;
        const T* weight = a.sample_weight == nullptr ? nullptr : a.sample_weight + g / a.restarts * a.n;
        for (int64_t first = 0; first < a.d; first += columns) {
            T sum = 0;
            if (first + column < a.d)
                for (int64_t i = begin + lane; i < end; i += lanes)
                    sum += (weight == nullptr ? T(1) : weight[order[i]]) * x[order[i] * a.d + first + column];
            __syncthreads();
            sums[threadIdx.x] = sum;
            __syncthreads();
            if (lane == 0 && first + column < a.d) {
                for (int other = 1; other < lanes; ++other) sum += sums[other * columns + column];
                s.slice_sums[piece * a.d + first + column] = sum;
            }
        }
        if (threadIdx.x == 0) {
            double total = 0;
            for (int64_t i = begin; i < end; ++i) total += weight == nullptr ? 1.0 : double(weight[order[i]]);
            s.slice_weights[piece] = total;
        }
    }
}

/// One block per cluster: its slices' sums, in their order and in double, become the centroid.
template <class T>
__global__ void __launch_bounds__(kSumThreads) move_centroids(State<T> s) {
    const Lloyd<T>& a = s.a;
    double* slots = shared_memory<double>();
    for (int64_t piece = first_piece(); piece < s.groups * a.k; piece += gridDim.x) {
        const int64_t g = piece / a.k, k = piece % a.k;
        if (!s.running(g)) continue;
        const int64_t* slice_starts = s.slice_starts + g * (a.k + 1);
        const int64_t begin = g * s.slices + slice_starts[k], end = g * s.slices + slice_starts[k + 1];
        const auto sum_of = [&](int64_t column) {
            double sum = 0;
            for (int64_t slice = begin; slice < end; ++slice) sum += double(s.slice_sums[slice * a.d + column]);
            return sum;
        };
        double weight = 0, squares = 0, shift = 0;
        for (int64_t slice = begin; slice < end; ++slice) weight += s.slice_weights[slice];
        if (a.spherical) {
            for (int64_t column = threadIdx.x; column < a.d; column += kSumThreads) squares += sum_of(column) * sum_of(column);
            squares = block_sum(squares, slots);
        }
        const double divisor = a.spherical ? sqrt(squares) : weight;
        for (int64_t column = threadIdx.x; column < a.d; column += kSumThreads) {
            T& centroid = a.centroids[piece * a.d + column];
            const T moved = weight > 0 && divisor > 0 ? static_cast<T>(sum_of(column) / divisor) : centroid;
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
};

/// Puts each empty cluster on the farthest row of the largest that none before it took.
template <class T>
__device__ void seed_empty_clusters(const State<T>& s, int64_t g, ConcludeShared& shared) {
    const Lloyd<T>& a = s.a;
    const int64_t b = g / a.restarts;
    const double* weights = s.weights + g * a.k;
    Greatest largest{-1, a.k};
    int empty = 0;
    for (int64_t k = threadIdx.x; k < a.k; k += kThreads) {
        largest.take(weights[k], k);
        empty |= weights[k] == 0;
    }
    largest.reduce(shared.greatest);
    if (block_sum(double(empty), shared.sums) == 0) return;
    const int64_t begin = s.starts[g * (a.k + 1) + largest.index], end = s.starts[g * (a.k + 1) + largest.index + 1];
    for (int64_t i = begin + threadIdx.x / kWarp; i < end; i += kWarps) {
        const int64_t row = s.order[g * a.n + i];
        const T* x = a.x + (b * a.n + row) * a.d;
        const T* centroid = s.previous + (g * a.k + largest.index) * a.d;
        T distance = 0;
        for (int64_t t = threadIdx.x % kWarp; t < a.d; t += kWarp) distance += (x[t] - centroid[t]) * (x[t] - centroid[t]);
        distance = fastclust::cuda::warp_sum(distance);
        if (threadIdx.x % kWarp == 0) s.distances[g * a.n + row] = distance;
    }
    __syncthreads();
    Greatest last{INFINITY, -1};
    for (int64_t k = 0; k < a.k; ++k) {
        if (weights[k] != 0) continue;
        Greatest farthest{0, a.n};
        for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
            const int64_t row = s.order[g * a.n + i];
            const double distance = s.distances[g * a.n + row];
            const bool fixed = a.fixed_labels != nullptr && a.fixed_labels[b * a.n + row] >= 0;
            const bool weightless = a.sample_weight != nullptr && !(a.sample_weight[b * a.n + row] > 0);
            const bool taken = distance > last.value || (distance == last.value && row <= last.index);
            if (!fixed && !weightless && !taken) farthest.take(distance, row);
        }
        farthest.reduce(shared.greatest);
        if (!(farthest.value > 0)) return;
        double shift = 0;
        for (int64_t column = threadIdx.x; column < a.d; column += kThreads) {
            T& centroid = a.centroids[(g * a.k + k) * a.d + column];
            const T moved = a.x[(b * a.n + farthest.index) * a.d + column];
            shift += (double(moved) - double(centroid)) * (double(moved) - double(centroid));
            centroid = moved;
        }
        shift = block_sum(shift, shared.sums);
        if (threadIdx.x == 0) s.shifts[g * a.k + k] = shift;
        last = farthest;
    }
}

/// One block per group ends the iteration: empty clusters, then the two stopping rules.
template <class T>
__global__ void __launch_bounds__(kThreads) conclude(State<T> s) {
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
template <class T>
__global__ void __launch_bounds__(kThreads) sum_distances(State<T> s) {
    const Lloyd<T>& a = s.a;
    double* slots = shared_memory<double>();
    for (int64_t piece = first_piece(); piece < s.groups * s.chunks; piece += gridDim.x) {
        const int64_t g = piece / s.chunks, start = piece % s.chunks * s.chunk;
        const int64_t end = start + s.chunk < a.n ? start + s.chunk : a.n;
        double sum = 0;
        for (int64_t row = start + threadIdx.x; row < end; row += kThreads) {
            const double weight = a.sample_weight == nullptr ? 1.0 : double(a.sample_weight[g / a.restarts * a.n + row]);
            sum += weight * double(s.distances[g * a.n + row]);
        }
        sum = block_sum(sum, slots);
        if (threadIdx.x == 0) s.partials[piece] = sum;
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) report(State<T> s) {
    double* slots = shared_memory<double>();
    for (int64_t g = first_piece(); g < s.groups; g += gridDim.x) {
        double sum = 0;
        for (int64_t chunk = threadIdx.x; chunk < s.chunks; chunk += kThreads) sum += s.partials[g * s.chunks + chunk];
        sum = block_sum(sum, slots);
        if (threadIdx.x != 0) continue;
        s.a.inertia[g] = static_cast<T>(sum);
        s.a.n_iter[g] = s.group[g].iterations;
    }
}

template <class T>
State<T> allocate(const Lloyd<T>& a, const Context& context) {
    State<T> s{};
    s.a = a;
    s.groups = a.batch * a.restarts;
    s.chunk = std::max<int64_t>(2048, a.k);  // so that the counts take no more than N + K numbers
    s.chunks = ceil_div(a.n, s.chunk);
    s.slices = ceil_div(a.n, kSliceRows) + a.k;
    s.group = context.scratch<Group>(s.groups);
    s.distances = context.scratch<T>(s.groups * a.n);
    s.counts = context.scratch<uint32_t>(s.groups * s.chunks * a.k);
    s.starts = context.scratch<int64_t>(s.groups * (a.k + 1));
    s.slice_starts = context.scratch<int64_t>(s.groups * (a.k + 1));
    s.order = context.scratch<int64_t>(s.groups * a.n);
    s.slice_sums = context.scratch<T>(s.groups * s.slices * a.d);
    s.slice_weights = context.scratch<double>(s.groups * s.slices);
    s.previous = context.scratch<T>(s.groups * a.k * a.d);
    s.weights = context.scratch<double>(s.groups * a.k);
    s.shifts = context.scratch<double>(s.groups * a.k);
    s.variance = context.scratch<double>(a.batch);
    s.partials = context.scratch<double>(s.groups * s.chunks);
    return s;
}

/// One wave of the update: from labels to new centroids.
template <class T>
void update(const State<T>& s, void* stream) {
    const int64_t chunks = s.groups * s.chunks, clusters = s.groups * s.a.k;
    launch("count_labels", count_labels<T>, grid_of(chunks), dim3(kThreads), 0, stream, s);
    launch("scan_chunks", scan_chunks<T>, grid_of(ceil_div(clusters, kWarps)), dim3(kThreads), 0, stream, s);
    launch("scan_sizes", scan_sizes<T>, grid_of(s.groups), dim3(kWarp), 0, stream, s);
    launch("sort_rows", sort_rows<T>, grid_of(ceil_div(chunks, kWarps)), dim3(kThreads), 0, stream, s);
    launch("sum_slices", sum_slices<T>, grid_of(s.groups * s.slices), dim3(kSumThreads), kSumThreads * sizeof(T), stream, s);
    launch("move_centroids", move_centroids<T>, grid_of(clusters), dim3(kSumThreads), kSumThreads / kWarp * sizeof(double),
           stream, s);
    launch("conclude", conclude<T>, grid_of(s.groups), dim3(kThreads), sizeof(ConcludeShared), stream, s);
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

template <class T>
void lloyd(const Lloyd<T>& a, const Context& context) {
    constexpr int64_t kAskEvery = 16;
    constexpr size_t kSlots = kWarps * sizeof(double);
    void* stream = context.stream;
    State<T> s = allocate(a, context);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const size_t centroid_bytes = static_cast<size_t>(s.groups * a.k * a.d) * sizeof(T);
    check(cudaMemcpyAsync(a.centroids, a.init, centroid_bytes, cudaMemcpyDeviceToDevice, cuda_stream), "lloyd");
    check(cudaMemsetAsync(a.labels, 0xFF, static_cast<size_t>(s.groups * a.n) * sizeof(int64_t), cuda_stream), "lloyd");
    launch("set_phase", set_phase, grid_of(ceil_div(s.groups, kThreads)), dim3(kThreads), 0, stream, s.group, s.groups, true);
    if (a.tol > 0) mean_variances(a, s.variance, context);
    Assignment<T> assignment{s.groups,       a.restarts, a.n,      a.k,     a.d,     a.x,     a.centroids,
                             a.fixed_labels, a.exact,    a.labels, nullptr, s.group, kRunning};
    Filter filter{};
    const bool filtered = wants_filter(assignment);
    if constexpr (sizeof(T) == sizeof(float)) {
        if (filtered) filter = prepare_filter(assignment, context);
    }
    const bool capturing = fastclust::cuda::is_capturing(stream);
    for (int64_t iteration = 0; iteration < a.max_iter; ++iteration) {
        assign_rows(assignment, filtered ? &filter : nullptr, context);
        s.later = iteration > 0;
        update(s, stream);
        if (!capturing && (iteration + 1) % kAskEvery == 0 && all_stopped(s.group, s.groups, stream)) break;
    }
    launch("set_phase", set_phase, grid_of(ceil_div(s.groups, kThreads)), dim3(kThreads), 0, stream, s.group, s.groups, false);
    assignment.phase = kMoved;
    assign_rows(assignment, filtered ? &filter : nullptr, context);
    assignment.group = nullptr;
    assignment.distances = s.distances;
    measure_rows(assignment, context);
    launch("sum_distances", sum_distances<T>, grid_of(s.groups * s.chunks), dim3(kThreads), kSlots, stream, s);
    launch("report", report<T>, grid_of(s.groups), dim3(kThreads), kSlots, stream, s);
}

template void lloyd(const Lloyd<float>&, const Context&);
template void lloyd(const Lloyd<double>&, const Context&);

}  // namespace fastclust::kmeans::cuda

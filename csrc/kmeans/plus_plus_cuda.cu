// k-means++ seeding: per pick, four passes over fixed chunks of rows. Masses are summed in double, chunk by chunk.
#include "kmeans/kmeans_cuda.h"

namespace fastclust::kmeans::cuda {
namespace {

using namespace fastclust::cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kChunk = 1024;

template <class S>
struct Seeding {
    using T = Computed<S>;
    PlusPlus<S> a;
    int64_t groups, chunks;
    T* nearest;           // (groups, N): squared distance to the nearest row picked so far
    double* masses;       // (groups, chunks): the sum over a chunk
    double* potentials;   // (groups, L, chunks): what sum m_i would be with candidate l, over a chunk
    int64_t* candidates;  // (groups, L)
    int64_t pick;

    __device__ double weight(int64_t g, int64_t row) const {
        return a.sample_weight == nullptr ? 1.0 : double(a.sample_weight[g / a.restarts * a.n + row]);
    }
    __device__ double mass(int64_t g, int64_t row) const {
        return pick == 0 ? weight(g, row) : weight(g, row) * double(nearest[g * a.n + row]);
    }
    __device__ const S* row_of(int64_t g, int64_t row) const { return a.x + (g / a.restarts * a.n + row) * a.d; }
};

/// |x - y|^2, for every lane of the warp that calls.
template <class S>
__device__ Computed<S> squared_distance(const S* x, const S* y, int64_t d) {
    Computed<S> sum = 0;
    for (int64_t t = threadIdx.x % kWarp; t < d; t += kWarp) sum += (x[t] - y[t]) * (x[t] - y[t]);
    return warp_sum(sum);
}

/// Takes the row picked last into `nearest` and sums the masses of each chunk.
template <class S>
__global__ void __launch_bounds__(kThreads) weigh(Seeding<S> s) {
    double* slots = shared_memory<double>();
    const int lane = threadIdx.x % kWarp;
    for (int64_t piece = blockIdx.x; piece < s.groups * s.chunks; piece += gridDim.x) {
        const int64_t g = piece / s.chunks, start = piece % s.chunks * kChunk;
        const int64_t end = start + kChunk < s.a.n ? start + kChunk : s.a.n;
        double sum = 0;
        for (int64_t row = start + threadIdx.x / kWarp; row < end; row += kWarps) {
            if (s.pick > 0) {
                const int64_t picked = s.a.rows[g * s.a.k + s.pick - 1];
                const auto distance = squared_distance(s.row_of(g, row), s.row_of(g, picked), s.a.d);
                Computed<S>& nearest = s.nearest[g * s.a.n + row];
                if (lane == 0 && (s.pick == 1 || distance < nearest)) nearest = distance;
            }
            if (lane == 0) sum += s.mass(g, row);
        }
        sum = block_sum(sum, slots);
        if (threadIdx.x == 0) s.masses[piece] = sum;
    }
}

/// One warp per group and candidate finds the lowest row whose prefix sum of masses exceeds u times their total.
template <class S>
__global__ void draw(Seeding<S> s) {
    const PlusPlus<S>& a = s.a;
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t piece = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; piece < s.groups * a.candidates; piece += stride) {
        const int64_t g = piece / a.candidates, l = piece % a.candidates;
        const double* masses = s.masses + g * s.chunks;
        double total = 0;
        for (int64_t chunk = 0; chunk < s.chunks; ++chunk) total += masses[chunk];
        // Fewer distinct rows than K: all masses are zero, and the weights stand in for them, chunk sums and all.
        const bool by_weight = s.pick == 0 || total == 0;
        const auto mass = [&](int64_t row) { return by_weight ? s.weight(g, row) : s.mass(g, row); };
        const auto chunk_mass = [&](int64_t chunk) {
            if (s.pick == 0 || total != 0) return masses[chunk];
            double sum = 0;
            for (int64_t row = chunk * kChunk + lane; row < (chunk + 1) * kChunk && row < a.n; row += kWarp) sum += mass(row);
            return warp_sum(sum);
        };
        double whole = total;
        if (by_weight && s.pick > 0) {
            whole = 0;
            for (int64_t chunk = 0; chunk < s.chunks; ++chunk) whole += chunk_mass(chunk);
        }
        const int64_t uniform = ((g * a.k) + s.pick) * a.candidates + (by_weight ? 0 : l);
        const double target = double(a.uniforms[uniform]) * whole;
        // Rounding may leave the last prefix sum at or below the target: then the last row with mass is drawn.
        double before = 0;
        int64_t drawn = -1, last = 0;
        for (int64_t chunk = 0; chunk < s.chunks && drawn < 0; ++chunk) {
            const double in_chunk = chunk_mass(chunk);
            if (in_chunk > 0) last = chunk;
            if (before + in_chunk > target)
                drawn = chunk;
            else
                before += in_chunk;
        }
        const bool beyond = drawn < 0;
        if (beyond) {
            drawn = last;
            before -= chunk_mass(drawn);
        }
        const int64_t start = drawn * kChunk, end = start + kChunk < a.n ? start + kChunk : a.n;
        int64_t row = -1, with_mass = start;
        for (int64_t first = start; first < end && row < 0; first += kWarp) {
            const double own = first + lane < end ? mass(first + lane) : 0;
            double sum = own;
            for (int delta = 1; delta < kWarp; delta *= 2) {
                const double other = __shfl_up_sync(kAllLanes, sum, delta);
                if (lane >= delta) sum += other;
            }
            const unsigned heavy = __ballot_sync(kAllLanes, own > 0);
            const unsigned passed = __ballot_sync(kAllLanes, own > 0 && before + sum > target);
            if (heavy != 0) with_mass = first + 31 - __clz(static_cast<int>(heavy));
            if (passed != 0 && !beyond) row = first + __ffs(static_cast<int>(passed)) - 1;
            before += __shfl_sync(kAllLanes, sum, kWarp - 1);
        }
        if (lane == 0) s.candidates[piece] = row >= 0 ? row : with_mass;
    }
}

/// One block per chunk and candidate.
template <class S>
__global__ void __launch_bounds__(kThreads) try_candidates(Seeding<S> s) {
    double* slots = shared_memory<double>();
    const PlusPlus<S>& a = s.a;
    const int lane = threadIdx.x % kWarp;
    for (int64_t piece = blockIdx.x; piece < s.groups * a.candidates * s.chunks; piece += gridDim.x) {
        const int64_t g = piece / s.chunks / a.candidates, start = piece % s.chunks * kChunk;
        const int64_t end = start + kChunk < a.n ? start + kChunk : a.n;
        const S* candidate = s.row_of(g, s.candidates[piece / s.chunks]);
        double sum = 0;
        for (int64_t row = start + threadIdx.x / kWarp; row < end; row += kWarps) {
            const auto distance = squared_distance(s.row_of(g, row), candidate, a.d);
            const auto nearest = s.nearest[g * a.n + row];
            if (lane == 0) sum += s.weight(g, row) * double(distance < nearest ? distance : nearest);
        }
        sum = block_sum(sum, slots);
        if (threadIdx.x == 0) s.potentials[piece] = sum;
    }
}

/// One warp per group takes the candidate with the least potential, the first of equals.
template <class S>
__global__ void choose(Seeding<S> s, bool tried) {
    const PlusPlus<S>& a = s.a;
    const int lane = threadIdx.x;
    for (int64_t g = blockIdx.x; g < s.groups; g += gridDim.x) {
        int64_t best = 0;
        double least = 0;
        for (int64_t l = 0; tried && l < a.candidates; ++l) {
            double sum = 0;
            for (int64_t chunk = lane; chunk < s.chunks; chunk += kWarp)
                sum += s.potentials[(g * a.candidates + l) * s.chunks + chunk];
            sum = warp_sum(sum);
            if (l == 0 || sum < least) {
                least = sum;
                best = l;
            }
        }
        if (lane == 0) a.rows[g * a.k + s.pick] = s.candidates[g * a.candidates + best];
    }
}

}  // namespace

template <class S>
void plus_plus(const PlusPlus<S>& a, const Context& context) {
    constexpr size_t kSlots = kWarps * sizeof(double);
    void* stream = context.stream;
    Seeding<S> s{};
    s.a = a;
    s.groups = a.batch * a.restarts;
    s.chunks = ceil_div(a.n, kChunk);
    s.nearest = context.scratch<Computed<S>>(s.groups * a.n);
    s.masses = context.scratch<double>(s.groups * s.chunks);
    s.potentials = context.scratch<double>(s.groups * a.candidates * s.chunks);
    s.candidates = context.scratch<int64_t>(s.groups * a.candidates);
    const int64_t draws = s.groups * a.candidates;
    for (s.pick = 0; s.pick < a.k; ++s.pick) {
        const bool several = s.pick > 0 && a.candidates > 1;
        launch("weigh", weigh<S>, grid_of(s.groups * s.chunks), dim3(kThreads), kSlots, stream, s);
        launch("draw", draw<S>, grid_of(ceil_div(draws, kWarps)), dim3(kThreads), 0, stream, s);
        if (several) launch("try_candidates", try_candidates<S>, grid_of(draws * s.chunks), dim3(kThreads), kSlots, stream, s);
        launch("choose", choose<S>, grid_of(s.groups), dim3(kWarp), 0, stream, s, several);
    }
}

template void plus_plus(const PlusPlus<float>&, const Context&);
template void plus_plus(const PlusPlus<double>&, const Context&);
template void plus_plus(const PlusPlus<Float16>&, const Context&);
template void plus_plus(const PlusPlus<Bfloat16>&, const Context&);

}  // namespace fastclust::kmeans::cuda

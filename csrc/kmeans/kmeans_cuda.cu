#include <cmath>

#include "common/tile_cuda.h"
#include "kmeans/sums_cuda.h"

namespace fastclust::kmeans::cuda {
namespace {

using namespace fastclust::cuda;

template <class T>
using Tile = PairTile<T, SquaredDifference>;

template <class T>
struct AssignShared {
    typename Tile<T>::Shared tile;
    Moved moved[Tile<T>::kRows];
    int changed;
};

template <class T>
struct Nearest {
    T distance;
    int64_t label;

    /// The nearer of both, of equals the lower label: every order of comparing gives the same.
    __device__ void take(T other_distance, int64_t other_label) {
        if (other_distance < distance || (other_distance == distance && other_label < label)) {
            distance = other_distance;
            label = other_label;
        }
    }
};

/// One block per 64 rows of a group, or of its listed ones.
template <class S>
__global__ void __launch_bounds__(Tile<Computed<S>>::kThreads) assign_tiles(Assignment<S> a, Listed listed) {
    using T = Computed<S>;
    constexpr int kSide = Tile<T>::kSide;
    auto& shared = *shared_memory<AssignShared<T>>();
    const int64_t tiles = ceil_div(a.n, Tile<T>::kRows);
    for (int64_t tile = blockIdx.x; tile < a.groups * tiles; tile += gridDim.x) {
        const int64_t g = tile / tiles, start = tile % tiles * Tile<T>::kRows;
        const int64_t count = listed.rows == nullptr ? a.n : static_cast<int64_t>(listed.count[g]);
        if (a.skips(g) || start >= count) continue;
        const S* x = a.x + a.problem(g) * a.n * a.d;
        const T* centroids = a.centroids + g * a.k * a.d;
        const auto row_at = [&](int i) -> int64_t {
            if (start + i >= count) return -1;
            return listed.rows == nullptr ? start + i : listed.rows[g * a.n + start + i];
        };
        Nearest<T> nearest[kSide];
        for (auto& best : nearest) best = {static_cast<T>(INFINITY), a.k};
        for (int64_t first = 0; first < a.k; first += Tile<T>::kCols) {
            T distance[kSide][kSide];
            Tile<T>::run(
                [&](int i) {
                    const int64_t row = row_at(i);
                    return row >= 0 ? x + row * a.d : nullptr;
                },
                [&](int j) { return first + j < a.k ? centroids + (first + j) * a.d : nullptr; }, a.d, shared.tile, distance);
            for (int j = 0; j < kSide; ++j) {
                const int64_t label = first + Tile<T>::first_col() + j;
                if (label >= a.k) break;
                for (int i = 0; i < kSide; ++i) nearest[i].take(distance[i][j], label);
            }
        }
        for (auto& best : nearest)
            for (int bits = 8; bits > 0; bits /= 2) {
                const T distance = __shfl_xor_sync(kAllLanes, best.distance, bits);
                const int64_t label = __shfl_xor_sync(kAllLanes, best.label, bits);
                best.take(distance, label);
            }
        if (threadIdx.x == 0) shared.changed = 0;
        __syncthreads();
        if (threadIdx.x % 16 == 0)
            for (int i = 0; i < kSide; ++i) {
                const int64_t row = row_at(Tile<T>::first_row() + i);
                if (row < 0) break;
                const int64_t fixed = a.fixed_label(g, row);
                if (fixed >= 0) {
                    nearest[i] = {T(0), fixed};
                    for (int64_t t = 0; t < a.d; ++t)
                        nearest[i].distance =
                            SquaredDifference::add<T>(nearest[i].distance, x[row * a.d + t], centroids[fixed * a.d + t]);
                }
                if (a.distances != nullptr) a.distances[g * a.n + row] = nearest[i].distance;
                note_label(a, g, row, nearest[i].label, shared.moved, shared.changed);
            }
        move_noted(a, g, shared.moved, shared.changed);
    }
}

template <class S>
void assign(const Assign<S>& a, const Context& context) {
    const Assignment<S> assignment{a.batch, 1,       a.n,      a.k,         a.d,     a.x,      a.centroids, nullptr,
                                   nullptr, a.exact, a.labels, a.distances, nullptr, kRunning, {}};
    if constexpr (kFilters<S>) {
        if (wants_filter(assignment)) return assign_filtered(assignment, prepare_filter(assignment, context), context);
    }
    assign_directly(assignment, {}, context);
}

template <class S>
constexpr Kernels<S> kTable{assign<S>, lloyd<S>, plus_plus<S>};

}  // namespace

template <class S>
void assign_directly(const Assignment<S>& a, const Listed& listed, const Context& context) {
    using T = Computed<S>;
    constexpr int kBlocksPerProcessor = 8;
    launch("assign_tiles", assign_tiles<S>, grid_of(a.groups * ceil_div(a.n, Tile<T>::kRows), kBlocksPerProcessor),
           dim3(Tile<T>::kThreads), sizeof(AssignShared<T>), context.stream, a, listed);
}

template void assign_directly(const Assignment<float>&, const Listed&, const Context&);
template void assign_directly(const Assignment<double>&, const Listed&, const Context&);
template void assign_directly(const Assignment<Float16>&, const Listed&, const Context&);
template void assign_directly(const Assignment<Bfloat16>&, const Listed&, const Context&);

FASTCLUST_DEFINE_KERNELS
FASTCLUST_DEFINE_KERNELS_OF_HALVES

}  // namespace fastclust::kmeans::cuda

// The loss over pairs of different labels as products of matrices on the tensor cores: KL_ij = h_i - p_i . log p_j, the mask of
// the pairs within the margin, and the mask's products with p and log p for the gradient. A float is taken as the sum of two
// halves, 22 bits of it, and halves multiply exactly; p . log p is three products (the halves' small parts are not multiplied
// with each other), laid one behind the other along the depth of one. The mask's zeros and ones are exact.
#include <algorithm>
#include <cmath>

#include "common/half_tile_cuda.h"
#include "pairwise_kl/pairwise_kl_cuda.h"

namespace fastclust::pairwise_kl::cuda {
namespace {

using namespace fastclust::cuda;

constexpr int kThreads = HalfTile::kThreads;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerProcessor = 2;
constexpr int kTile = HalfTile::kRows;
constexpr int kLossBlocks = 2048;        // a constant, so that the sums do not depend on the device
constexpr int64_t kGradientTiles = 256;  // for the same reason; splits of the rows j make up what is missing

struct RowSplit {
    float p_factor, log_factor;
    float entropy;  // sum_k p_k log p_k
    int32_t zeros;  // whether log p is -inf somewhere; such parts are 0 in the halves
};

/// A row as the first argument of a divergence or as its second.
struct alignas(16) Side {
    float factor, entropy;  // entropy: 0 for the second
    int32_t group;          // -1: in no pair
    bool zeros;             // false for the first
};

struct Products {
    Loss<float> a;
    Groups groups;
    int64_t depth, across;          // of `p` and `log`: three times K, padded; of the masks: B, padded
    Half *p, *log;                  // (B, depth): great, great, small halves of p; great, small, great of log p
    RowSplit* rows;                 // (B)
    unsigned* greatest;             // (2) the bits of the greatest p and |log p|
    Half *p_columns, *log_columns;  // (K + 1, 2, across): great and small halves by column, then a column of ones
    int64_t first, count;           // the panel: rows i
    Half* masks;                    // (2, count, across): 1 where KL_ij, then KL_ji, is within the margin; null: no gradient
    double* partials;               // (kLossBlocks)
    int64_t splits, per_split;      // of the rows j
    float* pulled;                  // (splits, 2, count, K + 1): the masks' products with log_columns, then with p_columns

    __device__ HalfTile::Rows rows_of(const Half* halves, int64_t row) const {
        return {halves + row * depth, a.batch.b - row, depth};
    }
};

struct HalfPair {
    Half great, small;
};

__device__ HalfPair split(float value, float scale) {
    const Half great = to_half(value * scale);
    return {great, to_half(value * scale - from_half(great))};
}

/// One warp per row.
__global__ void __launch_bounds__(kThreads) split_rows(Products s) {
    const Batch<float>& a = s.a.batch;
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = int64_t(gridDim.x) * kWarps, padded = s.depth / 3;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < a.b; row += stride) {
        const auto log_of = [&](int64_t k) { return k < a.k ? a.log_p[row * a.k + k] : -INFINITY; };
        const auto finite = [](float log_p) { return log_p > -INFINITY ? log_p : 0; };
        float greatest_p = 0, greatest_log = 0;
        double entropy = 0;
        bool zeros = false;
        for (int64_t k = lane; k < a.k; k += kWarp) {
            const float log_p = finite(log_of(k)), p = exp(log_of(k));
            zeros |= !(log_of(k) > -INFINITY);
            greatest_p = fmaxf(greatest_p, p);
            greatest_log = fmaxf(greatest_log, fabsf(log_p));
            entropy += double(p) * double(log_p);
        }
        entropy = warp_sum(entropy);
        zeros = __any_sync(kAllLanes, zeros);
        const HalfScale p_scale = half_scale(warp_max(greatest_p)), log_scale = half_scale(warp_max(greatest_log));
        for (int64_t k = lane; k < padded; k += kWarp) {
            const HalfPair p = split(exp(log_of(k)), p_scale.scale), log = split(finite(log_of(k)), log_scale.scale);
            Half *p_row = s.p + row * s.depth + k, *log_row = s.log + row * s.depth + k;
            p_row[0] = p_row[padded] = p.great, p_row[2 * padded] = p.small;
            log_row[0] = log_row[2 * padded] = log.great, log_row[padded] = log.small;
        }
        atomicMax(&s.greatest[0], __float_as_uint(greatest_p));
        atomicMax(&s.greatest[1], __float_as_uint(greatest_log));
        if (lane == 0) s.rows[row] = {p_scale.factor, log_scale.factor, static_cast<float>(entropy), zeros};
    }
}

/// One thread per element of a column.
__global__ void __launch_bounds__(kThreads) split_columns(Products s) {
    const Batch<float>& a = s.a.batch;
    const float p_scale = half_scale(__uint_as_float(s.greatest[0])).scale;
    const float log_scale = half_scale(__uint_as_float(s.greatest[1])).scale;
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x; e < (a.k + 1) * s.across; e += stride) {
        const int64_t k = e / s.across, row = e % s.across, at = k * 2 * s.across + row;
        HalfPair p{0, 0}, log{0, 0};
        if (row < a.b && k < a.k) {
            const float log_p = a.log_p[row * a.k + k];
            p = split(exp(log_p), p_scale);
            log = split(log_p > -INFINITY ? log_p : 0, log_scale);
        } else if (row < a.b) {
            p.great = log.great = to_half(1);
        }
        s.p_columns[at] = p.great, s.p_columns[at + s.across] = p.small;
        s.log_columns[at] = log.great, s.log_columns[at + s.across] = log.small;
    }
}

/// Whether row `second` lacks a part that row `first` has: KL of first from second is infinite.
__device__ bool lacks(const Batch<float>& a, int64_t first, int64_t second) {
    for (int64_t k = 0; k < a.k; ++k)
        if (!(a.log_p[second * a.k + k] > -INFINITY) && exp(a.log_p[first * a.k + k]) > 0) return true;
    return false;
}

__device__ __forceinline__ Side load_side(const Products& s, int64_t row, bool first) {
    if (row >= s.a.batch.b) return {0, 0, -1, false};
    const RowSplit split = s.rows[row];
    const auto group = static_cast<int32_t>(s.groups.leader[row]);
    return first ? Side{split.p_factor, split.entropy, group, false} : Side{split.log_factor, 0, group, split.zeros != 0};
}

struct MaskShared {
    HalfTile::Shared tile;
    Side rows[kTile], columns[kTile];
};

/// Fills in the sides of a tile; the whole block calls.
__device__ void load_sides(const Products& s, bool forth, int64_t row0, int64_t j0, MaskShared& shared) {
    for (int side = threadIdx.x; side < 2 * kTile; side += kThreads) {
        const int64_t row = row0 + side, column = j0 + side - kTile;
        if (side < kTile)
            shared.rows[side] = load_side(s, row < s.count ? s.first + row : s.a.batch.b, forth);
        else
            shared.columns[side - kTile] = load_side(s, column, !forth);
    }
    __syncthreads();
}

/// Takes the products of a tile, KL_ij (forth) or KL_ji, with first row `row0` of the panel and first column `j0` to their
/// hinges, writes which are positive, and returns their sum.
__device__ __forceinline__ float take_tile(const Products& s, bool forth, int64_t row0, int64_t j0, const MaskShared& shared,
                                           const HalfTile::Sums& sum) {
    constexpr uint32_t kOne = 0x3C00;  // 1 as a half
    const auto hinge = [&](const Side& own, const Side& other, float product, int64_t row, int64_t column) {
        if (own.group < 0 || other.group < 0 || own.group == other.group) return 0.0f;
        const float left = s.a.batch.margin - (own.entropy + other.entropy - product * own.factor * other.factor);
        if (!(left > 0)) return 0.0f;
        if ((own.zeros || other.zeros) && lacks(s.a.batch, forth ? row : column, forth ? column : row)) return 0.0f;
        return left;
    };
    float all = 0;
#pragma unroll
    for (int i = 0; i < HalfTile::kDown; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t row = row0 + HalfTile::row_of(i, 2 * half);
            const Side own = shared.rows[HalfTile::row_of(i, 2 * half)];
            Half* masks = s.masks + ((forth ? 0 : s.count) + row) * s.across;
#pragma unroll
            for (int j = 0; j < HalfTile::kAcross; ++j) {
                const int at = HalfTile::col_of(j, 0);
                const int64_t column = j0 + at;
                const float left = hinge(own, shared.columns[at], sum[i][j][2 * half], s.first + row, column);
                const float right = hinge(own, shared.columns[at + 1], sum[i][j][2 * half + 1], s.first + row, column + 1);
                all += left + right;
                if (s.masks == nullptr || row >= s.count || column >= s.across) continue;
                *reinterpret_cast<uint32_t*>(masks + column) = (left > 0 ? kOne : 0) | (right > 0 ? kOne << 16 : 0);
            }
        }
    return all;
}

/// One block per 128 rows i of the panel, 128 rows j and direction: KL_ij, and with the gradient KL_ji.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) mask_tiles(Products s) {
    auto& shared = *shared_memory<MaskShared>();
    const int64_t b = s.a.batch.b, down = ceil_div(s.count, kTile), right = ceil_div(b, kTile);
    const int64_t tiles = down * right * (s.masks != nullptr ? 2 : 1);
    double loss = 0;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const bool forth = tile < down * right;
        const int64_t i0 = tile / right % down * kTile, j0 = tile % right * kTile, start = s.first + i0;
        HalfTile::Sums sum;
        HalfTile::clear(sum);
        HalfTile::add(s.rows_of(forth ? s.p : s.log, start), s.rows_of(forth ? s.log : s.p, j0), s.depth, shared.tile, sum);
        load_sides(s, forth, i0, j0, shared);
        const float of_tile = take_tile(s, forth, i0, j0, shared, sum);
        if (forth) loss += double(of_tile);
    }
    __syncthreads();
    loss = block_sum(loss, reinterpret_cast<double*>(&shared));
    if (threadIdx.x == 0) s.partials[blockIdx.x] += loss;
}

/// One block per product (with log p, with p), 128 rows i, 128 columns and split of the rows j.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) pull_tiles(Products s) {
    auto& shared = *shared_memory<HalfTile::Shared>();
    const int64_t width = s.a.batch.k + 1, down = ceil_div(s.count, kTile), right = ceil_div(width, kTile);
    for (int64_t tile = blockIdx.x; tile < 2 * down * right * s.splits; tile += gridDim.x) {
        const int64_t k0 = tile % right * kTile, i0 = tile / right % down * kTile, piece = tile / right / down;
        const int64_t begin = piece / 2 * s.per_split, left = s.across - begin;
        const Half* columns = (piece % 2 == 0 ? s.log_columns : s.p_columns) + k0 * 2 * s.across + begin;
        const HalfTile::Rows mask{s.masks + (piece % 2 * s.count + i0) * s.across + begin, s.count - i0, s.across};
        HalfTile::Sums sum;
        HalfTile::clear(sum);
        for (int small = 0; small < 2; ++small)
            HalfTile::add(mask, {columns + small * s.across, width - k0, 2 * s.across}, left < s.per_split ? left : s.per_split,
                          shared, sum);
        float* pulled = s.pulled + piece * s.count * width;
#pragma unroll
        for (int i = 0; i < HalfTile::kDown; ++i)
#pragma unroll
            for (int j = 0; j < HalfTile::kAcross; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int64_t row = i0 + HalfTile::row_of(i, e), k = k0 + HalfTile::col_of(j, e);
                    if (row < s.count && k < width) pulled[row * width + k] = sum[i][j][e];
                }
    }
}

/// The gradient of the panel's rows, one thread per element: pairs of different labels from the products, those of equal labels
/// from their means, n [p (log p - l') + p - p'].
__global__ void __launch_bounds__(kThreads) gather_gradient(Products s) {
    const Batch<float>& a = s.a.batch;
    const Pairs pairs = count_pairs(s.groups);
    const double p_factor = half_scale(__uint_as_float(s.greatest[0])).factor;
    const double log_factor = half_scale(__uint_as_float(s.greatest[1])).factor;
    const int64_t stride = int64_t(gridDim.x) * kThreads, width = a.k + 1;
    for (int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x; e < s.count * a.k; e += stride) {
        const int64_t i = e / a.k, k = e % a.k, row = s.first + i, leader = s.groups.leader[row];
        double weight = 0, logs = 0, mass = 0;
        for (int64_t split = 0; split < s.splits; ++split) {
            const float* pulled = s.pulled + (split * 2 * s.count + i) * width;
            weight += double(pulled[a.k]);
            logs += double(pulled[k]);
            mass += double(pulled[s.count * width + k]);
        }
        const double log_p = a.log_p[row * a.k + k], p = exp(a.log_p[row * a.k + k]);
        const bool counts = p > 0 && !s.a.detach_target;
        double gradient = 0;
        if (pairs.dissimilar > 0) {
            const double own = counts ? p * ((log_p + 1) * weight - logs * log_factor) : 0;
            gradient -= (own - mass * p_factor) / pairs.dissimilar;
        }
        if (pairs.similar > 0 && leader >= 0) {
            const double n = double(s.groups.size[row]), mean_p = s.groups.mean_p[leader * a.k + k];
            const double own = counts ? p * (n * (log_p - s.groups.mean_log[leader * a.k + k]) + n - 1) : 0;
            gradient += (own - (n * mean_p - p)) / pairs.similar;
        }
        s.a.grad_log_p[row * a.k + k] = static_cast<float>(gradient);
    }
}

__global__ void __launch_bounds__(kThreads) average_products(Products s) {
    double* slots = shared_memory<double>();
    const Pairs pairs = count_pairs(s.groups);
    double similar = 0, dissimilar = 0;
    for (int64_t row = threadIdx.x; row < s.a.batch.b; row += kThreads) similar += s.groups.spread[row];
    for (int block = threadIdx.x; block < kLossBlocks; block += kThreads) dissimilar += s.partials[block];
    similar = block_sum(similar, slots);
    dissimilar = block_sum(dissimilar, slots);
    if (threadIdx.x != 0) return;
    const double loss =
        (pairs.similar > 0 ? similar / pairs.similar : 0) + (pairs.dissimilar > 0 ? dissimilar / pairs.dissimilar : 0);
    *s.a.loss = static_cast<float>(loss);
}

Products allocate(const Loss<float>& a, int64_t panel, const Context& context) {
    Products s{};
    s.a = a;
    s.groups = find_groups(a.batch, context);
    s.depth = 3 * padded_depth(a.batch.k);
    s.across = padded_depth(a.batch.b);
    s.p = context.scratch<Half>(a.batch.b * s.depth);
    s.log = context.scratch<Half>(a.batch.b * s.depth);
    s.rows = context.scratch<RowSplit>(a.batch.b);
    s.greatest = context.scratch<unsigned>(2);
    s.partials = context.scratch<double>(kLossBlocks);
    if (a.grad_log_p == nullptr) return s;
    const int64_t width = a.batch.k + 1, tiles = 2 * ceil_div(panel, kTile) * ceil_div(width, kTile);
    const int64_t splits = std::clamp<int64_t>(kGradientTiles / tiles, 1, ceil_div(s.across, HalfTile::kDepth));
    s.per_split = ceil_div(ceil_div(s.across, splits), HalfTile::kDepth) * HalfTile::kDepth;
    s.splits = ceil_div(s.across, s.per_split);
    s.p_columns = context.scratch<Half>(width * 2 * s.across);
    s.log_columns = context.scratch<Half>(width * 2 * s.across);
    s.masks = context.scratch<Half>(2 * panel * s.across);
    s.pulled = context.scratch<float>(s.splits * 2 * panel * width);
    return s;
}

}  // namespace

void loss_by_products(const Loss<float>& a, int64_t panel, const Context& context) {
    const int64_t b = a.batch.b, k = a.batch.k;
    const auto stream = static_cast<cudaStream_t>(context.stream);
    const dim3 block(kThreads);
    const bool gradient = a.grad_log_p != nullptr;
    Products s = allocate(a, std::min(panel, b), context);
    check(cudaMemsetAsync(s.greatest, 0, 2 * sizeof *s.greatest, stream), "pairwise_kl");
    check(cudaMemsetAsync(s.partials, 0, kLossBlocks * sizeof *s.partials, stream), "pairwise_kl");
    launch("split_rows", split_rows, grid_of(ceil_div(b, kWarps)), block, 0, stream, s);
    if (gradient) launch("split_columns", split_columns, grid_of(ceil_div((k + 1) * s.across, kThreads)), block, 0, stream, s);
    for (s.first = 0; s.first < b; s.first += panel) {
        s.count = std::min(panel, b - s.first);
        const int64_t down = ceil_div(s.count, kTile), tiles = down * ceil_div(b, kTile) * (gradient ? 2 : 1);
        launch("mask_tiles", mask_tiles, grid_of(std::min<int64_t>(tiles, kLossBlocks)), block, sizeof(MaskShared), stream, s);
        if (!gradient) continue;
        launch("pull_tiles", pull_tiles, grid_of(2 * down * ceil_div(k + 1, kTile) * s.splits), block, sizeof(HalfTile::Shared),
               stream, s);
        launch("gather_gradient", gather_gradient, grid_of(ceil_div(s.count * k, kThreads)), block, 0, stream, s);
    }
    launch("average_products", average_products, dim3(1), block, kWarps * sizeof(double), stream, s);
}

}  // namespace fastclust::pairwise_kl::cuda

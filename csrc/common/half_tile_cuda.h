// A tile of products of rows in half precision on the tensor cores, and what it takes to bound its error: the filter before an
// exact decision. Rows are moved by a common shift, scaled by a power of two of their own, and rounded to halves:
//     x - shift = factor * h + r,   |r| <= error,   |factor * h| <= norm.
// So |(x - shift).(y - shift) - f_x f_y h_x.h_y| <= error_x (norm_y + error_y) + norm_x error_y, and the sum of halves in float
// adds at most depth * 2^-22 * norm_x norm_y.
#pragma once

#include <cmath>

#include "common/mma.h"

namespace fastclust::cuda {

constexpr int64_t kHalfStep = 16;  // rows of halves are padded with zeros to a multiple of this

__host__ __device__ constexpr int64_t padded_depth(int64_t d) {
    return ceil_div(d, kHalfStep) * kHalfStep;
}

struct RowInfo {
    float factor, norm, error;
};

/// A power of two that brings values of at most `greatest` into the range of halves, and its inverse.
struct HalfScale {
    float scale, factor;
};

__device__ inline HalfScale half_scale(float greatest) {
    int exponent = 0;
    if (greatest > 0 && greatest < INFINITY) frexpf(greatest, &exponent);
    exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
    return {ldexpf(1.0f, 14 - exponent), ldexpf(1.0f, exponent - 14)};
}

/// One warp rounds one row. shift (D) may be null.
template <class S, class Shift>
__device__ inline RowInfo round_row(const S* x, const Shift* shift, int64_t d, Half* out) {
    const int64_t lane = threadIdx.x % kWarp;
    const auto moved = [&](int64_t t) { return shift == nullptr ? float(x[t]) : x[t] - shift[t]; };
    float greatest = 0;
    for (int64_t t = lane; t < d; t += kWarp) greatest = fmaxf(greatest, fabsf(moved(t)));
    greatest = warp_max(greatest);
    const auto [scale, factor] = half_scale(greatest);
    double norm = 0, error = 0;
    for (int64_t t = lane; t < padded_depth(d); t += kWarp) {
        const Half half = t < d ? to_half(moved(t) * scale) : Half{0};
        out[t] = half;
        if (t >= d) continue;
        const double kept = double(from_half(half)) * double(factor), lost = double(moved(t)) - kept;
        norm += kept * kept;
        error += lost * lost;
    }
    norm = sqrt(warp_sum(norm));
    // The subtraction of the shift rounds too, by at most 2^-24 of its result; the rest is for these sums themselves.
    error = sqrt(warp_sum(error)) * 1.000001 + norm * ldexp(1.0, -23);
    return {factor, static_cast<float>(norm * 1.000001), static_cast<float>(error)};
}

/// 128 x 128 products of rows of halves. 8 warps, each 32 x 64 of them: 2 x 8 accumulators of the tensor cores per warp.
struct HalfTile {
    static constexpr int kRows = 128, kCols = 128, kDepth = 64, kThreads = 256;
    static constexpr int kDown = 2, kAcross = 8, kStages = 2;
    static constexpr int kChunkHalves = 8;  // 16 bytes

    struct Stage {
        alignas(128) Half a[kRows * kDepth];
        alignas(128) Half b[kCols * kDepth];
    };
    struct Shared {
        Stage stage[kStages];
    };

    /// sum[i][j][e] belongs to row row_of(i, e) and column col_of(j, e) of the tile.
    __device__ static int row_of(int i, int e) {
        const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
        return warp / 2 * 32 + i * 16 + lane / 4 + e / 2 * 8;
    }
    __device__ static int col_of(int j, int e) {
        const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
        return warp % 2 * 64 + j * 8 + lane % 4 * 2 + e % 2;
    }

    /// Rows of halves from a tile's first one on.
    struct Rows {
        const Half* data;
        int64_t count, stride;
    };

    using Sums = float[kDown][kAcross][4];

    __device__ static void clear(Sums& sum) {
        for (auto& row : sum)
            for (auto& tile : row)
                for (float& element : tile) element = 0;
    }

    /// Whether all of b stays in shared memory from one `add` to the next, so that `keep_b` may be true in later ones.
    __device__ static bool holds(int64_t rows_b, int64_t depth) { return rows_b <= kCols && depth <= kStages * kDepth; }

    /// sum += a b^T over the first `depth` elements of the rows, a padded_depth. The whole block calls.
    __device__ static void add(const Rows& a, const Rows& b, int64_t depth, Shared& shared, Sums& sum, bool keep_b = false) {
        const int steps = static_cast<int>(ceil_div(depth, kDepth));
        __syncthreads();
        fetch(a, b, depth, 0, shared.stage[0], keep_b);
        commit_copies();
        for (int step = 0; step < steps; ++step) {
            if (step + 1 < steps) fetch(a, b, depth, (step + 1) * kDepth, shared.stage[(step + 1) % kStages], keep_b);
            commit_copies();
            wait_copies<1>();
            __syncthreads();
            const int64_t left = depth - int64_t(step) * kDepth;
            multiply(shared.stage[step % kStages], left < kDepth ? static_cast<int>(left) : kDepth, sum);
            __syncthreads();
        }
        wait_copies<0>();
    }

   private:
    /// Where chunk `chunk` of a row lies: swizzled, so that eight rows' equal chunks fall into different banks.
    __device__ static int place(int row, int chunk) { return row * kDepth + (chunk ^ row % 8) * kChunkHalves; }

    __device__ static void fetch(const Rows& a, const Rows& b, int64_t depth, int64_t start, Stage& stage, bool keep_b) {
        copy_rows(a, depth, start, stage.a);
        if (!keep_b) copy_rows(b, depth, start, stage.b);
    }

    /// Depths [start, start + kDepth) of 128 rows, zeros for those that are not there.
    __device__ static void copy_rows(const Rows& rows, int64_t depth, int64_t start, Half* stage) {
        constexpr int kChunks = kDepth / kChunkHalves, kStep = kThreads / kChunks;
        static_assert(kRows == kCols && kStep % 8 == 0);
        const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
        const int64_t t = start + chunk * kChunkHalves, last = t < depth ? rows.count : 0;
        const Half* source = rows.data + first * rows.stride + t;
        Half* target = stage + place(first, chunk);
        for (int row = first; row < kRows; row += kStep, source += kStep * rows.stride, target += kStep * kDepth)
            copy_async(target, row < last ? source : rows.data, row < last ? 16 : 0);
    }

    __device__ static void multiply(const Stage& stage, int depth, Sums& sum) {
        const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
        for (int t = 0; t < depth; t += kHalfStep) {
            uint32_t rows[kDown][4];
#pragma unroll
            for (int i = 0; i < kDown; ++i)
                load_matrices(stage.a + place(warp / 2 * 32 + i * 16 + lane % 16, t / kChunkHalves + lane / 16), rows[i]);
#pragma unroll
            for (int j = 0; j < kAcross; j += 2) {
                uint32_t cols[4];
                load_matrices(
                    stage.b + place(warp % 2 * 64 + j * 8 + lane / 16 * 8 + lane % 8, t / kChunkHalves + lane / 8 % 2), cols);
#pragma unroll
                for (int i = 0; i < kDown; ++i) {
                    multiply_add(sum[i][j], rows[i], cols[0], cols[1]);
                    multiply_add(sum[i][j + 1], rows[i], cols[2], cols[3]);
                }
            }
        }
    }
};

}  // namespace fastclust::cuda

// Products of a block of rows with packed columns, the core of assignment and neighbour search: out[r][c] = sum_j x[r][j]
// y[c][j].
//
// `columns` (centroids, database rows) are packed once into panels of kWidth columns, depth-major inside a panel:
//     panel p:  y[p*kWidth][0] .. y[p*kWidth + kWidth-1][0],  y[..][1] ..,  ...      zeros beyond the last column
// A block of rows is copied into chunks of kChunk features, so that the kernel's row addresses are compile-time offsets:
//     chunk q:  x[0][q*kChunk ..], x[1][q*kChunk ..], ...                            kChunk apart, the tail uninitialised
// multiply() writes a block's products with some panels into a buffer small enough for the first-level cache, from which the
// caller's epilogue reads. Each product is one chain of multiply-adds in ascending j, so equal columns give equal products.
#pragma once

#include <cstdint>

namespace fastclust::products::FASTCLUST_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 12;  // 12 x 2 accumulators of the 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;  // 6 x 2 of 16
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4;  // 4 x 2 of 16
#endif
constexpr int kChunkBytes = 512;
constexpr int64_t kAlignment = 64;

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(kVectorBytes), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);
template <class T>
constexpr int kWidth = 2 * kLanes<T>;  // columns of a panel
template <class T>
constexpr int kChunk = kChunkBytes / sizeof(T);

template <class T>
inline int64_t panel_count(int64_t columns) {
    return (columns + kWidth<T> - 1) / kWidth<T>;
}

/// Elements of pack_columns' output.
template <class T>
inline int64_t packed_columns_size(int64_t columns, int64_t depth) {
    return panel_count<T>(columns) * kWidth<T> * depth;
}

/// Elements of pack_rows' output for blocks of `rows`.
template <class T>
inline int64_t packed_rows_size(int64_t rows, int64_t depth) {
    return (depth + kChunk<T> - 1) / kChunk<T> * kChunk<T> * rows;
}

/// Panels [first, last) of y (columns, depth) with rows `stride` apart, less `shift` (depth) unless that is null; `packed` is
/// the whole, 64-byte aligned.
template <class T>
inline void pack_columns(const T* y, int64_t columns, int64_t depth, int64_t stride, int64_t first, int64_t last, T* packed,
                         const T* shift = nullptr) {
    for (int64_t panel = first; panel < last; ++panel) {
        T* out = packed + panel * kWidth<T> * depth;
        for (int lane = 0; lane < kWidth<T>; ++lane, ++out) {
            const int64_t column = panel * kWidth<T> + lane;
            const T* row = y + column * stride;
            if (column >= columns)
                for (int64_t j = 0; j < depth; ++j) out[j * kWidth<T>] = 0;
            else if (shift == nullptr)
                for (int64_t j = 0; j < depth; ++j) out[j * kWidth<T>] = row[j];
            else
                for (int64_t j = 0; j < depth; ++j) out[j * kWidth<T>] = row[j] - shift[j];
        }
    }
}

/// A block of `rows` rows of x, `stride` apart; less `shift` (depth) unless that is null.
template <class T>
inline void pack_rows(const T* x, int64_t rows, int64_t depth, int64_t stride, const T* shift, T* packed) {
    for (int64_t begin = 0; begin < depth; begin += kChunk<T>) {
        const int64_t width = depth - begin < kChunk<T> ? depth - begin : kChunk<T>;
        for (int64_t row = 0; row < rows; ++row, packed += kChunk<T>) {
            const T* from = x + row * stride + begin;
            if (shift == nullptr)
                for (int64_t j = 0; j < width; ++j) packed[j] = from[j];
            else
                for (int64_t j = 0; j < width; ++j) packed[j] = from[j] - shift[begin + j];
        }
    }
}

/// One tile: Rows rows of a block of `block_rows` with one panel.
template <class T, int Rows>
inline void multiply_tile(const T* x, int64_t block_rows, int64_t depth, const T* panel, T* out, int64_t ld) {
    using V = Vector<T>;
    V sums[Rows][2] = {};
    for (int64_t begin = 0; begin < depth; begin += kChunk<T>, x += block_rows * kChunk<T>) {
        const int64_t width = depth - begin < kChunk<T> ? depth - begin : kChunk<T>;
        for (int64_t j = 0; j < width; ++j, panel += kWidth<T>) {
            const V left = *reinterpret_cast<const V*>(panel);
            const V right = *reinterpret_cast<const V*>(panel + kLanes<T>);
#pragma GCC unroll 16
            for (int r = 0; r < Rows; ++r) {
                const T value = x[r * kChunk<T> + j];
                sums[r][0] += value * left;
                sums[r][1] += value * right;
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
        *reinterpret_cast<V*>(out + r * ld) = sums[r][0];
        *reinterpret_cast<V*>(out + r * ld + kLanes<T>) = sums[r][1];
    }
}

/// Rows [0, rows) of a block packed with `block_rows` rows, times `panels` panels from `panel` on:
/// out[row * ld + p * kWidth + lane]. `out` is 64-byte aligned and `ld` a multiple of kWidth.
template <class T>
inline void multiply(const T* x, int64_t rows, int64_t block_rows, int64_t depth, const T* panel, int64_t panels, T* out,
                     int64_t ld) {
    for (int64_t p = 0; p < panels; ++p, panel += kWidth<T> * depth, out += kWidth<T>) {
        int64_t row = 0;
        for (; row + kTileRows <= rows; row += kTileRows)
            multiply_tile<T, kTileRows>(x + row * kChunk<T>, block_rows, depth, panel, out + row * ld, ld);
        for (; row + 2 <= rows; row += 2)
            multiply_tile<T, 2>(x + row * kChunk<T>, block_rows, depth, panel, out + row * ld, ld);
        if (row < rows) multiply_tile<T, 1>(x + row * kChunk<T>, block_rows, depth, panel, out + row * ld, ld);
    }
}

}  // namespace fastclust::products::FASTCLUST_CAPABILITY

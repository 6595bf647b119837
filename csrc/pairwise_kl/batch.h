// The batch as the pairwise loops on the CPU want it: rows sorted by label, probabilities beside log-probabilities, padded to
// whole vectors and blocks. Included by pairwise_kl_cpu.cpp alone.
#pragma once

#include <algorithm>

#include "common/parallel.h"
#include "pairwise_kl/codes.h"
#include "pairwise_kl/pairwise_kl.h"
#include "pairwise_kl/vectors.h"

namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY {
namespace {

constexpr int kBlock = 64;  // rows of a tile, and its columns

/// Stands for log 0: the product with any probability that counts passes every margin, and with 0 is 0.
template <class T>
constexpr T kLogZero = T(-1e35);

struct Entry {
    int64_t label, row;
    bool operator<(const Entry& other) const { return label != other.label ? label < other.label : row < other.row; }
};

template <class T>
struct Sorted {
    T margin;
    int64_t b;                 // rows in some pair
    int64_t blocks;            // of kBlock rows
    int64_t k, width;          // K, and K rounded up to whole vectors
    int64_t padded;            // blocks * kBlock
    Entry* entry;              // (B) label and row, ascending
    T* p;                      // (padded, width) zeros beyond B and K
    T* log_p;                  // (padded, width) zeros beyond B and K
    T* transposed;             // (blocks, K, kBlock) log_p: a block of it lies together, not a page apart from column to column
    T *block_p, *block_log_p;  // (blocks, width) sums of a block's rows
    T* entropy;                // (padded) sum_k p log p; beyond B so large that no pair counts
    T* limit;                  // (padded) the margin; beyond B so small that no pair counts
    bool* has_zero;            // (blocks) whether some probability in it is 0
    typename Simd<T>::Integer* group;  // (padded) equal where labels are equal, ascending
    int64_t groups;
    int64_t* first;  // (groups + 1) first row of each group
    Codes codes;     // if kHasCodes
};

/// Where entry 0 of row i is in `transposed`; the others follow every kBlock.
template <class T>
T* transposed_row(const Sorted<T>& s, int64_t i) {
    return s.transposed + i / kBlock * s.k * kBlock + i % kBlock;
}

/// What it does not fill of the padded rows is filled with zeros.
template <class T>
void fill_row(const Batch<T>& batch, const Sorted<T>& s, int64_t i) {
    using Vector = typename Simd<T>::Vector;
    const T* from = batch.log_p + s.entry[i].row * s.k;
    T *p = s.p + i * s.width, *log_p = s.log_p + i * s.width, *transposed = transposed_row(s, i);
    for (int64_t c = 0; c < s.k; ++c) log_p[c] = from[c] > kLogZero<T> ? from[c] : kLogZero<T>;
    for (int64_t c = 0; c < s.k; ++c) transposed[c * kBlock] = log_p[c];
    for (int64_t c = s.k; c < s.width; ++c) log_p[c] = 0;
    exponentials(log_p, s.width, p);
    for (int64_t c = s.k; c < s.width; ++c) p[c] = 0;
    auto *block_p = reinterpret_cast<Vector*>(s.block_p + i / kBlock * s.width),
         *block_log_p = reinterpret_cast<Vector*>(s.block_log_p + i / kBlock * s.width);
    Vector products = {};
    typename Simd<T>::Integers zeros = {};
    for (int64_t v = 0; v < s.width / Simd<T>::kLanes; ++v) {
        const Vector some_p = reinterpret_cast<const Vector*>(p)[v], some_log_p = reinterpret_cast<const Vector*>(log_p)[v];
        products += some_p * some_log_p;
        zeros |= some_log_p == kLogZero<T>;
        block_p[v] += some_p;
        block_log_p[v] += some_log_p;
    }
    s.entropy[i] = lanes::sum(products);
    s.limit[i] = batch.margin;
    for (int lane = 0; lane < Simd<T>::kLanes; ++lane) s.has_zero[i / kBlock] |= zeros[lane] != 0;
}

template <class T>
void fill_padding(const Sorted<T>& s, int64_t i) {
    for (int64_t c = 0; c < s.width; ++c) s.p[i * s.width + c] = s.log_p[i * s.width + c] = 0;
    for (int64_t c = 0; c < s.k; ++c) transposed_row(s, i)[c * kBlock] = 0;
    s.entropy[i] = -kLogZero<T>;
    s.limit[i] = kLogZero<T>;
    s.group[i] = static_cast<typename Simd<T>::Integer>(s.groups);
}

template <class T>
void fill_block(const Batch<T>& batch, const Sorted<T>& s, int64_t block) {
    const int64_t begin = block * kBlock, end = begin + kBlock;
    s.has_zero[block] = false;
    for (int64_t c = 0; c < s.width; ++c) s.block_p[block * s.width + c] = s.block_log_p[block * s.width + c] = 0;
    for (int64_t i = begin; i < end; ++i) i < s.b ? fill_row(batch, s, i) : fill_padding(s, i);
    if constexpr (kHasCodes<T>) {
        if (s.codes.steps == 0) return;
        float* work = s.codes.work + begin / kBlock * s.width;
        for (int64_t c = s.k; c < s.width; ++c) work[c] = 0;
        for (int64_t i = begin; i < end; ++i) s.codes.fill(i, s.p + i * s.width, s.log_p + i * s.width, s.k, work);
    }
}

template <class T>
Sorted<T> sort_by_label(const Batch<T>& batch, const Context& context) {
    Sorted<T> s{};
    s.margin = batch.margin;
    s.entry = context.scratch<Entry>(batch.b);
    for (int64_t row = 0; row < batch.b; ++row)
        if (batch.labels[row] >= 0) s.entry[s.b++] = {batch.labels[row], row};
    std::sort(s.entry, s.entry + s.b);
    s.blocks = (s.b + kBlock - 1) / kBlock;
    s.padded = s.blocks * kBlock;
    s.k = batch.k;
    s.width = (s.k + Simd<T>::kLanes - 1) / Simd<T>::kLanes * Simd<T>::kLanes;
    s.p = context.scratch<T>(s.padded * s.width);
    s.log_p = context.scratch<T>(s.padded * s.width);
    s.transposed = context.scratch<T>(s.padded * s.k);
    s.entropy = context.scratch<T>(s.padded);
    s.limit = context.scratch<T>(s.padded);
    s.block_p = context.scratch<T>(s.blocks * s.width);
    s.block_log_p = context.scratch<T>(s.blocks * s.width);
    s.has_zero = context.scratch<bool>(s.blocks);
    s.group = context.scratch<typename Simd<T>::Integer>(s.padded);
    s.first = context.scratch<int64_t>(s.b + 1);
    for (int64_t i = 0; i < s.b; ++i) {
        if (i == 0 || s.entry[i].label != s.entry[i - 1].label) s.first[s.groups++] = i;
        s.group[i] = static_cast<typename Simd<T>::Integer>(s.groups - 1);
    }
    s.first[s.groups] = s.b;
    if (kHasCodes<T> && s.k >= Codes::kLeastColumns && s.k <= quantised::kMaxDepth)
        s.codes.allocate(s.padded, s.k, s.width, context);
    parallel_for(0, s.blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) fill_block(batch, s, block);
    });
    return s;
}

}  // namespace
}  // namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY

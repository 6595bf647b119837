#include "pairwise_kl/tile.h"

namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY {
namespace {

template <class T>
Findings inspect(const Batch<T>& batch, const Context&) {
    Findings found;
    for (int64_t row = 0; row < batch.b; ++row) {
        bool bad = false;
        for (int64_t c = 0; c < batch.k; ++c) bad |= !(batch.log_p[row * batch.k + c] < T(INFINITY));
        if (bad && found.log_p.count++ == 0) found.log_p.first = row;
        if (batch.labels[row] < -1 && found.labels.count++ == 0) found.labels.first = row;
    }
    return found;
}

/// Of one group of equal labels: means over its rows of p and log p in some columns, and what the pairs come to.
struct GroupColumns {
    static constexpr int kColumns = 16;
    double p[kColumns] = {}, log_p[kColumns] = {};
    bool some_zero[kColumns] = {}, some_positive[kColumns] = {};

    template <class T>
    GroupColumns(const Sorted<T>& s, int64_t group, int64_t column, int columns) {
        const int64_t begin = s.first[group], end = s.first[group + 1];
        for (int64_t i = begin; i < end; ++i) {
            for (int c = 0; c < columns; ++c) {
                const int64_t at = i * s.width + column + c;
                p[c] += static_cast<double>(s.p[at]);
                log_p[c] += static_cast<double>(s.log_p[at]);
                some_zero[c] |= s.log_p[at] == kLogZero<T>;
                some_positive[c] |= s.p[at] > 0;
            }
        }
        for (int c = 0; c < columns; ++c) {
            p[c] /= static_cast<double>(end - begin);
            log_p[c] /= static_cast<double>(end - begin);
        }
    }

    /// sum over i < j of KL_ij + KL_ji, the columns' share.
    template <class T>
    double pairs(const Sorted<T>& s, int64_t group, int64_t column, int columns) const {
        const int64_t begin = s.first[group], end = s.first[group + 1];
        double sum = 0;
        for (int64_t i = begin; i < end; ++i) {
            for (int c = 0; c < columns; ++c) {
                const int64_t at = i * s.width + column + c;
                sum += (static_cast<double>(s.p[at]) - p[c]) * (static_cast<double>(s.log_p[at]) - log_p[c]);
            }
        }
        for (int c = 0; c < columns; ++c)
            if (some_zero[c] && some_positive[c]) return INFINITY;
        return sum * static_cast<double>(end - begin);
    }
};

/// Calls body(chunk, column, columns) for each chunk of GroupColumns::kColumns columns.
template <class T, class Body>
void for_column_chunks(const Sorted<T>& s, const Body& body) {
    constexpr int64_t kColumns = GroupColumns::kColumns;
    parallel_for(0, (s.k + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            const int64_t column = chunk * kColumns;
            body(chunk, column, static_cast<int>(s.k - column < kColumns ? s.k - column : kColumns));
        }
    });
}

template <class T>
double similar_pairs(const Sorted<T>& s, const Context& context) {
    const int64_t chunks = (s.k + GroupColumns::kColumns - 1) / GroupColumns::kColumns;
    auto* partial = context.scratch<double>(chunks);
    for_column_chunks(s, [&](int64_t chunk, int64_t column, int columns) {
        partial[chunk] = 0;
        for (int64_t group = 0; group < s.groups; ++group)
            partial[chunk] += GroupColumns(s, group, column, columns).pairs(s, group, column, columns);
    });
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk];
    return sum;
}

template <class T>
double dissimilar_pairs(const Sorted<T>& s, const Context& context) {
    auto* partial = context.scratch<double>(s.blocks);
    parallel_for(0, s.blocks, 1, [&](int64_t begin, int64_t end) {
        alignas(64) T tile[kBlock * kBlock];
        int32_t counts[kBlock];
        for (int64_t i = begin; i < end; ++i) {
            partial[i] = 0;
            for (int64_t j = 0; j < s.blocks; ++j)
                if (!same_group(s, i, j)) partial[i] += hinge_tile(s, i, j, tile, counts);
        }
    });
    double sum = 0;
    for (int64_t i = 0; i < s.blocks; ++i) sum += partial[i];
    return sum;
}

template <class T>
void forward(const Forward<T>& a, const Context& context) {
    const Sorted<T> s = sort_by_label(a.batch, context);
    int64_t similar = 0;
    for (int64_t g = 0; g < s.groups; ++g) similar += (s.first[g + 1] - s.first[g]) * (s.first[g + 1] - s.first[g] - 1);
    const int64_t dissimilar = s.b * (s.b - 1) - similar;
    // Each unordered pair is two of the ordered ones, and each ordered pair's mean holds both directions.
    a.means[0] = similar > 0 ? static_cast<T>(2 * similar_pairs(s, context) / static_cast<double>(similar)) : T(0);
    a.means[1] = dissimilar > 0 ? static_cast<T>(2 * dissimilar_pairs(s, context) / static_cast<double>(dissimilar)) : T(0);
    a.counts[0] = similar;
    a.counts[1] = dissimilar;
}

/// What the tiles add up: with M_ij = [KL_ij < m and labels differ],
template <class T>
struct TileSums {
    T* count;         // (padded) sum_j M_ij
    T* log_p;         // (padded, width) sum_j M_ij log p_jk
    T* transposed_p;  // (padded, width) sum_j M_ji p_jk
};

/// Round r takes tile (i, i + r mod blocks) of every i: no two tiles of a round add to the same sum, and each sum gets its
/// terms in the order of the rounds.
template <class T>
TileSums<T> sum_tiles(const Sorted<T>& s, bool detach_target, const Context& context) {
    const TileSums<T> sums{context.scratch<T>(s.padded), context.scratch<T>(s.padded * s.width),
                           context.scratch<T>(s.padded * s.width)};
    for (int64_t i = 0; i < s.padded; ++i) sums.count[i] = 0;
    for (int64_t i = 0; i < s.padded * s.width; ++i) sums.log_p[i] = sums.transposed_p[i] = 0;
    for (int64_t round = 0; round < s.blocks; ++round) {
        parallel_for(0, s.blocks, 1, [&](int64_t begin, int64_t end) {
            alignas(64) T tile[kBlock * kBlock];
            int32_t counts[kBlock];
            for (int64_t i = begin; i < end; ++i) {
                const int64_t j = (i + round) % s.blocks, at_i = i * kBlock * s.width, at_j = j * kBlock * s.width;
                if (same_group(s, i, j)) continue;
                hinge_tile(s, i, j, tile, counts);
                for (int r = 0; r < kBlock; ++r) sums.count[i * kBlock + r] += static_cast<T>(counts[r]);
                add_tile_products(tile, counts, s.p + at_i, s.log_p + at_j, s.width,
                                  detach_target ? nullptr : sums.log_p + at_i, sums.transposed_p + at_j);
            }
        });
    }
    return sums;
}

/// Gradient of a row of the dissimilar mean, `weight` being d loss / d KL of a pair that counts.
template <class T>
void dissimilar_gradient(const Sorted<T>& s, const TileSums<T>& sums, T weight, bool detach_target, int64_t i, T* grad) {
    const int64_t at = i * s.width;
    for (int64_t c = 0; c < s.k; ++c) {
        const T p = s.p[at + c], own = p * ((s.log_p[at + c] + 1) * sums.count[i] - sums.log_p[at + c]);
        grad[c] = weight * ((detach_target ? T(0) : own) - sums.transposed_p[at + c]);
    }
}

/// Adds the gradient of the similar mean in some columns of a group's rows.
template <class T>
void add_similar_gradient(const Backward<T>& a, const Sorted<T>& s, double weight, int64_t group, int64_t column, int columns) {
    const GroupColumns mean(s, group, column, columns);
    const auto n = static_cast<double>(s.first[group + 1] - s.first[group]);
    for (int64_t i = s.first[group]; i < s.first[group + 1]; ++i) {
        T* grad = a.grad_log_p + s.entry[i].row * s.k + column;
        for (int c = 0; c < columns; ++c) {
            const int64_t at = i * s.width + column + c;
            const auto p = static_cast<double>(s.p[at]), log_p = static_cast<double>(s.log_p[at]);
            const double both = n * (p * (log_p - mean.log_p[c]) + p - mean.p[c]);
            grad[c] += static_cast<T>(weight * (a.detach_target ? p - n * mean.p[c] : both));
        }
    }
}

template <class T>
void backward(const Backward<T>& a, const Context& context) {
    const Sorted<T> s = sort_by_label(a.batch, context);
    for (int64_t i = 0; i < a.batch.b * a.batch.k; ++i) a.grad_log_p[i] = 0;
    if (a.counts[1] > 0) {
        const TileSums<T> sums = sum_tiles(s, a.detach_target, context);
        const T weight = -2 * a.grad_means[1] / static_cast<T>(a.counts[1]);
        parallel_for(0, s.b, 64, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                dissimilar_gradient(s, sums, weight, a.detach_target, i, a.grad_log_p + s.entry[i].row * s.k);
        });
    }
    if (a.counts[0] > 0) {
        const double weight = 2 * static_cast<double>(a.grad_means[0]) / static_cast<double>(a.counts[0]);
        for_column_chunks(s, [&](int64_t, int64_t column, int columns) {
            for (int64_t group = 0; group < s.groups; ++group) add_similar_gradient(a, s, weight, group, column, columns);
        });
    }
}

template <class T>
constexpr Kernels<T> kTable{inspect<T>, forward<T>, backward<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY

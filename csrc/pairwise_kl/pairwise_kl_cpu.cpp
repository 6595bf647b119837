#include "pairwise_kl/screen.h"

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

double added_up(const double* partial, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += partial[i];
    return sum;
}

/// Columns of one group of equal labels, as many as a vector has lanes: sum over i < j of KL_ij + KL_ji, the columns' share.
/// With grad, adds its gradient there, `weight` being d loss / d KL of a pair.
template <class T>
double similar_columns(const Sorted<T>& s, int64_t group, int64_t column, double weight, bool detach_target, T* grad) {
    constexpr int kColumns = Simd<T>::kLanes;
    const int64_t begin = s.first[group], end = s.first[group + 1];
    const int columns = static_cast<int>(s.k - column < kColumns ? s.k - column : kColumns);
    const auto n = static_cast<double>(end - begin);
    double mean_p[kColumns] = {}, mean_log_p[kColumns] = {}, sums[kColumns] = {};
    T least[kColumns] = {}, most[kColumns] = {};  // of log p, and of p
    for (int64_t i = begin; i < end; ++i) {
        const T *p = s.p + i * s.width + column, *log_p = s.log_p + i * s.width + column;
        for (int c = 0; c < kColumns; ++c) {
            mean_p[c] += static_cast<double>(p[c]);
            mean_log_p[c] += static_cast<double>(log_p[c]);
            least[c] = log_p[c] < least[c] ? log_p[c] : least[c];
            most[c] = p[c] > most[c] ? p[c] : most[c];
        }
    }
    for (int c = 0; c < kColumns; ++c) mean_p[c] /= n, mean_log_p[c] /= n;
    for (int64_t i = begin; i < end; ++i) {
        const T *p = s.p + i * s.width + column, *log_p = s.log_p + i * s.width + column;
        T pulled[kColumns];
        for (int c = 0; c < kColumns; ++c) {
            const double p_off = static_cast<double>(p[c]) - mean_p[c], log_off = static_cast<double>(log_p[c]) - mean_log_p[c];
            sums[c] += p_off * log_off;
            const double own = static_cast<double>(p[c]) * log_off + p_off;
            pulled[c] = static_cast<T>(weight * (detach_target ? static_cast<double>(p[c]) - n * mean_p[c] : n * own));
        }
        for (int c = 0; grad != nullptr && c < columns; ++c) grad[s.entry[i].row * s.k + column + c] += pulled[c];
    }
    double sum = 0;
    for (int c = 0; c < columns; ++c) {
        if (least[c] == kLogZero<T> && most[c] > 0) return INFINITY;
        sum += sums[c];
    }
    return sum * n;
}

/// The sum over all pairs of equal labels; with grad, adds its gradient.
template <class T>
double similar_pairs(const Sorted<T>& s, double weight, bool detach_target, T* grad, const Context& context) {
    const int64_t chunks = s.width / Simd<T>::kLanes;
    auto* partial = context.scratch<double>(chunks);
    parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            partial[chunk] = 0;
            for (int64_t group = 0; group < s.groups; ++group)
                partial[chunk] += similar_columns(s, group, chunk * Simd<T>::kLanes, weight, detach_target, grad);
        }
    });
    return added_up(partial, chunks);
}

template <class T>
double dissimilar_pairs(const Sorted<T>& s, const Context& context) {
    auto* partial = context.scratch<double>(s.blocks);
    parallel_for(0, s.blocks, 1, [&](int64_t begin, int64_t end) {
        Within within;
        for (int64_t i = begin; i < end; ++i) {
            partial[i] = 0;
            for (int64_t j = 0; j < s.blocks; ++j)
                if (!same_group(s, i, j)) partial[i] += hinge_tile(s, i, j, within);
        }
    });
    return added_up(partial, s.blocks);
}

/// What the tiles add up, with M_ij = [KL_ij < m and labels differ]. A row's sum is that of its own and its block's.
template <class T>
struct TileSums {
    double* loss;                  // (blocks) sum over the rows of a block of [m - KL_ij]+
    T* count;                      // (padded) sum_j M_ij
    T *log_p, *log_p_all;          // (padded, width), (blocks, width) sum_j M_ij log p_jk
    T *to_others, *to_others_all;  // (padded, width), (blocks, width) sum_j M_ji p_jk

    TileSums(const Sorted<T>& s, const Context& context)
        : loss(zeros<double>(s.blocks, context)),
          count(zeros<T>(s.padded, context)),
          log_p(zeros<T>(s.padded * s.width, context)),
          log_p_all(zeros<T>(s.blocks * s.width, context)),
          to_others(zeros<T>(s.padded * s.width, context)),
          to_others_all(zeros<T>(s.blocks * s.width, context)) {}

    template <class U>
    static U* zeros(int64_t count, const Context& context) {
        U* values = context.scratch<U>(count);
        for (int64_t i = 0; i < count; ++i) values[i] = 0;
        return values;
    }
};

/// Round r takes tile (i, i + r mod blocks) of every i: no two tiles of a round add to the same sum, and each sum gets its
/// terms in the order of the rounds.
template <class T>
TileSums<T> sum_tiles(const Sorted<T>& s, bool detach_target, const Context& context) {
    const TileSums<T> sums(s, context);
    const auto left = [&](int64_t block) {
        const int64_t at = block * kBlock * s.width;
        return Side<T>{s.p + at, s.block_p + block * s.width, detach_target ? nullptr : sums.log_p + at,
                       sums.log_p_all + block * s.width};
    };
    const auto right = [&](int64_t block) {
        const int64_t at = block * kBlock * s.width;
        return Side<T>{s.log_p + at, s.block_log_p + block * s.width, sums.to_others + at,
                       sums.to_others_all + block * s.width};
    };
    for (int64_t round = 0; round < s.blocks; ++round) {
        parallel_for(0, s.blocks, 1, [&](int64_t begin, int64_t end) {
            Within within;
            for (int64_t i = begin; i < end; ++i) {
                const int64_t j = (i + round) % s.blocks;
                if (same_group(s, i, j)) continue;
                sums.loss[i] += hinge_tile(s, i, j, within);
                for (int r = 0; r < kBlock; ++r) sums.count[i * kBlock + r] += static_cast<T>(std::popcount(within.row[r]));
                add_products(within, within.count(), s.has_zero[i] || s.has_zero[j], s.width, left(i), right(j));
            }
        });
    }
    return sums;
}

/// Gradient of a row of the dissimilar mean, `weight` being d loss / d KL of a pair that counts.
template <class T>
void dissimilar_gradient(const Sorted<T>& s, const TileSums<T>& sums, T weight, bool detach_target, int64_t i, T* grad) {
    const int64_t at = i * s.width, all = i / kBlock * s.width;
    for (int64_t c = 0; c < s.k; ++c) {
        const T log_p = sums.log_p[at + c] + sums.log_p_all[all + c];
        const T own = s.p[at + c] * ((s.log_p[at + c] + 1) * sums.count[i] - log_p);
        grad[c] = weight * ((detach_target ? T(0) : own) - (sums.to_others[at + c] + sums.to_others_all[all + c]));
    }
}

/// The dissimilar pairs' sum of [m - KL]+; with it, their part of the gradient.
template <class T>
double pull_apart(const Loss<T>& a, const Sorted<T>& s, double pairs, const Context& context) {
    const TileSums<T> sums = sum_tiles(s, a.detach_target, context);
    const auto weight = static_cast<T>(-2 / pairs);
    parallel_for(0, s.b, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            dissimilar_gradient(s, sums, weight, a.detach_target, i, a.grad_log_p + s.entry[i].row * s.k);
    });
    return added_up(sums.loss, s.blocks);
}

template <class T>
void loss(const Loss<T>& a, const Context& context) {
    const Sorted<T> s = sort_by_label(a.batch, context);
    const bool with_grad = a.grad_log_p != nullptr;
    double similar = 0, total = 0;  // ordered pairs, each of which counts both directions
    for (int64_t g = 0; g < s.groups; ++g)
        similar += static_cast<double>(s.first[g + 1] - s.first[g]) * static_cast<double>(s.first[g + 1] - s.first[g] - 1);
    const double dissimilar = static_cast<double>(s.b) * static_cast<double>(s.b - 1) - similar;
    for (int64_t i = 0; with_grad && i < a.batch.b * a.batch.k; ++i) a.grad_log_p[i] = 0;
    if (dissimilar > 0)
        total += 2 * (with_grad ? pull_apart(a, s, dissimilar, context) : dissimilar_pairs(s, context)) / dissimilar;
    if (similar > 0) total += 2 * similar_pairs(s, 2 / similar, a.detach_target, a.grad_log_p, context) / similar;
    *a.loss = static_cast<T>(total);
}

template <class T>
constexpr Kernels<T> kTable{inspect<T>, loss<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY

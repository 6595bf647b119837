// Nearest centroid of each row of a block, through packed products: argmin_k |c_k|^2 - 2 x.c_k.
//
// Rows and centroids are moved by the same shift (the mean of x), which the argmin does not see but rounding does: the score's
// rounding error grows with |x - shift|, not with the distance of the data from the origin.
#pragma once

#include <cmath>
#include <new>
#include <type_traits>

#include "common/context.h"
#include "common/intrinsics.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/products.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

namespace products = fastclust::products::FASTCLUST_CAPABILITY;

constexpr int64_t kBlockRows = 48;  // a multiple of every kTileRows
template <class T>
constexpr int64_t kGroupWidth = 4 * products::kWidth<T>;  // columns whose products lie in the first-level cache at once

constexpr int64_t kSpanRows = 8 * kBlockRows;  // rows of one unit of work; sums are split by these

inline int64_t span_count(int64_t n) {
    return (n + kSpanRows - 1) / kSpanRows;
}

inline int64_t span_end(int64_t span, int64_t n) {
    return (span + 1) * kSpanRows < n ? (span + 1) * kSpanRows : n;
}

/// Cuts [0, count) into `pieces` and calls body(piece, begin, end): for kernels that keep one buffer per piece.
template <class Body>
inline void for_pieces(int pieces, int64_t count, const Body& body) {
    parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
        for (int64_t piece = first; piece < last; ++piece)
            body(static_cast<int>(piece), count * piece / pieces, count * (piece + 1) / pieces);
    });
}

/// Calls run(worker, problem) for each problem of `a`. Many small problems: one thread solves each, in its own cache.
/// Otherwise all threads share each problem, one after another.
template <class Worker, class Arguments, class Run>
inline void for_problems(const Arguments& a, const Context& context, const Run& run) {
    constexpr int64_t kSmallBytes = 4 << 20;
    const int threads = num_threads();
    const int64_t bytes = a.n * a.d * static_cast<int64_t>(sizeof(*a.x));
    const bool apart = a.batch >= 4 * threads || (a.batch >= threads && bytes <= kSmallBytes);
    if (!apart) {
        Worker worker(a, threads, context);
        for (int64_t problem = 0; problem < a.batch; ++problem) run(worker, problem);
        return;
    }
    Worker* workers = context.scratch<Worker>(threads);
    for (int piece = 0; piece < threads; ++piece) new (workers + piece) Worker(a, 1, context);
    int64_t next = 0;
    for_pieces(threads, threads, [&](int piece, int64_t, int64_t) {
        for (int64_t problem; (problem = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < a.batch;)
            run(workers[piece], problem);
    });
}

/// Features [0, depth) cut at multiples of a cache line, one slice per thread at most: sums that run over the rows in order
/// for each feature by itself do not depend on the cut.
template <class T, class Body>
inline void for_feature_slices(int pieces, int64_t depth, const Body& body) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t lines = (depth + kLine - 1) / kLine;
    for_pieces(pieces < lines ? pieces : static_cast<int>(lines), lines,
               [&](int, int64_t begin, int64_t end) { body(begin * kLine, end * kLine < depth ? end * kLine : depth); });
}

/// The mean of the rows of x (n, d), in double along each feature.
template <class T>
inline void mean_of_rows(int pieces, const T* x, int64_t n, int64_t d, double* sums, T* mean) {
    for_feature_slices<T>(pieces, d, [&](int64_t begin, int64_t end) {
        constexpr int64_t kAtOnce = 8;  // rows: a sum then stays in its register for as many additions
        constexpr int64_t kAhead = 4 * kAtOnce, kLine = 64 / sizeof(T);
        for (int64_t j = begin; j < end; ++j) sums[j] = 0;
        int64_t row = 0;
        for (; row + kAtOnce <= n; row += kAtOnce) {
            for (int64_t r = row + kAhead; r < row + kAhead + kAtOnce && r < n; ++r)
                for (int64_t j = begin; j < end; j += kLine) __builtin_prefetch(x + r * d + j);
            for (int64_t j = begin; j < end; ++j) {
                double sum = sums[j];
#pragma GCC unroll 8
                for (int64_t r = 0; r < kAtOnce; ++r) sum += static_cast<double>(x[(row + r) * d + j]);
                sums[j] = sum;
            }
        }
        for (; row < n; ++row)
            for (int64_t j = begin; j < end; ++j) sums[j] += static_cast<double>(x[row * d + j]);
        for (int64_t j = begin; j < end; ++j) mean[j] = static_cast<T>(sums[j] / static_cast<double>(n));
    });
}

typedef double EightDoubles __attribute__((vector_size(8 * sizeof(double))));

/// Eight values from v on. By reference: handed over, such vectors would warn where the CPU has none so wide.
template <class T>
inline void widen(const T* v, EightDoubles& wide) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) {  // g++ 12 would convert halves and join them
        wide = EightDoubles(_mm512_cvtps_pd(_mm256_loadu_ps(v)));
        return;
    }
#endif
    typedef T Values __attribute__((vector_size(8 * sizeof(T)), aligned(sizeof(T)), may_alias));
    wide = __builtin_convertvector(*reinterpret_cast<const Values*>(v), EightDoubles);
}

/// |x - c|^2 in double.
template <class T>
inline double squared_distance(const T* x, const T* c, int64_t d) {
    EightDoubles sums[2] = {};
    int64_t j = 0;
    for (; j + 16 <= d; j += 16)
        for (int half = 0; half < 2; ++half) {
            EightDoubles difference, other;
            widen(x + j + 8 * half, difference);
            widen(c + j + 8 * half, other);
            difference -= other;
            sums[half] += difference * difference;
        }
    sums[0] += sums[1];
    double sum = fastclust::lanes::FASTCLUST_CAPABILITY::sum(sums[0]);
    for (; j < d; ++j) sum += (static_cast<double>(x[j]) - c[j]) * (static_cast<double>(x[j]) - c[j]);
    return sum;
}

/// A lower bound of |x - second| - |x - best| for scores |c|^2 - 2 x.c of float arithmetic over d features; `square` is |x|^2.
/// Not above zero, or NaN, where rounding might turn the two.
template <class T>
inline T distance_gap(T best, T second, T square, int64_t d) {
    constexpr T kEpsilon = sizeof(T) == 4 ? T(1.2e-7) : T(2.3e-16);
    const T farther = second + square > 0 ? second + square : 0;
    const T nearer = best + square > 0 ? best + square : 0;
    const T error = kEpsilon * static_cast<T>(d + 16) * (3 * square + 2 * farther);  // |c|^2 <= 2 (|x|^2 + |x - c|^2)
    return static_cast<T>((1 - 4 * kEpsilon) * std::sqrt(farther > error ? farther - error : T(0)) -
                          (1 + 4 * kEpsilon) * std::sqrt(nearer + error));
}

/// Centroids that a row remembers beside its nearest, where it does (Search::keeps_rivals).
constexpr int kRivals = 2;

/// What is known of some rows, and found out. Gaps and leads are not above zero where rounding may decide.
template <class T>
struct Nearest {
    int32_t* labels;           // the nearest centroid
    T* scores;                 // its score |c|^2 - 2 x.c
    int32_t* rivals[kRivals];  // some others that are near; the label itself in place of none
    T* leads;                  // how much farther than the nearest all rivals are, at least; infinite without any
    T* gaps;                   // and all others
    bool standing;             // label, score and gap stand unless one of the centroids searched is nearer

    Nearest from(int64_t first) const {
        return {labels + first, scores + first, {rivals[0] + first, rivals[1] + first}, leads + first, gaps + first, standing};
    }

    void without_rivals(int64_t i) const {
        for (int32_t* of_rows : rivals) of_rows[i] = labels[i];
        leads[i] = static_cast<T>(__builtin_inf());
    }
};

/// Centroids ready for products: all K, or those of `ids`.
template <class T>
struct Centres {
    int64_t k, d;
    const T* shift;                // (D)
    const int64_t* ids = nullptr;  // (k) ascending, of the centroids that are here; null: all
    T* panels;                     // packed columns of c - shift
    T* norms;                      // |c - shift|^2, infinite in the last panel's empty columns
    T* chosen;                     // (k, D) the centroids of ids; null where there are none such

    Centres(int64_t k_, int64_t d_, const T* shift_, bool with_ids, const Context& context)
        : k(k_),
          d(d_),
          shift(shift_),
          panels(context.scratch<T>(products::packed_columns_size<T>(k_, d_))),
          norms(context.scratch<T>(products::panel_count<T>(k_) * products::kWidth<T>)),
          chosen(with_ids ? context.scratch<T>(k_ * d_) : nullptr) {}

    int64_t id(int64_t column) const { return ids == nullptr ? column : ids[column]; }

    /// Of the centroids (.., D) those at ids_[0 .. count) alone.
    void prepare(int pieces, const T* centroids, const int64_t* ids_, int64_t count) {
        ids = ids_, k = count;
        for (int64_t column = 0; column < k; ++column)
            for (int64_t j = 0; j < d; ++j) chosen[column * d + j] = centroids[ids[column] * d + j];
        prepare(pieces, chosen);
    }

    void prepare(int pieces, const T* centroids) {
        constexpr int64_t kWidth = products::kWidth<T>;
        const int64_t count = products::panel_count<T>(k);
        for_pieces(pieces < count ? pieces : static_cast<int>(count), count, [&](int, int64_t first, int64_t last) {
            products::pack_columns(centroids, k, d, d, first, last, panels, shift);
            for (int64_t column = first * kWidth; column < last * kWidth; ++column) {
                const T* panel = panels + column / kWidth * kWidth * d + column % kWidth;
                double norm = 0;
                for (int64_t j = 0; j < d; ++j) norm += static_cast<double>(panel[j * kWidth]) * panel[j * kWidth];
                norms[column] = column < k ? static_cast<T>(norm) : static_cast<T>(__builtin_inf());
            }
        });
    }
};

/// Finds the nearest centroids of one block at a time; one per piece, since it holds the buffers.
template <class T>
class BlockAssigner {
   public:
    BlockAssigner(int64_t d, const Context& context)
        : rows_(context.scratch<T>(products::packed_rows_size<T>(kBlockRows, d))),
          products_(context.scratch<T>(kBlockRows * kGroupWidth<T>)),
          best_(context.scratch<Best>(kBlockRows)) {}

    /// The nearest centroids of rows[0 .. count) of x, count <= kBlockRows: the lowest of equals.
    void assign(const Centres<T>& centres, const T* x, const int64_t* rows, int64_t count, const Nearest<T>& nearest) {
        pack(centres, x, rows, count);
        for (int64_t i = 0; i < count; ++i) {
            const Value infinite = Value{} + static_cast<T>(__builtin_inf());
            best_[i] = {infinite, infinite, Index{}};
        }
        const int64_t columns = products::panel_count<T>(centres.k) * products::kWidth<T>;
        for (int64_t first = 0; first < columns; first += kGroupWidth<T>) {
            const int64_t width = columns - first < kGroupWidth<T> ? columns - first : kGroupWidth<T>;
            products::multiply(rows_, count, count, centres.d, centres.panels + first * centres.d, width / products::kWidth<T>,
                               products_, kGroupWidth<T>);
            for (int64_t i = 0; i < count; ++i) keep_best(centres.norms + first, i, first, width);
        }
        for (int64_t i = 0; i < count; ++i) conclude(centres, i, count, nearest.from(i));
    }

   private:
    using Value = products::Vector<T>;
    using Index = decltype(Value{} < Value{});  // integers as wide as T
    using Lane = std::remove_reference_t<decltype(Index{}[0])>;
    static constexpr int kLanes = products::kLanes<T>;

    /// Lane by lane: the least score, its column less the lane, and the least of the others.
    struct Best {
        Value score, second;
        Index column;
    };

    void pack(const Centres<T>& centres, const T* x, const int64_t* rows, int64_t count) {
        constexpr int64_t kChunk = products::kChunk<T>;
        T* __restrict out = rows_;
        for (int64_t begin = 0; begin < centres.d; begin += kChunk) {
            const int64_t width = centres.d - begin < kChunk ? centres.d - begin : kChunk;
            const T* __restrict shift = centres.shift + begin;
            for (int64_t i = 0; i < count; ++i, out += kChunk) {
                const T* __restrict row = x + rows[i] * centres.d + begin;
                for (int64_t j = 0; j < width; ++j) out[j] = row[j] - shift[j];
            }
        }
    }

    void keep_best(const T* norms, int64_t i, int64_t first, int64_t width) {
        Best best = best_[i];
        for (int64_t column = 0; column < width; column += kLanes) {
            const Value score = *reinterpret_cast<const Value*>(norms + column) -
                                T(2) * *reinterpret_cast<const Value*>(products_ + i * kGroupWidth<T> + column);
            const Index better = score < best.score;
            const Value worse = better ? best.score : score;
            best.second = worse < best.second ? worse : best.second;
            best.score = better ? score : best.score;
            best.column = better ? Index{} + static_cast<Lane>(first + column) : best.column;
        }
        best_[i] = best;
    }

    void conclude(const Centres<T>& centres, int64_t i, int64_t count, const Nearest<T>& nearest) const {
        const Best& best = best_[i];
        int winner = 0;
        for (int lane = 1; lane < kLanes; ++lane) {
            const bool lower = best.column[lane] + lane < best.column[winner] + winner;
            if (best.score[lane] < best.score[winner] || (best.score[lane] == best.score[winner] && lower)) winner = lane;
        }
        T second = best.second[winner];
        for (int lane = 0; lane < kLanes; ++lane)
            if (lane != winner && best.score[lane] < second) second = best.score[lane];
        join(centres.id(best.column[winner] + winner), best.score[winner], second, squared_norm(centres.d, i, count), centres.d,
             nearest);
    }

    /// The nearest of the centroids searched, and the second of them, against what stands.
    static void join(int64_t label, T score, T second, T square, int64_t d, const Nearest<T>& nearest) {
        if (!nearest.standing) {
            *nearest.gaps = distance_gap<T>(score, second, square, d);
        } else if (score < *nearest.scores || (score == *nearest.scores && label < *nearest.labels)) {
            const T farther = second < *nearest.scores ? second : *nearest.scores;
            *nearest.gaps = lesser(*nearest.gaps, distance_gap<T>(score, farther, square, d));
        } else {
            *nearest.gaps = lesser(*nearest.gaps, distance_gap<T>(*nearest.scores, score, square, d));
            return;
        }
        *nearest.scores = score;
        *nearest.labels = static_cast<int32_t>(label);
    }

    static T lesser(T a, T b) { return b < a ? b : a; }

    T squared_norm(int64_t d, int64_t i, int64_t count) const {
        constexpr int64_t kChunk = products::kChunk<T>;
        Value sums = {};
        T tail = 0;
        for (int64_t begin = 0; begin < d; begin += kChunk) {
            const T* x = rows_ + begin * count + i * kChunk;
            const int64_t width = d - begin < kChunk ? d - begin : kChunk;
            int64_t j = 0;
            for (; j + kLanes <= width; j += kLanes) {
                const Value value = *reinterpret_cast<const Value*>(x + j);
                sums += value * value;
            }
            for (; j < width; ++j) tail += x[j] * x[j];
        }
        for (int lane = 0; lane < kLanes; ++lane) tail += sums[lane];
        return tail;
    }

    T* rows_;
    T* products_;
    Best* best_;
};

/// One assigner per piece.
template <class T>
inline BlockAssigner<T>* make_assigners(int pieces, int64_t d, const Context& context) {
    auto* assigners = context.scratch<BlockAssigner<T>>(pieces);
    for (int piece = 0; piece < pieces; ++piece) new (assigners + piece) BlockAssigner<T>(d, context);
    return assigners;
}

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

// Conjugate gradients on a panel of at most 256 bytes of columns: wide enough that the graph is read seldom, narrow enough that
// the rows near each other fit the cache. A panel's vectors are (N, kWidth), its rows by place; four of them are all that a
// solve needs, however many columns there are: its panels share them. Included by diffusion_cpu.cpp alone.
#pragma once

#include <cstddef>

#include "diffusion/system.h"

namespace fastclust::diffusion::FASTCLUST_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int kWidth>
class Panel {
    static constexpr int kBytes = kWidth * static_cast<int>(sizeof(T));
    static constexpr int kLanes = kBytes < kVectorBytes ? kWidth : kVectorBytes / static_cast<int>(sizeof(T));
    static constexpr int kVectors = kWidth / kLanes;
    static constexpr int kChains = kVectors >= 8 ? 1 : 8 / kVectors;  // sums in flight, to hide the latency of an FMA
    static constexpr int kLine = 64 / static_cast<int>(sizeof(T));    // a cache line
    typedef T Vector __attribute__((vector_size(kLanes * sizeof(T))));

    struct Row {
        Vector v[kVectors];
    };
    struct Sums {
        double v[kWidth];
    };
    struct Products {
        Sums pq, qq;
    };

   public:
    static constexpr int64_t kRowBytes = 4 * sizeof(Row), kBlockBytes = sizeof(Products);

    /// `rows` has room for kRowBytes of each place, `partial` for kBlockBytes of each block.
    Panel(const System<T>& system, std::byte* rows, std::byte* partial)
        : system_(system),
          x_(reinterpret_cast<Row*>(rows)),
          r_(x_ + system.n),
          p_(r_ + system.n),
          q_(p_ + system.n),
          partial_(partial) {}

    /// Solves columns [first, first + width) of `a`. The next direction needs the next |r|^2 before r is known. With q = A p
    /// and the step a = r.r / p.q it is |r - a q|^2 = a^2 q.q - r.r, for r.q = p.q: foreseen so, all four vectors are passed
    /// over once instead of twice. Only the direction takes the foreseen one; steps and the stopping test, r's own.
    void solve(const Solve<T>& a, int64_t first, int width) {
        Sums norm2 = load(a, first, width), rr = norm2;
        int64_t n_iter[kWidth] = {};
        for (int64_t iteration = 0; iteration < a.max_iter; ++iteration) {
            bool going[kWidth], any = false;
            for (int c = 0; c < width; ++c) any |= going[c] = rr.v[c] > a.tol * a.tol * norm2.v[c];
            if (!any) break;
            const Products of = multiply();
            Row step{}, next{};
            for (int c = 0; c < width; ++c) {
                if (!going[c] || !(of.pq.v[c] > 0)) continue;
                const double length = rr.v[c] / of.pq.v[c], foreseen = length * length * of.qq.v[c] - rr.v[c];
                step.v[c / kLanes][c % kLanes] = static_cast<T>(length);
                if (foreseen > 0) next.v[c / kLanes][c % kLanes] = static_cast<T>(foreseen / rr.v[c]);
                ++n_iter[c];
            }
            rr = advance(step, next);
        }
        const Sums error2 = store(a, first, width);
        for (int c = 0; c < width; ++c) {
            a.n_iter[first + c] = n_iter[c];
            a.residual[first + c] = norm2.v[c] > 0 ? static_cast<T>(__builtin_sqrt(error2.v[c] / norm2.v[c])) : T(0);
        }
    }

   private:
    /// Calls body(begin, end, rows) for the places of each block: it adds to the Rows that Total is made of, a Row for each
    /// Sums. Adds those up in the blocks' order.
    template <class Total, class Body>
    Total sum_over_blocks(const Body& body) {
        constexpr int kSums = sizeof(Total) / sizeof(double), kRows = kSums / kWidth;
        auto* partial = reinterpret_cast<double (*)[kSums]>(partial_);
        parallel_for(0, system_.blocks, 4, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) {
                Row rows[kRows] = {};
                body(system_.block[b], system_.block[b + 1], rows);
                for (int s = 0; s < kSums; ++s)
                    partial[b][s] = static_cast<double>(rows[s / kWidth].v[s % kWidth / kLanes][s % kLanes]);
            }
        });
        double total[kSums] = {};
        for (int64_t b = 0; b < system_.blocks; ++b)
            for (int s = 0; s < kSums; ++s) total[s] += partial[b][s];
        return __builtin_bit_cast(Total, total);
    }

    /// sum_j alpha s_ij in_j at place i.
    Row neighbours(const Row* in, int64_t i) const {
        Row chain[kChains] = {};
        const int32_t* col = system_.col;
        const T* value = system_.value;
        int64_t e = system_.start[i];
        const int64_t end = system_.start[i + 1];
        for (; e + kChains <= end; e += kChains)
            for (int c = 0; c < kChains; ++c)
                for (int v = 0; v < kVectors; ++v) chain[c].v[v] += value[e + c] * in[col[e + c]].v[v];
        for (; e < end; ++e)
            for (int v = 0; v < kVectors; ++v) chain[0].v[v] += value[e] * in[col[e]].v[v];
        for (int c = 1; c < kChains; ++c)
            for (int v = 0; v < kVectors; ++v) chain[0].v[v] += chain[c].v[v];
        return chain[0];
    }

    /// x = 0, r = p = y; returns |y|^2.
    Sums load(const Solve<T>& a, int64_t first, int width) {
        return sum_over_blocks<Sums>([&](int64_t begin, int64_t end, Row* yy) {
            for (int64_t i = begin; i < end; ++i) {
                const Row y = row_of_y(a, i, end, first, width);
                x_[i] = Row{};
                r_[i] = p_[i] = y;
                for (int v = 0; v < kVectors; ++v) yy->v[v] += y.v[v] * y.v[v];
            }
        });
    }

    /// q = (I - alpha S) p; returns p.q and |q|^2.
    Products multiply() {
        return sum_over_blocks<Products>([&](int64_t begin, int64_t end, Row* rows) {
            Row &pq = rows[0], &qq = rows[1];
            for (int64_t i = begin; i < end; ++i) {
                const Row sp = neighbours(p_, i);
                for (int v = 0; v < kVectors; ++v) {
                    const Vector p = p_[i].v[v], q = p - sp.v[v];
                    q_[i].v[v] = q;
                    pq.v[v] += p * q;
                    qq.v[v] += q * q;
                }
            }
        });
    }

    /// x += step p, r -= step q, p = r + next p; returns |r|^2.
    Sums advance(const Row& step, const Row& next) {
        return sum_over_blocks<Sums>([&](int64_t begin, int64_t end, Row* rr) {
            for (int64_t i = begin; i < end; ++i) {
                for (int v = 0; v < kVectors; ++v) {
                    const Vector p = p_[i].v[v], r = r_[i].v[v] - step.v[v] * q_[i].v[v];
                    x_[i].v[v] += step.v[v] * p;
                    r_[i].v[v] = r;
                    p_[i].v[v] = r + next.v[v] * p;
                    rr->v[v] += r * r;
                }
            }
        });
    }

    /// f = x; returns |y - (I - alpha S) x|^2.
    Sums store(const Solve<T>& a, int64_t first, int width) {
        return sum_over_blocks<Sums>([&](int64_t begin, int64_t end, Row* errors) {
            for (int64_t i = begin; i < end; ++i) {
                prefetch_ahead<1>(a.f, i, end, a.c, first, width);
                const Row sx = neighbours(x_, i), y = row_of_y(a, i, end, first, width);
                for (int v = 0; v < kVectors; ++v) {
                    const Vector error = y.v[v] - x_[i].v[v] + sx.v[v];
                    errors->v[v] += error * error;
                }
                __builtin_memcpy(a.f + static_cast<int64_t>(system_.order[i]) * a.c + first, &x_[i], width * sizeof(T));
            }
        });
    }

    /// The panel's columns of place i in y (N, C), zeros beyond `width`.
    Row row_of_y(const Solve<T>& a, int64_t i, int64_t end, int64_t first, int width) const {
        prefetch_ahead<0>(a.y, i, end, a.c, first, width);
        Row row{};
        __builtin_memcpy(&row, a.y + static_cast<int64_t>(system_.order[i]) * a.c + first, width * sizeof(T));
        return row;
    }

    /// y and f are in the graph's order: every row is a miss, unless it was asked for kAhead places before.
    template <int kWrite>
    void prefetch_ahead(const T* of, int64_t i, int64_t end, int64_t columns, int64_t first, int width) const {
        if (i + kAhead >= end) return;
        const T* row = of + static_cast<int64_t>(system_.order[i + kAhead]) * columns + first;
        for (int c = 0; c < width; c += kLine) __builtin_prefetch(row + c, kWrite);
    }

    const System<T>& system_;
    Row *x_, *r_, *p_, *q_;
    std::byte* partial_;
};

}  // namespace
}  // namespace fastclust::diffusion::FASTCLUST_CAPABILITY

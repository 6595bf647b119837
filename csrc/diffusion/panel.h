// Conjugate gradients on a panel of at most 256 bytes of columns: wide enough that the graph is read seldom, narrow enough that
// the rows near each other fit the cache. A panel's vectors are (N, kWidth), its rows by place; four of them are all that a
// solve needs, however many columns there are. Included by diffusion_cpu.cpp alone.
#pragma once

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
    static constexpr int64_t kAhead = 4;
    typedef T Vector __attribute__((vector_size(kLanes * sizeof(T))));

    struct Row {
        Vector v[kVectors];
    };
    struct Sums {
        double v[kWidth];
    };

   public:
    Panel(const System<T>& system, const Context& context)
        : system_(system),
          x_(context.scratch<Row>(system.n)),
          r_(context.scratch<Row>(system.n)),
          p_(context.scratch<Row>(system.n)),
          q_(context.scratch<Row>(system.n)),
          partial_(context.scratch<Sums>(system.blocks)) {}

    /// Solves columns [first, first + width) of `a`.
    void solve(const Solve<T>& a, int64_t first, int width) {
        Sums norm2 = load(a, first, width), rr = norm2;
        int64_t n_iter[kWidth] = {};
        for (int64_t iteration = 0; iteration < a.max_iter; ++iteration) {
            bool going[kWidth], any = false;
            for (int c = 0; c < width; ++c) any |= going[c] = rr.v[c] > a.tol * a.tol * norm2.v[c];
            if (!any) break;
            const Sums pq = multiply();
            Row step{}, next{};
            Sums before = rr;
            for (int c = 0; c < width; ++c) {
                if (!going[c] || !(pq.v[c] > 0)) continue;
                step.v[c / kLanes][c % kLanes] = static_cast<T>(rr.v[c] / pq.v[c]);
                ++n_iter[c];
            }
            rr = descend(step);
            for (int c = 0; c < width; ++c)
                if (before.v[c] > 0) next.v[c / kLanes][c % kLanes] = static_cast<T>(rr.v[c] / before.v[c]);
            advance(step, next);
        }
        const Sums error2 = store(a, first, width);
        for (int c = 0; c < width; ++c) {
            a.n_iter[first + c] = n_iter[c];
            a.residual[first + c] = norm2.v[c] > 0 ? static_cast<T>(__builtin_sqrt(error2.v[c] / norm2.v[c])) : T(0);
        }
    }

   private:
    /// Calls body(begin, end) -> Row of sums for the places of each block and adds those up in the blocks' order.
    template <class Body>
    Sums sum_over_blocks(const Body& body) {
        parallel_for(0, system_.blocks, 4, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) {
                const Row row = body(system_.block[b], system_.block[b + 1]);
                for (int c = 0; c < kWidth; ++c) partial_[b].v[c] = static_cast<double>(row.v[c / kLanes][c % kLanes]);
            }
        });
        Sums total{};
        for (int64_t b = 0; b < system_.blocks; ++b)
            for (int c = 0; c < kWidth; ++c) total.v[c] += partial_[b].v[c];
        return total;
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
        return sum_over_blocks([&](int64_t begin, int64_t end) {
            Row sum{};
            for (int64_t i = begin; i < end; ++i) {
                const Row y = row_of(a.y, a, i, first, width);
                x_[i] = Row{};
                r_[i] = p_[i] = y;
                for (int v = 0; v < kVectors; ++v) sum.v[v] += y.v[v] * y.v[v];
            }
            return sum;
        });
    }

    /// q = (I - alpha S) p; returns p.q.
    Sums multiply() {
        return sum_over_blocks([&](int64_t begin, int64_t end) {
            Row sum{};
            for (int64_t i = begin; i < end; ++i) {
                const Row sp = neighbours(p_, i);
                for (int v = 0; v < kVectors; ++v) {
                    q_[i].v[v] = p_[i].v[v] - sp.v[v];
                    sum.v[v] += p_[i].v[v] * q_[i].v[v];
                }
            }
            return sum;
        });
    }

    /// r -= step q; returns |r|^2.
    Sums descend(const Row& step) {
        return sum_over_blocks([&](int64_t begin, int64_t end) {
            Row sum{};
            for (int64_t i = begin; i < end; ++i) {
                for (int v = 0; v < kVectors; ++v) {
                    const Vector r = r_[i].v[v] - step.v[v] * q_[i].v[v];
                    r_[i].v[v] = r;
                    sum.v[v] += r * r;
                }
            }
            return sum;
        });
    }

    /// x += step p, p = r + next p.
    void advance(const Row& step, const Row& next) {
        parallel_for(0, system_.n, 1024, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                for (int v = 0; v < kVectors; ++v) {
                    x_[i].v[v] += step.v[v] * p_[i].v[v];
                    p_[i].v[v] = r_[i].v[v] + next.v[v] * p_[i].v[v];
                }
            }
        });
    }

    /// f = x; returns |y - (I - alpha S) x|^2.
    Sums store(const Solve<T>& a, int64_t first, int width) {
        return sum_over_blocks([&](int64_t begin, int64_t end) {
            Row sum{};
            for (int64_t i = begin; i < end; ++i) {
                if (i + kAhead < end) {  // y and f are in the graph's order: every row is a miss
                    const int64_t ahead = static_cast<int64_t>(system_.order[i + kAhead]) * a.c + first;
                    for (int c = 0; c < width; c += kLine) {
                        __builtin_prefetch(a.y + ahead + c);
                        __builtin_prefetch(a.f + ahead + c, 1);
                    }
                }
                const Row sx = neighbours(x_, i), y = row_of(a.y, a, i, first, width);
                for (int v = 0; v < kVectors; ++v) {
                    const Vector error = y.v[v] - x_[i].v[v] + sx.v[v];
                    sum.v[v] += error * error;
                }
                __builtin_memcpy(a.f + static_cast<int64_t>(system_.order[i]) * a.c + first, &x_[i], width * sizeof(T));
            }
            return sum;
        });
    }

    /// The panel's columns of place i in y (N, C), zeros beyond `width`.
    Row row_of(const T* y, const Solve<T>& a, int64_t i, int64_t first, int width) const {
        Row row{};
        __builtin_memcpy(&row, y + static_cast<int64_t>(system_.order[i]) * a.c + first, width * sizeof(T));
        return row;
    }

    const System<T>& system_;
    Row *x_, *r_, *p_, *q_;
    Sums* partial_;
};

}  // namespace
}  // namespace fastclust::diffusion::FASTCLUST_CAPABILITY

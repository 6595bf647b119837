// Nearest centroids through 8-bit products, each certified: a label is taken from them only where no other centroid's score
// can be lower, given the bounds of quantisation and rounding; between the centroids left, float scores decide.
//
// In units of 2 scale_x, which differ from row to row, the score |c_k|^2 - 2 x.c_k is t_k = |c_k|^2 / (2 scale_x) - scale_k
// q_x.q_k and is off by at most  e_k = (|x - x~| |c_k| + |x~| |c_k - c~_k|) / scale_x  (and rounding): centroid k is left where
// t_k - e_k <= min_j t_j + e_j.
#pragma once

#include <type_traits>

#include "common/quantised.h"
#include "kmeans/nearest.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

namespace quantised = fastclust::quantised::FASTCLUST_CAPABILITY;
static_assert(kBlockRows % quantised::kTileRows == 0);

template <class T>
constexpr bool kCertifies = quantised::kAvailable && std::is_same_v<T, float>;

/// Below this depth the float products cost no more than the bounds.
constexpr int64_t kLeastDepth = 16;

/// The rows of one problem, less the shift, quantised once for all its passes.
struct QuantisedRows {
    int64_t n, d;
    uint8_t* packed;
    quantised::Quantised* how;  // (N)
    float* centred;             // one padded row per piece

    QuantisedRows(int64_t n_, int64_t d_, int pieces, const Context& context)
        : n(n_),
          d(d_),
          packed(context.scratch<uint8_t>(quantised::packed_rows_size(n_, d_))),
          how(context.scratch<quantised::Quantised>(n_)),
          centred(context.scratch<float>(pieces * padded(d_))) {}

    static int64_t padded(int64_t d) { return (d + 15) / 16 * 16; }

    void prepare(int pieces, const float* x, const float* shift) {
        for_pieces(pieces, span_count(n), [&](int piece, int64_t first, int64_t last) {
            float* v = centred + piece * padded(d);
            for (int64_t j = d; j < padded(d); ++j) v[j] = 0;
            for (int64_t row = first * kSpanRows; first < last && row < span_end(last - 1, n); ++row) {
                for (int64_t j = 0; j < d; ++j) v[j] = x[row * d + j] - shift[j];
                how[row] = quantised::pack_row(v, row, d, packed);
            }
        });
    }
};

/// K centroids ready for 8-bit products, and for float products one by one. Columns beyond K have an infinite norm.
struct QuantisedCentres {
    int64_t k, d, columns;
    const float* shift;
    float* centred;    // (columns, padded D) c - shift
    uint8_t* packed;   // its panels
    int32_t* starts;   // (columns)
    float* scales;     // (columns)
    float* squares;    // (columns) |c - shift|^2
    float* norms;      // (columns) |c - shift|
    float* residuals;  // (columns) |c - c~|

    QuantisedCentres(int64_t k_, int64_t d_, const float* shift_, const Context& context)
        : k(k_),
          d(d_),
          columns((k_ + quantised::kWidth - 1) / quantised::kWidth * quantised::kWidth),
          shift(shift_),
          centred(context.scratch<float>(columns * QuantisedRows::padded(d_))),
          packed(context.scratch<uint8_t>(quantised::packed_columns_size(k_, d_))),
          starts(context.scratch<int32_t>(columns)),
          scales(context.scratch<float>(columns)),
          squares(context.scratch<float>(columns)),
          norms(context.scratch<float>(columns)),
          residuals(context.scratch<float>(columns)) {}

    void prepare(int pieces, const float* centroids) {
        const int64_t width = QuantisedRows::padded(d);
        for_pieces(pieces, columns, [&](int, int64_t first, int64_t last) {
            for (int64_t column = first; column < last; ++column) {
                float* v = centred + column * width;
                double square = 0;
                for (int64_t j = 0; j < width; ++j) v[j] = j < d && column < k ? centroids[column * d + j] - shift[j] : 0;
                for (int64_t j = 0; j < d; ++j) square += static_cast<double>(v[j]) * v[j];
                const auto how = quantised::pack_column(v, column, d, packed, starts + column);
                scales[column] = how.scale;
                residuals[column] = how.residual;
                norms[column] = static_cast<float>(__builtin_sqrt(square) * 1.000001);
                squares[column] = column < k ? static_cast<float>(square) : __builtin_inff();
            }
        });
    }
};

/// Finds the nearest centroids of one block at a time; one per piece, since it holds the buffers.
template <class T>
class CertifiedAssigner;

#if FASTCLUST_CAPABILITY_avx512_vnni

template <>
class CertifiedAssigner<float> {
   public:
    CertifiedAssigner(int64_t d, const Context& context)
        : lower_(context.scratch<float>(kRows * kGroup)),
          centred_(context.scratch<float>(QuantisedRows::padded(d))),
          gathered_(context.scratch<uint8_t>(kRows * quantised::steps(d) * 4)),
          left_(context.scratch<Left>(kRows)) {
        for (int64_t j = d; j < QuantisedRows::padded(d); ++j) centred_[j] = 0;
    }

    /// Labels and gaps, as BlockAssigner's, of rows[0 .. count); how many float scores it took to be certain of them. Without
    /// `exact` it takes none: the best 8-bit score decides.
    int64_t assign(const QuantisedRows& data, const QuantisedCentres& centres, const float* x, const int64_t* rows,
                   int64_t count, bool exact, int64_t* labels, float* gaps) {
        int64_t scored = 0;
        for (int64_t first = 0; first < count; first += kRows) {
            const int64_t size = count - first < kRows ? count - first : kRows;
            const uint8_t* group = packed_group(data, rows + first, size);
            for (int64_t i = 0; i < size; ++i) left_[i] = Left{};
            for (int64_t column = 0; column < centres.columns; column += kGroup)
                bound_group(data, centres, group, rows + first, size, column);
            for (int64_t i = 0; i < size; ++i)
                scored += conclude(data, centres, x, rows[first + i], exact, left_[i], labels + first + i, gaps + first + i);
        }
        return scored;
    }

   private:
    static constexpr int64_t kRows = quantised::kTileRows;
    static constexpr int64_t kGroup = 16 * quantised::kWidth;  // columns whose scores lie in the first-level cache at once
    static constexpr int64_t kMost = 30;

    /// The centroids that a row may belong to, ascending; all where count > kMost, or where no bound holds (count 0).
    struct Left {
        float upper = __builtin_inff();   // the least upper bound of a score so far
        float least = __builtin_inff();   // the least lower bound
        float second = __builtin_inff();  // and the second least
        int32_t count = 0;
        int32_t column[kMost] = {};
        float lower[kMost];

        int64_t lowest() const {
            int32_t best = 0;
            for (int32_t i = 1; i < count && i < kMost; ++i) best = lower[i] < lower[best] ? i : best;
            return column[best];
        }
    };

    /// The packed rows of a group: where they lie if they are one, else gathered.
    const uint8_t* packed_group(const QuantisedRows& data, const int64_t* rows, int64_t size) {
        const int64_t steps = quantised::steps(data.d);
        const auto group_of = [&](int64_t row) { return data.packed + row / kRows * kRows * steps * 4; };
        if (rows[0] % kRows == 0 && rows[size - 1] - rows[0] == size - 1) return group_of(rows[0]);
        for (int64_t i = 0; i < size; ++i) {
            const uint8_t* from = group_of(rows[i]) + rows[i] % kRows * 4;
            for (int64_t step = 0; step < steps; ++step)
                __builtin_memcpy(gathered_ + (step * kRows + i) * 4, from + step * kRows * 4, 4);
        }
        return gathered_;
    }

    void bound_group(const QuantisedRows& data, const QuantisedCentres& centres, const uint8_t* group, const int64_t* rows,
                     int64_t size, int64_t column) {
        const int64_t width = centres.columns - column < kGroup ? centres.columns - column : kGroup;
        quantised::multiply(group, centres.packed + column * quantised::steps(centres.d) * 4, width / quantised::kWidth,
                            centres.d, centres.starts + column, reinterpret_cast<int32_t*>(lower_), kGroup);
        for (int64_t i = 0; i < size; ++i) {
            lower_bounds(data.how[rows[i]], centres, column, width, lower_ + i * kGroup, left_[i]);
            keep(lower_ + i * kGroup, column, width, left_[i]);
        }
    }

    /// Turns integer products into lower bounds of the scores, in place, and lowers the least upper bound.
    static void lower_bounds(const quantised::Quantised& row, const QuantisedCentres& centres, int64_t column, int64_t width,
                             float* __restrict products, Left& left) {
        constexpr float kRounding = 1e-6f;  // of the few float operations below
        const float inverse = 1 / row.scale;
        const __m512 half = _mm512_set1_ps(0.5f * inverse);
        const __m512 by_norm = _mm512_set1_ps((row.residual + kRounding * row.norm) * inverse * (1 + kRounding));
        const __m512 by_residual = _mm512_set1_ps(row.norm * inverse * (1 + kRounding));
        const __m512 by_square = _mm512_set1_ps(0.5f * inverse * kRounding);
        const float* __restrict squares = centres.squares + column;
        const float* __restrict norms = centres.norms + column;
        const float* __restrict residuals = centres.residuals + column;
        const float* __restrict scales = centres.scales + column;
        __m512 upper = _mm512_set1_ps(left.upper);
        __m512 least = _mm512_set1_ps(__builtin_inff()), second = least;
        for (int64_t j = 0; j < width; j += 16) {
            const __m512 square = _mm512_loadu_ps(squares + j);
            __m512 bound = _mm512_mul_ps(by_norm, _mm512_loadu_ps(norms + j));
            bound = _mm512_fmadd_ps(by_residual, _mm512_loadu_ps(residuals + j), bound);
            bound = _mm512_fmadd_ps(by_square, square, bound);
            const __m512 product = _mm512_cvtepi32_ps(_mm512_loadu_si512(products + j));
            const __m512 score = _mm512_fnmadd_ps(_mm512_loadu_ps(scales + j), product, _mm512_mul_ps(half, square));
            upper = _mm512_min_ps(upper, _mm512_add_ps(score, bound));
            const __m512 lower =
                _mm512_sub_ps(score, bound);  // NaN beyond K; of a NaN, min and max return their second operand
            second = _mm512_min_ps(_mm512_max_ps(least, lower), second);
            least = _mm512_min_ps(lower, least);
            _mm512_storeu_ps(products + j, lower);
        }
        left.upper = _mm512_reduce_min_ps(upper);
        const float lowest = _mm512_reduce_min_ps(least);
        const __mmask16 at = _mm512_cmp_ps_mask(least, _mm512_set1_ps(lowest), _CMP_EQ_OQ);
        const auto one = static_cast<__mmask16>(at & -at);
        const float next = _mm512_reduce_min_ps(_mm512_mask_mov_ps(least, one, second));
        const float larger = lowest < left.least ? left.least : lowest;
        left.least = lowest < left.least ? lowest : left.least;
        left.second = larger < left.second ? larger : left.second;
        left.second = next < left.second ? next : left.second;
    }

    static void keep(const float* lower, int64_t column, int64_t width, Left& left) {
        const __m512 upper = _mm512_set1_ps(left.upper);
        int32_t count = 0;  // of those kept so far, the ones still below
        for (int32_t i = 0; i < left.count && left.count <= kMost; ++i) {
            if (!(left.lower[i] <= left.upper)) continue;
            left.column[count] = left.column[i];
            left.lower[count++] = left.lower[i];
        }
        if (left.count <= kMost) left.count = count;
        for (int64_t j = 0; j < width; j += 16) {
            const __m512 bounds = _mm512_loadu_ps(lower + j);
            for (unsigned mask = _mm512_cmp_ps_mask(bounds, upper, _CMP_LE_OQ); mask != 0; mask &= mask - 1) {
                const int lane = __builtin_ctz(mask);
                if (left.count < kMost) {
                    left.column[left.count] = static_cast<int32_t>(column + j + lane);
                    left.lower[left.count] = lower[j + lane];
                }
                left.count += left.count <= kMost;
            }
        }
    }

    /// Takes the only centroid left, or the lowest of the best float scores; how many of those it took.
    int64_t conclude(const QuantisedRows& data, const QuantisedCentres& centres, const float* x, int64_t row, bool exact,
                     const Left& left, int64_t* label, float* gap) {
        const quantised::Quantised& how = data.how[row];
        const float unit = 2 * how.scale, square = (how.norm + how.residual) * (how.norm + how.residual);
        if (left.count == 1 || (!exact && left.count > 0)) {
            *label = exact ? left.column[0] : left.lowest();
            *gap = distance_gap(unit * left.upper, unit * left.second, square, centres.d);
            return 0;
        }
        const bool all = left.count == 0 || left.count > kMost;
        float best = __builtin_inff(), second = all ? best : unit * left.upper;  // those not left score above `upper`
        const int64_t count = all ? centres.k : left.count;
        const int64_t width = QuantisedRows::padded(centres.d);
        centre(x + row * centres.d, centres);
        *label = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t column = all ? i : left.column[i];
            const float score = centres.squares[column] - 2 * dot(centred_, centres.centred + column * width, width);
            const float larger = score < best ? best : score;
            second = larger < second ? larger : second;
            if (score < best) best = score, *label = column;
        }
        *gap = distance_gap(best, second, square, centres.d);
        return count;
    }

    void centre(const float* __restrict x, const QuantisedCentres& centres) {
        const float* __restrict shift = centres.shift;
        float* __restrict v = centred_;
        for (int64_t j = 0; j < centres.d; ++j) v[j] = x[j] - shift[j];
    }

    static float dot(const float* v, const float* w, int64_t width) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        int64_t j = 0;
        for (; j + 32 <= width; j += 32) {
            even = _mm512_fmadd_ps(_mm512_loadu_ps(v + j), _mm512_loadu_ps(w + j), even);
            odd = _mm512_fmadd_ps(_mm512_loadu_ps(v + j + 16), _mm512_loadu_ps(w + j + 16), odd);
        }
        if (j < width) even = _mm512_fmadd_ps(_mm512_loadu_ps(v + j), _mm512_loadu_ps(w + j), even);
        return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
    }

    float* lower_;
    float* centred_;     // (padded D) the row that is scored
    uint8_t* gathered_;  // a packed group
    Left* left_;
};

#endif

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

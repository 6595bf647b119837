// Nearest centroids through 8-bit products, each certified: a label is taken from them only where no other centroid's score
// can be higher, given the bounds of quantisation and rounding; between two that are left, float scores decide.
//
// In units of scale_x scale_c, where one scale_c serves all centroids, the score x.c_k - |c_k|^2 / 2 is
//     t_k = q_x.q_k - h_k / scale_x,   h_k = |c_k|^2 / (2 scale_c),
// and is off by at most  E = (|x - x~| max |c| + |x~| max |c - c~|) / (scale_x scale_c)  and rounding. E is one number per row,
// so the three highest t of a row are nearly all there is to keep of it: whatever lies more than E below the exact score of the
// first is ruled out. Where that leaves more than two, a second look at the products, which are kept, finds them.
//
// Rows are the lanes of a vector and centroids come one by one, so that nothing is ever reduced across lanes. A score's lowest
// bits hold its centroid's index, which makes keeping the highest three a matter of five minima and maxima.
#pragma once

#include <type_traits>

#include "common/quantised.h"
#include "kmeans/nearest.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

namespace quantised = fastclust::quantised::FASTCLUST_CAPABILITY;

template <class T>
constexpr bool kCertifies = quantised::kAvailable && std::is_same_v<T, float>;

/// Below this depth the float products cost no more than the bounds.
constexpr int64_t kLeastDepth = 16;

inline int64_t padded_depth(int64_t d) {
    return (d + 15) / 16 * 16;
}

/// The rows of one problem, less the shift, quantised once for all its passes, each with its own scale.
struct QuantisedRows {
    int64_t n, d, steps;        // of four features
    uint8_t* panels;            // quantised.h, signed
    int32_t* starts;            // (N)
    quantised::Quantised* how;  // (N)
    float* centred;             // one padded row per piece

    QuantisedRows(int64_t n_, int64_t d_, int pieces, const Context& context)
        : n(n_),
          d(d_),
          steps(quantised::steps(d_)),
          panels(context.scratch<uint8_t>((n_ + kLanes - 1) / kLanes * panel_bytes())),
          starts(context.scratch<int32_t>(n_)),
          how(context.scratch<quantised::Quantised>(n_)),
          centred(context.scratch<float>(pieces * padded_depth(d_))) {}

    static constexpr int64_t kLanes = quantised::kWidth;
    int64_t panel_bytes() const { return kLanes * 4 * steps; }
    uint8_t* panel_of(int64_t row) const { return panels + row / kLanes * panel_bytes(); }

    void prepare(int pieces, const float* x, const float* shift) {
        for_pieces(pieces, span_count(n), [&](int piece, int64_t first, int64_t last) {
            float* v = centred + piece * padded_depth(d);
            for (int64_t j = d; j < padded_depth(d); ++j) v[j] = 0;
            for (int64_t row = first * kSpanRows; first < last && row < span_end(last - 1, n); ++row) {
                for (int64_t j = 0; j < d; ++j) v[j] = x[row * d + j] - shift[j];
                uint8_t* lane = panel_of(row) + row % kLanes * 4;
                const float scale = quantised::scale_for(quantised::largest_magnitude(v, d));
                how[row] = quantised::quantise(v, d, scale, 0, lane, kLanes * 4, starts + row);
                starts[row] *= -128;
            }
        });
    }
};

/// Centroids ready for 8-bit products, and for float products one by one: all K, or those of `ids`.
struct QuantisedCentres {
    static constexpr int kGroup = quantised::group_rows(8);  // centroids of a tile

    int64_t k, d, steps;           // of four features
    const int64_t* ids = nullptr;  // (k) ascending, of the centroids that are here; null: all
    const float* shift;
    float* centred;                           // (K, padded D) c - shift
    float* squares;                           // (K) |c - shift|^2
    float* halves;                            // (K) h
    float* tops;                              // (K) the largest coordinate's magnitude, later |c - c~|
    uint8_t* groups;                          // quantised.h, unsigned, in groups of kGroup
    float scale = 1, norm = 0, residual = 0;  // of all: scale, max |c|, max |c - c~|

    QuantisedCentres(int64_t k_, int64_t d_, const float* shift_, const Context& context)
        : k(k_),
          d(d_),
          steps(quantised::steps(d_)),
          shift(shift_),
          centred(context.scratch<float>(k_ * padded_depth(d_))),
          squares(context.scratch<float>(k_)),
          halves(context.scratch<float>(k_)),
          tops(context.scratch<float>(k_)),
          groups(context.scratch<uint8_t>((k_ + kGroup - 1) / kGroup * group_bytes())) {}

    int64_t group_bytes() const { return kGroup * 4 * steps; }
    uint8_t* group_of(int64_t column) const { return groups + column / kGroup * group_bytes(); }
    const float* row(int64_t column) const { return centred + column * padded_depth(d); }
    int64_t id(int64_t column) const { return ids == nullptr ? column : ids[column]; }

    void prepare(int pieces, const float* centroids, const int64_t* ids_, int64_t count) {
        ids = ids_, k = count;
        prepare(pieces, centroids);
    }

    void prepare(int pieces, const float* centroids) {
        for_pieces(pieces, k, [&](int, int64_t first, int64_t last) {
            for (int64_t column = first; column < last; ++column) centre(centroids + id(column) * d, column);
        });
        float top = 0, square = 0;
        for (int64_t column = 0; column < k; ++column) {
            top = tops[column] > top ? tops[column] : top;
            square = squares[column] > square ? squares[column] : square;
        }
        scale = quantised::scale_for(top);
        norm = __builtin_sqrtf(square) * 1.000001f;
        for_pieces(pieces, k, [&](int, int64_t first, int64_t last) {
            for (int64_t column = first; column < last; ++column) {
                int32_t sum;
                uint8_t* codes = group_of(column) + column % kGroup * quantised::row_stride(steps) * 4;
                tops[column] =
                    quantised::quantise(row(column), d, scale, 128, codes, quantised::step_stride(kGroup) * 4, &sum).residual;
                halves[column] = squares[column] / (2 * scale);
            }
        });
        residual = 0;
        for (int64_t column = 0; column < k; ++column) residual = tops[column] > residual ? tops[column] : residual;
    }

   private:
    void centre(const float* c, int64_t column) {
        float* v = centred + column * padded_depth(d);
        double square = 0;
        for (int64_t j = 0; j < padded_depth(d); ++j) v[j] = j < d ? c[j] - shift[j] : 0;
        for (int64_t j = 0; j < d; ++j) square += static_cast<double>(v[j]) * v[j];
        squares[column] = static_cast<float>(square);
        tops[column] = quantised::largest_magnitude(v, d);
    }
};

/// Finds the nearest centroids of one block at a time; one per piece, since it holds the buffers.
template <class T>
class CertifiedAssigner;

#if defined(__AVX512VNNI__)

template <>
class CertifiedAssigner<float> {
   public:
    CertifiedAssigner(int64_t k, int64_t d, const Context& context)
        : staged_(context.scratch<int32_t>(kStagedLanes * quantised::steps(d))),
          products_(context.scratch<int32_t>((k + QuantisedCentres::kGroup) * kBlockRows)),
          centred_(context.scratch<float>(kBlockRows * padded_depth(d))) {
        for (int64_t i = 0; i < kStagedLanes * quantised::steps(d); ++i) staged_[i] = 0;
        for (int64_t i = 0; i < kBlockRows * padded_depth(d); ++i) centred_[i] = 0;
    }

    /// The nearest of `centres` for rows[0 .. count), ascending; how many float scores, of rows of `all`, it took to be certain
    /// of them. Without `exact` it takes none: the best 8-bit score decides. Scores found here are upper bounds.
    int64_t assign(const QuantisedRows& data, const QuantisedCentres& centres, const QuantisedCentres& all, const float* x,
                   const int64_t* rows, int64_t count, bool exact, const Nearest<float>& nearest) {
        const quantised::Multiplier multiplier(data.steps);
        int64_t scored = 0;
        for (int64_t first = 0; first < count; first += kBlockRows) {
            const int64_t size = count - first < kBlockRows ? count - first : kBlockRows;
            stage(data, rows + first, size);
            prefetch(data, centres, x, rows + first, size, count - first - size);
            keep_highest(centres, size);
            bound(data, centres, rows + first, size);
            if (nearest.standing)
                scored += challenge(centres, all, x, rows + first, size, nearest.from(first));
            else
                scored += conclude(centres, x, rows + first, size, exact, nearest.from(first));
        }
        return scored;
    }

   private:
    static constexpr int64_t kLanes = quantised::kWidth;
    static constexpr int64_t kStagedLanes = kBlockRows + kLanes;  // the last compressed store reaches beyond the block
    static constexpr int kIndexBits = 10;
    static constexpr int64_t kChunk = 1 << kIndexBits;  // centroids whose indices a score's lowest bits can tell apart
    static constexpr float kNone = -3e38f;
    static_assert(kBlockRows == 3 * kLanes);

    /// The block's rows side by side: where they stand if nothing lies between them, else each step of a source panel is one
    /// compressed store.
    void stage(const QuantisedRows& data, const int64_t* rows, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            starts_[i] = data.starts[rows[i]];
            inverses_[i] = 1 / data.how[rows[i]].scale;
            for (int t = 0; t < 3; ++t) best_[t][i] = kNone;
        }
        if (rows[0] % kLanes == 0 && rows[count - 1] - rows[0] == count - 1) {
            codes_ = {data.panel_of(rows[0]), kLanes * 4, data.panel_bytes()};
            return;
        }
        codes_ = {reinterpret_cast<const uint8_t*>(staged_), kStagedLanes * 4, kLanes * 4};
        for (int64_t i = 0, filled = 0; i < count; filled = i) {
            const auto* from = reinterpret_cast<const int32_t*>(data.panel_of(rows[i]));
            const int64_t end = rows[i] / kLanes * kLanes + kLanes;
            unsigned lanes = 0;
            for (; i < count && rows[i] < end; ++i) lanes |= 1U << rows[i] % kLanes;
            for (int64_t step = 0; step < data.steps; ++step)
                _mm512_storeu_si512(
                    staged_ + step * kStagedLanes + filled,
                    _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), _mm512_loadu_si512(from + step * kLanes)));
        }
    }

    /// What is read after the products: the codes of the next rows and, where many needed them last time, the rows themselves.
    void prefetch(const QuantisedRows& data, const QuantisedCentres& centres, const float* x, const int64_t* rows,
                  int64_t count, int64_t following) const {
        const int64_t next = following < kBlockRows ? following : kBlockRows;
        const uint8_t* panel = nullptr;
        for (int64_t i = count; i < count + next; ++i) {
            if (data.panel_of(rows[i]) == panel) continue;
            panel = data.panel_of(rows[i]);
            for (int64_t byte = 0; byte < data.panel_bytes(); byte += 64) __builtin_prefetch(panel + byte);
        }
        if (4 * open_count_ < count) return;
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < centres.d; j += 16) __builtin_prefetch(x + rows[i] * centres.d + j);
    }

    /// The three highest scores of each staged row, to best_.
    void keep_highest(const QuantisedCentres& centres, int64_t count) {
        for (int64_t first = 0; first < centres.k; first += kChunk) {
            const int64_t last = first + kChunk < centres.k ? first + kChunk : centres.k;
            if (count <= kLanes)
                keep_highest<1>(centres, first, last);
            else if (count <= 2 * kLanes)
                keep_highest<2>(centres, first, last);
            else
                keep_highest<3>(centres, first, last);
            merge(first, count);
        }
    }

    /// The same among centroids [first, last), to highest_.
    template <int Panels>
    void keep_highest(const QuantisedCentres& centres, int64_t first, int64_t last) {
        for (auto& of_lanes : highest_)
            for (int64_t i = 0; i < Panels * kLanes; ++i) of_lanes[i] = kNone;
        for (int64_t column = first; column < last; column += QuantisedCentres::kGroup) {
            const int64_t size = last - column < QuantisedCentres::kGroup ? last - column : QuantisedCentres::kGroup;
            int32_t* products = products_ + column * kBlockRows;
            multiply_group<Panels>(centres.group_of(column), size, centres.steps, products);
            for (int panel = 0; panel < Panels; ++panel)
                keep_group(products + panel * kLanes, centres.halves + column, static_cast<int32_t>(column - first), size,
                           panel * kLanes);
        }
    }

    template <int Panels>
    void multiply_group(const uint8_t* group, int64_t size, int64_t steps, int32_t* out) {
        constexpr int kGroup = QuantisedCentres::kGroup;
        if (size == kGroup || quantised::kTiles)
            return quantised::multiply_tile<kGroup, kGroup, Panels>(group, codes_.panels, codes_.step_bytes, codes_.panel_bytes,
                                                                    steps, starts_, out, kBlockRows);
        if constexpr (!quantised::kTiles)
            for (int64_t row = 0; row < size; row += 2)  // an odd last one takes along what lies beside it
                quantised::multiply_tile<2, kGroup, Panels>(group + row * 4, codes_.panels, codes_.step_bytes,
                                                            codes_.panel_bytes, steps, starts_, out + row * kBlockRows,
                                                            kBlockRows);
    }

    /// The scores of 16 rows with one centroid.
    static __m512 scores(const int32_t* products, float half, __m512 inverse) {
        return _mm512_fnmadd_ps(_mm512_set1_ps(half), inverse, _mm512_cvtepi32_ps(_mm512_loadu_si512(products)));
    }

    void keep_group(const int32_t* products, const float* halves, int32_t index, int64_t size, int64_t lane) {
        const __m512 inverse = _mm512_loadu_ps(inverses_ + lane);
        const __m512i index_bits = _mm512_set1_epi32(kChunk - 1);
        __m512 highest = _mm512_loadu_ps(highest_[0] + lane), second = _mm512_loadu_ps(highest_[1] + lane),
               third = _mm512_loadu_ps(highest_[2] + lane);
        for (int64_t i = 0; i < size; ++i) {
            const __m512 score = scores(products + i * kBlockRows, halves[i], inverse);
            const __m512i own = _mm512_set1_epi32(index + static_cast<int32_t>(i));
            constexpr int kSelect = 0xCA;  // of three bits a, b, c: a ? b : c
            const __m512 tagged =
                _mm512_castsi512_ps(_mm512_ternarylogic_epi32(index_bits, own, _mm512_castps_si512(score), kSelect));
            const __m512 lower = _mm512_min_ps(tagged, highest);
            highest = _mm512_max_ps(tagged, highest);
            third = _mm512_max_ps(third, _mm512_min_ps(lower, second));
            second = _mm512_max_ps(second, lower);
        }
        _mm512_storeu_ps(highest_[0] + lane, highest);
        _mm512_storeu_ps(highest_[1] + lane, second);
        _mm512_storeu_ps(highest_[2] + lane, third);
    }

    /// highest_, of the chunk of centroids from `first` on, joins best_.
    void merge(int64_t first, int64_t count) {
        for (const auto& of_lanes : highest_)
            for (int64_t i = 0; i < count; ++i) {
                float score = of_lanes[i];
                int32_t bits;
                __builtin_memcpy(&bits, &score, 4);
                auto index = static_cast<int32_t>(first) + (bits & static_cast<int32_t>(kChunk - 1));
                for (int t = 0; t < 3; ++t) {
                    const bool higher = score > best_[t][i];
                    const float lower = higher ? best_[t][i] : score;
                    const int32_t lower_index = higher ? index_[t][i] : index;
                    best_[t][i] = higher ? score : best_[t][i];
                    index_[t][i] = higher ? index : index_[t][i];
                    score = lower, index = lower_index;
                }
            }
    }

    /// How far each row's scores may be off.
    void bound(const QuantisedRows& data, const QuantisedCentres& centres, const int64_t* rows, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const quantised::Quantised& how = data.how[rows[i]];
            // Rounding: the tag replaces a score's last bits; the score itself took three roundings, a float score d more.
            const float rounding = 1.0f / (1 << (23 - kIndexBits)) + 1.2e-7f * static_cast<float>(2 * centres.d + 64);
            const float length = how.norm + how.residual;
            const float error =
                how.residual * centres.norm + how.norm * centres.residual + rounding * centres.norm * (length + centres.norm);
            units_[i] = how.scale * centres.scale;
            bounds_[i] = 1.00001f * error / units_[i];
            squares_[i] = length * length;
        }
        for (int64_t i = 0; i < kBlockRows; ++i) least_[i] = __builtin_inff();
    }

    /// |c|^2 - 2 x.c of what scores at most t, its bound included: at least that.
    float beyond(int64_t i, float t) const { return -2 * units_[i] * (t + bounds_[i]); }

    /// From best_; where the bound leaves more than one centroid, from float scores.
    int64_t conclude(const QuantisedCentres& centres, const float* x, const int64_t* rows, int64_t count, bool exact,
                     const Nearest<float>& nearest) {
        for (int64_t i = 0; i < count; ++i) {
            nearest.labels[i] = index_[0][i];
            nearest.scores[i] = -2 * units_[i] * (best_[0][i] - bounds_[i]);
            farther_[i] = beyond(i, best_[1][i]);
        }
        const int64_t scored = exact ? settle(centres, x, rows, count, nearest) : 0;
        for (int64_t i = 0; i < count; ++i)
            nearest.gaps[i] = distance_gap(nearest.scores[i], farther_[i], squares_[i], centres.d);
        return scored;
    }

    /// Float scores for the rows whose second score lies within twice the bound of the first, or which have no bound.
    int64_t settle(const QuantisedCentres& centres, const float* x, const int64_t* rows, int64_t count,
                   const Nearest<float>& nearest) {
        int64_t scored = 0;
        open_count_ = 0;
        for (int64_t i = 0; i < count; ++i) leave_open(i, !(best_[1][i] < best_[0][i] - 2 * bounds_[i]));
        for (int64_t o = 0; o < open_count_; ++o, ++scored) {
            const int64_t i = fetch_open(o, centres, x, rows);
            const int64_t other = index_[1][i];
            const float value = score(centres, i, index_[0][i]), least = value / (-2 * units_[i]) - bounds_[i];
            nearest.scores[i] = value;
            if (best_[1][i] < least) continue;
            if (best_[2][i] < least) {
                farther_[i] = beyond(i, best_[2][i]);
                join(score(centres, i, other), other, i, nearest);
                ++scored;
            } else {
                look_again(i, least);
                nearest.scores[i] = __builtin_inff();
            }
        }
        return scored + score_possible(centres, nearest);
    }

    /// The nearest so far against centroids that have moved.
    int64_t challenge(const QuantisedCentres& centres, const QuantisedCentres& all, const float* x, const int64_t* rows,
                      int64_t count, const Nearest<float>& nearest) {
        int64_t scored = 0;
        open_count_ = 0;
        for (int64_t i = 0; i < count; ++i) {
            farther_[i] = beyond(i, best_[0][i]);
            leave_open(i, !(best_[0][i] < nearest.scores[i] / (-2 * units_[i]) - bounds_[i]));
        }
        for (int64_t o = 0; o < open_count_; ++o, ++scored) {
            const int64_t i = fetch_open(o, centres, x, rows);
            nearest.scores[i] = score(all, i, nearest.labels[i]);
            const float least = nearest.scores[i] / (-2 * units_[i]) - bounds_[i];
            if (!(best_[0][i] < least)) look_again(i, least);
        }
        scored += score_possible(centres, nearest);
        for (int64_t i = 0; i < count; ++i) {
            const float gap = distance_gap(nearest.scores[i], farther_[i], squares_[i], centres.d);
            nearest.gaps[i] = gap < nearest.gaps[i] ? gap : nearest.gaps[i];
        }
        return scored;
    }

    /// Has score_possible score what reaches `least`; nothing else is nearer than that.
    void look_again(int64_t i, float least) {
        farther_[i] = beyond(i, least);
        least_[i] = least == least ? least : -__builtin_inff();
    }

    /// Scores the centroids that reach least_, all of a row where that is -inf.
    int64_t score_possible(const QuantisedCentres& centres, const Nearest<float>& nearest) {
        int64_t scored = 0;
        for (int64_t lane = 0; lane < kBlockRows; lane += kLanes) {
            const __m512 inverse = _mm512_loadu_ps(inverses_ + lane), least = _mm512_loadu_ps(least_ + lane);
            const __mmask16 open = _mm512_cmp_ps_mask(least, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
            if (open == 0) continue;
            for (int64_t column = 0; column < centres.k; ++column) {
                const __m512 score_of = scores(products_ + column * kBlockRows + lane, centres.halves[column], inverse);
                unsigned possible = _mm512_mask_cmp_ps_mask(open, score_of, least, _CMP_NLT_UQ);
                for (; possible != 0; possible &= possible - 1, ++scored) {
                    const int64_t i = lane + __builtin_ctz(possible);
                    join(score(centres, i, column), centres.id(column), i, nearest);
                }
            }
        }
        return scored;
    }

    /// A float score of lane i joins those it has: the lowest counts, the lower label of equals.
    void join(float value, int64_t label, int64_t i, const Nearest<float>& nearest) {
        float& score = nearest.scores[i];
        const bool nearer = value < score || (value == score && label < nearest.labels[i]);
        const float larger = nearer ? score : value;
        farther_[i] = larger < farther_[i] ? larger : farther_[i];
        if (nearer) score = value, nearest.labels[i] = label;
    }

    void leave_open(int64_t i, bool open) {
        open_[open_count_] = static_cast<int32_t>(i);
        open_count_ += open;
    }

    /// Has the o-th open row centred, and those after it on their way: they lie apart in memory. Gives its lane.
    int64_t fetch_open(int64_t o, const QuantisedCentres& centres, const float* x, const int64_t* rows) {
        constexpr int64_t kAhead = 4;
        for (int64_t next = o == 0 ? 1 : o + kAhead; next <= o + kAhead && next < open_count_; ++next)
            for (int64_t j = 0; j < centres.d; j += 16) __builtin_prefetch(x + rows[open_[next]] * centres.d + j);
        centre(x + rows[open_[o]] * centres.d, centres, open_[o]);
        return open_[o];
    }

    void centre(const float* __restrict x, const QuantisedCentres& centres, int64_t i) {
        const float* __restrict shift = centres.shift;
        float* __restrict v = centred_ + i * padded_depth(centres.d);
        for (int64_t j = 0; j < centres.d; ++j) v[j] = x[j] - shift[j];
    }

    /// |c|^2 - 2 x.c of lane i.
    float score(const QuantisedCentres& centres, int64_t i, int64_t column) const {
        const int64_t width = padded_depth(centres.d);
        const float *v = centred_ + i * width, *w = centres.row(column);
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        int64_t j = 0;
        for (; j + 32 <= width; j += 32) {
            even = _mm512_fmadd_ps(_mm512_loadu_ps(v + j), _mm512_loadu_ps(w + j), even);
            odd = _mm512_fmadd_ps(_mm512_loadu_ps(v + j + 16), _mm512_loadu_ps(w + j + 16), odd);
        }
        if (j < width) even = _mm512_fmadd_ps(_mm512_loadu_ps(v + j), _mm512_loadu_ps(w + j), even);
        return centres.squares[column] - 2 * _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
    }

    struct {
        const uint8_t* panels;
        int64_t step_bytes, panel_bytes;
    } codes_{};                     // of the block's rows
    int32_t* staged_;               // (steps, kStagedLanes) them, where they do not stand together
    int32_t* products_;             // (K and the rest of its last group, kBlockRows)
    float* centred_;                // (kBlockRows, padded D) the rows that float scores are taken of
    int32_t open_[kBlockRows + 1];  // lanes whose bound leaves more than one centroid
    int64_t open_count_ = 0;        // of the last block
    int32_t starts_[kBlockRows] = {};
    float inverses_[kBlockRows] = {};
    float highest_[3][kBlockRows];  // of a chunk, tagged with the index in it
    float best_[3][kBlockRows];     // of all chunks so far
    int32_t index_[3][kBlockRows];
    float units_[kBlockRows], bounds_[kBlockRows], squares_[kBlockRows];  // of the scores; E; |x|^2
    float farther_[kBlockRows];  // |c|^2 - 2 x.c of every centroid but the nearest, at least
    float least_[kBlockRows];    // the score that makes a centroid possible
};

#endif

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

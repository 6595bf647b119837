// The rows and the centroids of one k-means problem in 8 bits (quantised.h), less the shift.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/quantised_panel.h"
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

/// Row x (d) less the shift, padded with zeros.
inline void centre_row(const float* __restrict x, const float* __restrict shift, int64_t d, float* __restrict v) {
    for (int64_t j = 0; j < d; ++j) v[j] = x[j] - shift[j];
    for (int64_t j = d; j < padded_depth(d); ++j) v[j] = 0;
}

/// The rows of one problem, less the shift, quantised once for all its passes, each with its own scale.
struct QuantisedRows {
    static constexpr int64_t kLanes = quantised::kWidth;

    int64_t n, d, steps;            // of four features
    uint8_t* panels;                // quantised.h, signed
    quantised::QuantisedLanes how;  // (N, and the rest of the last panel)
    float* centred;                 // one panel of padded rows per piece
    float* kept;                    // (N and the rest of the last panel, padded D) room for
    const float* sorted = nullptr;  // the rows less the shift; null where they stand in their own order, and are not kept

    QuantisedRows(int64_t n_, int64_t d_, bool sorts, int pieces, const Context& context)
        : n(n_),
          d(d_),
          steps(quantised::steps(d_)),
          panels(context.scratch<uint8_t>(panel_count() * panel_bytes())),
          how{context.scratch<float>(panel_count() * kLanes), context.scratch<float>(panel_count() * kLanes),
              context.scratch<float>(panel_count() * kLanes), context.scratch<int32_t>(panel_count() * kLanes)},
          centred(context.scratch<float>(pieces * kLanes * padded_depth(d_))),
          kept(sorts ? context.scratch<float>(panel_count() * kLanes * padded_depth(d_)) : nullptr) {}

    int64_t panel_count() const { return (n + kLanes - 1) / kLanes; }
    int64_t panel_bytes() const { return kLanes * 4 * steps; }
    uint8_t* panel_of(int64_t row) const { return panels + row / kLanes * panel_bytes(); }

    /// Row i, less the shift where that is kept.
    const float* vector(const float* x, int64_t i) const {
        return sorted == nullptr ? x + i * d : sorted + i * padded_depth(d);
    }

    /// How row i was quantised.
    quantised::Quantised quantised_row(int64_t i) const { return {how.scales[i], how.norms[i], how.residuals[i]}; }

    /// At least |x_i|.
    float length(int64_t i) const { return how.norms[i] + how.residuals[i]; }

    /// Takes in the rows of x in the order given, which is kept with them, or their own.
    void prepare(int pieces, const float* x, const float* shift, const int64_t* order);
};

#if defined(__AVX512VNNI__)

inline void QuantisedRows::prepare(int pieces, const float* x, const float* shift, const int64_t* order) {
    const int64_t width = padded_depth(d);
    sorted = order == nullptr ? nullptr : kept;
    for_pieces(pieces, panel_count(), [&](int piece, int64_t first_panel, int64_t last_panel) {
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            const int64_t first = panel * kLanes;
            float* v = order == nullptr ? centred + piece * kLanes * width : kept + first * width;
            for (int64_t i = first; i < first + kLanes; ++i)
                if (i < n)
                    centre_row(x + (order == nullptr ? i : order[i]) * d, shift, d, v + (i - first) * width);
                else
                    std::fill_n(v + (i - first) * width, width, 0.0F);
            quantised::quantise_panel(v, width, steps, panels + panel * panel_bytes(),
                                      {how.scales + first, how.norms + first, how.residuals + first, how.starts + first});
        }
    });
}

#endif

/// Centroids ready for 8-bit products, and for float products one by one: all K, or those of `ids`.
struct QuantisedCentres {
    static constexpr int kGroup = quantised::group_rows(8);  // centroids of a tile

    int64_t k, d, steps;               // of four features
    const int64_t* ids = nullptr;      // (k) of the centroids that are here; null: all in order
    const int32_t* columns = nullptr;  // (k) the column of each where all are here; null: in order
    const float* shift;
    float* centred;                           // (K, padded D) c - shift
    float* squares;                           // (K) |c - shift|^2
    float* halves;                            // (K) h
    float* tops;                              // (K) the largest coordinate's magnitude, later |c - c~|
    uint8_t* codes;                           // quantised.h, unsigned, in groups of kGroup
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
          codes(context.scratch<uint8_t>(groups(k_) * group_bytes())) {}

    int64_t group_bytes() const { return kGroup * 4 * steps; }
    uint8_t* group_of(int64_t column) const { return codes + column / kGroup * group_bytes(); }
    const float* row(int64_t column) const { return centred + column * padded_depth(d); }
    int64_t id(int64_t column) const { return ids == nullptr ? column : ids[column]; }
    int64_t column(int64_t id) const { return columns == nullptr ? id : columns[id]; }
    static int64_t groups(int64_t k) { return (k + kGroup - 1) / kGroup; }

    /// How many centroids `count` groups of them hold, ascending.
    int64_t columns_of(const int32_t* of_groups, int64_t count) const {
        const int64_t missing = count > 0 && of_groups[count - 1] == groups(k) - 1 ? groups(k) * kGroup - k : 0;
        return count * kGroup - missing;
    }

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
                uint8_t* lane = group_of(column) + column % kGroup * quantised::row_stride(steps) * 4;
                tops[column] =
                    quantised::quantise(row(column), d, scale, 128, lane, quantised::step_stride(kGroup) * 4, &sum).residual;
                halves[column] = squares[column] / (2 * scale);
            }
        });
        residual = 0;
        for (int64_t column = 0; column < k; ++column) residual = tops[column] > residual ? tops[column] : residual;
    }

   private:
    void centre(const float* c, int64_t column) {
        float* v = centred + column * padded_depth(d);
        centre_row(c, shift, d, v);
        EightDoubles square = {};
        for (int64_t j = 0; j < padded_depth(d); j += 8) {
            EightDoubles eight;
            widen(v + j, eight);
            square += eight * eight;
        }
        squares[column] = static_cast<float>(fastclust::lanes::FASTCLUST_CAPABILITY::sum(square));
        tops[column] = quantised::largest_magnitude(v, d);
    }
};

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

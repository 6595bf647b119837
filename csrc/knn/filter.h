// A filter scores many rows against many columns cheaply and says how far it can be off: for every pair
//     score(i, j) <= products(i, j) + bias_i + bias_j <= score(i, j) + drop_i + drop_j           (in units of `unit`)
// so that what stays below a bound certainly does not reach it, and what is that much above it certainly does.
//
// With z = x - centre, both scores are z_i . z_j + g_i + g_j exactly: g = centre . x - |centre|^2 / 2 for the products, -|z|^2
// / 2 for the euclidean score. The filter multiplies codes z~ of z with |z - z~| = delta, hence, for any c > 0,
//     |z_i . z_j - z~_i . z~_j| <= |z_i| delta_j + delta_i |z~_j| <= e_i + e_j,   e = c max(|z|, |z~|)^2 / 2 + delta^2 / 2c,
// with equality where all rows have the same norm and residual and c is their ratio. bias = g + e, rounded up.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/parallel.h"
#include "common/products.h"
#include "common/quantised.h"
#include "knn/buffer.h"
#include "knn/rows.h"
#include "knn/scan.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

/// Rows multiplied at a time: whole tiles of products.h and of quantised.h.
constexpr int64_t kStrip = fastclust::quantised::FASTCLUST_CAPABILITY::kTiles ? 48 : 24;

inline int64_t round_up(int64_t count, int64_t multiple) {
    return (count + multiple - 1) / multiple * multiple;
}

/// The mean of some rows: near the data, which is all that the filter's precision asks of it.
template <class T>
inline const T* sample_centre(const Rows<T>& rows, const Context& context) {
    constexpr int64_t kSample = 4096;
    T* centre = context.scratch<T>(rows.depth);
    double* sums = context.scratch<double>(rows.depth);
    for (int64_t j = 0; j < rows.depth; ++j) sums[j] = 0;
    const int64_t step = rows.count / kSample + 1, samples = (rows.count + step - 1) / step;
    for (int64_t i = 0; i < rows.count; i += step)
        for (int64_t j = 0; j < rows.depth; ++j) sums[j] += rows.row(i)[j];
    for (int64_t j = 0; j < rows.depth; ++j) centre[j] = static_cast<T>(sums[j] / static_cast<double>(samples));
    return centre;
}

/// What one row adds to every score it takes part in.
struct RowTerms {
    double constant;  // g
    double rounding;  // its share of what rounding can do to the exact score
};

/// `z` holds x - centre.
template <class T>
inline RowTerms row_terms(Metric metric, const T* x, const T* z, const T* centre, int64_t depth, double centre_square) {
    const double gamma = static_cast<double>(depth + 8) * std::numeric_limits<T>::epsilon() / 2;
    double x_square = 0, z_square = 0, along = 0;
    for (int64_t j = 0; j < depth; ++j) {
        x_square += static_cast<double>(x[j]) * x[j];
        z_square += static_cast<double>(z[j]) * z[j];
        along += static_cast<double>(centre[j]) * x[j];
    }
    if (metric == Metric::euclidean) return {-z_square / 2, gamma * z_square};
    return {along - centre_square / 2, gamma * x_square / 2 + gamma * z_square};
}

/// The filter of single-precision products: its error is rounding alone. Its columns come in whole groups, the last filled up
/// with rows that reach no bound.
template <class T>
struct FloatFilter {
    using Score = float;
    using Code = float;
    struct Multiplier {
        explicit Multiplier(int64_t) {}
    };
    static constexpr float kNever = -std::numeric_limits<float>::infinity();  // the bias of a row that is not there
    static constexpr float kLowest = std::numeric_limits<float>::lowest();    // a bound that every row reaches
    static constexpr int64_t kWidth = products::kWidth<float>;

    Rows<T> rows;
    const int32_t* order;  // which row stands at a position
    const T* centre;
    double centre_square;
    int64_t words;  // of a code
    float* panels;  // products.h
    float* bias;    // (padded)
    float* drop;    // (padded)
    static constexpr double unit = 1;

    static int64_t bytes_per_row(int64_t depth) { return depth * static_cast<int64_t>(sizeof(float)); }
    /// A score that is certainly no more than `exact`.
    static float at_most(T exact) {
        const auto nearest = static_cast<float>(exact);
        return nearest - 2 * std::numeric_limits<float>::epsilon() * std::fabs(nearest);
    }
    int64_t padded() const { return round_up(rows.count, kGroup); }
    int64_t strip_size() const { return products::packed_rows_size<float>(kStrip, rows.depth); }

    FloatFilter(Metric metric, const Rows<T>& rows_in, const int32_t* order_in, const T* centre_in, bool with_panels,
                const Context& context)
        : rows(rows_in), order(order_in), centre(centre_in), centre_square(0), words(rows_in.depth) {
        for (int64_t j = 0; j < rows.depth; ++j) centre_square += static_cast<double>(centre[j]) * centre[j];
        bias = context.scratch<float>(padded());
        drop = context.scratch<float>(padded());
        panels = with_panels ? context.scratch<float>(padded() * rows.depth) : nullptr;
        parallel_for(0, padded() / kGroup, 4096 / (rows.depth * kGroup) + 1, [&](int64_t begin, int64_t end) {
            const Buffer<T> z(rows.depth);
            const Buffer<float> group(kGroup * rows.depth);
            for (int64_t g = begin; g < end; ++g) pack_group(metric, g * kGroup, z.data, group.data);
        });
    }

    /// `strip` (strip_size()) becomes the rows at `positions`.
    void load(const int32_t* positions, int64_t count, float* strip, float* staging) const {
        for (int64_t r = 0; r < count; ++r) {
            const T* x = rows.row(order[positions[r]]);
            for (int64_t j = 0; j < rows.depth; ++j) staging[r * rows.depth + j] = static_cast<float>(x[j] - centre[j]);
        }
        products::pack_rows<float>(staging, count, rows.depth, rows.depth, nullptr, strip);
    }

    /// out[r * columns + c]: the first `count` rows of a strip of them times the columns at [first, first + columns), plus the
    /// columns' biases.
    void multiply(const float* strip, int64_t count, int64_t first, int64_t columns, float* out) const {
        products::multiply<float>(strip, count, count, rows.depth, panels + first * rows.depth, columns / kWidth, out, columns);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t c = 0; c < columns; ++c) out[r * columns + c] += bias[first + c];
    }

   private:
    void pack_group(Metric metric, int64_t first, T* z, float* group) {
        constexpr double kUlp = std::numeric_limits<float>::epsilon() / 2;
        const int64_t depth = rows.depth;
        for (int64_t lane = 0; lane < kGroup; ++lane) {
            const int64_t position = first + lane;
            float* code = group + lane * depth;
            if (position >= rows.count) {
                for (int64_t j = 0; j < depth; ++j) code[j] = 0;
                bias[position] = kNever;
                drop[position] = 0;
                continue;
            }
            const T* x = rows.row(order[position]);
            double square = 0;
            for (int64_t j = 0; j < depth; ++j) {
                z[j] = x[j] - centre[j];
                code[j] = static_cast<float>(z[j]);
                square += static_cast<double>(code[j]) * code[j];
            }
            const RowTerms terms = row_terms(metric, x, z, centre, depth, centre_square);
            // Coding, the chain of multiply-adds and the two additions of a bias round; 1e-37 is for what is subnormal.
            const double products_rounding = static_cast<double>(depth + 8) * kUlp * square;
            const double error = products_rounding + terms.rounding + 8 * kUlp * (square + std::fabs(terms.constant)) + 1e-37;
            const double upper = terms.constant + error;
            bias[position] = static_cast<float>(upper + 4 * kUlp * std::fabs(upper));
            drop[position] = static_cast<float>(2 * error + 16 * kUlp * std::fabs(upper));
        }
        if (panels != nullptr)
            products::pack_columns<float>(group, kGroup, depth, depth, 0, kGroup / kWidth, panels + first * depth);
    }
};

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

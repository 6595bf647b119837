// The filter of 8-bit products (filter.h tells the bound): z is rounded to multiples of one step for all rows, clipped where
// that leaves the smaller residuals; scores count in units of step^2, so tiles are compared as they come from the multiplier.
#pragma once

#include "common/quantised.h"

#if defined(__AVX512VNNI__)

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/parallel.h"
#include "knn/buffer.h"
#include "knn/filter.h"
#include "knn/rows.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

namespace quantised = fastclust::quantised::FASTCLUST_CAPABILITY;

constexpr float kMostCode = 127;

inline float code_of(float z, float inverse_step) {
    const float code = std::rint(z * inverse_step);
    return code > kMostCode ? kMostCode : code < -kMostCode ? -kMostCode : code;
}

/// What all rows are coded with.
struct Quantiser {
    float step;
    double ratio;  // of residual to norm, about: filter.h's c

    /// The step with the least squared residuals on these values.
    static Quantiser choose(const float* z, int64_t count) {
        constexpr float kClips[] = {2.5F, 3, 3.5F, 4, 4.5F, 5, 6, 8, 12, 20, 40};  // in root mean squares
        double square = 0;
        for (int64_t j = 0; j < count; ++j) square += static_cast<double>(z[j]) * z[j];
        const auto size = static_cast<float>(std::sqrt(square / static_cast<double>(count)));
        Quantiser best{1, 1};
        if (!(size > 1e-12F)) return best;
        double least = std::numeric_limits<double>::infinity();
        for (const float clip : kClips) {
            const float step = size * clip / kMostCode;
            double residual = 0;
            for (int64_t j = 0; j < count; ++j) {
                const float rest = z[j] - step * code_of(z[j], 1 / step);
                residual += static_cast<double>(rest) * rest;
            }
            if (residual >= least) continue;
            least = residual;
            best = {step, std::sqrt(residual / square) + 1e-6};
        }
        return best;
    }

    /// For the rows at some of the positions, less what `origin_of(position)` points to; where order is negative, none stands.
    template <class T, class Origin>
    static Quantiser choose(const Rows<T>& rows, const int32_t* order, int64_t positions, const Origin& origin_of) {
        constexpr int64_t kSample = 256;
        const int64_t every = positions / kSample + 1;
        int64_t count = 0;
        const Buffer<float> z((positions / every + 1) * rows.depth);
        for (int64_t i = 0; i < positions; i += every) {
            if (order[i] < 0) continue;
            const T* origin = origin_of(i);
            for (int64_t j = 0; j < rows.depth; ++j) z.data[count++] = static_cast<float>(rows.row(order[i])[j] - origin[j]);
        }
        return choose(z.data, count);
    }
};

template <class T>
struct Int8Filter {
    using Score = int32_t;
    using Code = uint32_t;  // four features
    using Multiplier = quantised::Multiplier;
    static constexpr int32_t kNever = -(1 << 30);
    static constexpr int32_t kLowest = -(1 << 29);
    static constexpr int64_t kMostDepth = 16384;  // products below 2^28
    static constexpr double kMostBias = 1 << 27;

    Rows<T> rows;
    const int32_t* order;
    const T* centre;
    Quantiser quantiser;
    double unit, centre_square = 0;
    int64_t words;     // of a code
    uint32_t* panels;  // quantised.h
    int32_t* starts;   // quantised.h (padded), plus bias
    int32_t* bias;
    int32_t* drop;
    bool usable = true;  // all rows are within the range of int32

    static int64_t bytes_per_row(int64_t depth) { return depth; }
    int64_t padded() const { return round_up(rows.count, kGroup); }
    int64_t strip_size() const { return kStrip * words; }
    int32_t at_most(T exact) const { return static_cast<int32_t>(std::floor(static_cast<double>(exact) / unit)) - 1; }

    Int8Filter(Metric metric, const Rows<T>& rows_in, const int32_t* order_in, const T* centre_in,
               const Quantiser& quantiser_in, bool exact, const Context& context)
        : rows(rows_in),
          order(order_in),
          centre(centre_in),
          quantiser(quantiser_in),
          unit(static_cast<double>(quantiser.step) * quantiser.step),
          words(quantised::steps(rows.depth)),
          panels(context.scratch<uint32_t>(padded() * words)),
          starts(context.scratch<int32_t>(padded())),
          bias(context.scratch<int32_t>(padded())),
          drop(context.scratch<int32_t>(padded())) {
        for (int64_t j = 0; j < rows.depth; ++j) centre_square += static_cast<double>(centre[j]) * centre[j];
        std::atomic<bool> within{true};
        parallel_for(0, padded(), 4096 / rows.depth + 1, [&](int64_t begin, int64_t end) {
            const Buffer<T> z(rows.depth);
            const Buffer<uint32_t> codes(words);
            for (int64_t position = begin; position < end; ++position)
                if (!pack(metric, exact, position, z.data, codes.data)) within.store(false, std::memory_order_relaxed);
        });
        usable = within.load();
    }

    /// Rows are columns plus 128, in groups; the last row stands in for those that a group lacks.
    void load(const int32_t* positions, int64_t count, uint32_t* strip, float*) const {
        for (int64_t r = 0; r < kStrip; ++r) {
            const uint32_t* from = column(positions[r < count ? r : count - 1]);
            uint32_t* out = strip + r / kTileRows * kTileRows * words + r % kTileRows * quantised::row_stride(words);
            for (int64_t w = 0; w < words; ++w)
                out[w * quantised::step_stride(kTileRows)] = from[w * quantised::kWidth] ^ kExcess;
        }
    }

    void multiply(const uint32_t* strip, int64_t count, int64_t first, int64_t columns, int32_t* out) const {
        constexpr int kPanels = quantised::kTiles ? 4 : 2;
        constexpr int64_t kTileColumns = kPanels * quantised::kWidth, kLineBytes = quantised::kWidth * 4;
        for (int64_t c = 0; c < columns; c += kTileColumns)
            for (int64_t r = 0; r < count; r += kTileRows)
                quantised::multiply_tile<kTileRows, kTileRows, kPanels>(
                    reinterpret_cast<const uint8_t*>(strip + r * words), reinterpret_cast<const uint8_t*>(column(first + c)),
                    kLineBytes, kLineBytes * words, words, starts + first + c, out + r * columns + c, columns);
    }

   private:
    static constexpr int kTileRows = quantised::group_rows(12);
    static constexpr uint32_t kExcess = 0x80808080U;  // 128 in each byte

    uint32_t* column(int64_t position) const {
        return panels + position / quantised::kWidth * quantised::kWidth * words + position % quantised::kWidth;
    }

    bool pack(Metric metric, bool exact, int64_t position, T* z, uint32_t* words_out) {
        const int64_t depth = rows.depth;
        for (int64_t w = 0; w < words; ++w) words_out[w] = 0;
        int32_t sum = 0;
        bias[position] = kNever;
        drop[position] = 0;
        bool within = true;
        if (position < rows.count) {
            const T* x = rows.row(order[position]);
            auto* codes = reinterpret_cast<signed char*>(words_out);
            double square = 0, code_square = 0, residual = 0;
            for (int64_t j = 0; j < depth; ++j) {
                z[j] = x[j] - centre[j];
                const float code = code_of(static_cast<float>(z[j]), 1 / quantiser.step);
                codes[j] = static_cast<signed char>(code);
                sum += static_cast<int32_t>(code);
                const double coded = static_cast<double>(quantiser.step) * code, rest = static_cast<double>(z[j]) - coded;
                square += static_cast<double>(z[j]) * z[j];
                code_square += coded * coded;
                residual += rest * rest;
            }
            const RowTerms terms = row_terms(metric, x, z, centre, depth, centre_square);
            const double norm = square > code_square ? square : code_square;
            double error = quantiser.ratio * norm / 2 + residual / (2 * quantiser.ratio);
            if (!exact) error /= 4;
            error += terms.rounding + 2 * std::numeric_limits<T>::epsilon() * norm;
            const double upper = std::ceil((terms.constant + error) / unit), slack = std::ceil(2 * error / unit) + 2;
            within = std::fabs(upper) < kMostBias && slack < kMostBias;
            bias[position] = within ? static_cast<int32_t>(upper) : 0;
            drop[position] = within ? static_cast<int32_t>(slack) : 0;
        }
        starts[position] = bias[position] - 128 * sum;
        uint32_t* out = column(position);
        for (int64_t w = 0; w < words; ++w) out[w * quantised::kWidth] = words_out[w];
        return within;
    }
};

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

#endif

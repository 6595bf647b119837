// A filter for rows in clusters: 8-bit products of their residuals e = x - c (their own cluster's centre), which may be cut
// short. With a and b the clusters of i and j, exactly
//     -|x_i - x_j|^2 / 2 = e_i . e_j - |x_i - c_b|^2 / 2 - |x_j - c_a|^2 / 2 + |c_a - c_b|^2 / 2
// All but the product is known beforehand, to each row for every cluster (its biases, which hold the error as well; filter.h
// tells what a filter promises). The products scores add |x_i|^2 / 2 + |x_j|^2 / 2.
//
// What the features beyond a cut add to the product is no more than half of both their squares (tails), so that the first
// features rule out most pairs of rows whose clusters are far apart.
#pragma once

#include "knn/residual_code.h"

#if defined(__AVX512VNNI__)

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/parallel.h"
#include "common/products.h"
#include "knn/buffer.h"
#include "knn/clusters.h"
#include "knn/filter.h"
#include "knn/staged_tile.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

template <class T>
class ResidualFilter {
   public:
    using Score = int32_t;
    using Multiplier = quantised::Multiplier;
    static constexpr int32_t kNever = Int8Filter<T>::kNever, kLowest = Int8Filter<T>::kLowest;
    static constexpr int64_t kMostDepth = 4096;  // products below 2^26
    static constexpr int64_t kPanel = Clusters<T>::kPanel;
    static_assert(kPanel == quantised::kWidth);

    Rows<T> rows;
    const Clusters<T>& clusters;
    const int32_t* order;  // the clusters'
    Quantiser quantiser;
    double unit;
    int64_t words;       // of a code
    int32_t* drop;       // (padded) filter.h
    bool usable = true;  // all rows are within the range of int32
    Stages stages;

    ResidualFilter(Metric metric, const Rows<T>& rows_in, const Clusters<T>& clusters_in, const T* centre, bool exact,
                   const Context& context)
        : rows(rows_in),
          clusters(clusters_in),
          order(clusters_in.order),
          quantiser(Quantiser::choose(rows_in, order, padded(), [&](int64_t i) { return clusters_in.centre(i); })),
          unit(static_cast<double>(quantiser.step) * quantiser.step),
          words(quantised::steps(rows_in.depth)),
          drop(context.scratch<int32_t>(padded())),
          inverse_unit_(1 / unit),
          panels_(context.scratch<uint32_t>(padded() * words)),
          biases_(context.scratch<int32_t>(clusters_in.count * padded())),
          offsets_(context.scratch<T>(clusters_in.count * rows_in.depth)),
          half_squares_(context.scratch<int32_t>(padded())) {
        for (int64_t c = 0; c < clusters.count; ++c)
            for (int64_t j = 0; j < rows.depth; ++j)
                offsets_[c * rows.depth + j] = clusters.centres[c * rows.depth + j] - centre[j];
        order_features(context);
        make_row_tiles(context);
        for (int s = 0; s < Stages::kMost; ++s) {
            tails_[s] = context.scratch<int32_t>(padded());
            excesses_[s] = context.scratch<int32_t>(padded());
            row_lifts_[s] = context.scratch<int32_t>(padded() + kStagedRows);
            column_lifts_[s] = context.scratch<int32_t>(padded());
        }
        const Packing packing(*this, metric, centre, exact);
        usable = packing.greatest_square * 2 / unit < kMostBias && pack_all(packing);
        cut_after(0);
    }

    int64_t padded() const { return clusters.padded; }
    int32_t at_most(T exact) const { return static_cast<int32_t>(std::floor(static_cast<double>(exact) / unit)) - 1; }

    /// Products will be looked at after the eighths s of the features whose bit s is set, and in the end.
    void cut_after(unsigned eighths) {
        stages.count = 0;
        int first = 0;
        for (int s = 0; s < Stages::kMost; ++s) {
            if (s + 1 < Stages::kMost && (eighths >> s & 1) == 0) continue;
            lift_stage(stages.count, first, s);
            stages.begins[++stages.count] = ResidualCode::begin(s + 1, words);
            first = s + 1;
        }
    }

    /// What the sums of rows at [begin, end) start with on their side, the other side being of the cluster `other`.
    void row_starts(int64_t begin, int64_t end, int64_t other, int32_t* out) const {
        const int32_t* biases = biases_ + other * padded();
        for (int64_t i = begin; i < end; ++i) out[i - begin] = biases[i] + row_lifts_[0][i];
    }

    /// The same of columns, with what depends on the two clusters alone; what none of them passes, whatever its product, less
    /// the rows' bound.
    int32_t column_starts(int64_t begin, int64_t end, int64_t own, int64_t other, int32_t* out) const {
        const int32_t* biases = biases_ + other * padded();
        const int32_t apart = half_square_between(own, other);
        for (int64_t i = begin; i < end; ++i) out[i - begin] = biases[i] + column_lifts_[0][i] + apart;
        return row_bound(begin, end, other) + apart;
    }

    /// What no sum of the rows at [begin, end) passes, whatever its product, less the columns' bound.
    int32_t row_bound(int64_t begin, int64_t end, int64_t other) const {
        const int32_t *biases = biases_ + other * padded(), *halves = half_squares_;
        int32_t most = kNever;
        for (int64_t i = begin; i < end; ++i) most = biases[i] + halves[i] > most ? biases[i] + halves[i] : most;
        return most;
    }

    /// The tile of rows that begins at `position`, a multiple of kStagedRows into its cluster.
    TileSide row_tile(int64_t cluster, int64_t position, const int32_t* starts) const {
        const int64_t tile = first_tiles_[cluster] + (position - clusters.starts[cluster]) / kStagedRows;
        return {reinterpret_cast<const uint8_t*>(row_codes_ + tile * kStagedRows * words), starts, row_lifts_, position};
    }
    TileSide column_tile(int64_t position, const int32_t* starts) const {
        return {reinterpret_cast<const uint8_t*>(panels_ + position * words), starts, column_lifts_, position};
    }

   private:
    static constexpr double kMostBias = 1 << 27;
    static constexpr int64_t kChunk = 64;      // positions packed together
    static constexpr int64_t kAhead = 4;       // positions to the row that is fetched into a cache
    static constexpr double kNobody = -1e200;  // the constant where no row stands: no row's is near it
    static constexpr uint32_t kExcess = 0x80808080U;

    /// What packing a row takes.
    struct Packing {
        Metric metric;
        const T* centre;
        double error_share;
        double greatest_square = 0;   // of the centres' offsets
        Buffer<T> centre_rows;        // products.h
        Buffer<double> half_squares;  // of the offsets

        Packing(const ResidualFilter& filter, Metric metric_in, const T* centre_in, bool exact)
            : metric(metric_in),
              centre(centre_in),
              error_share(exact ? 1 : 0.25),
              centre_rows(products::packed_rows_size<T>(filter.clusters.count, filter.rows.depth)),
              half_squares(filter.clusters.count) {
            const int64_t count = filter.clusters.count, depth = filter.rows.depth;
            products::pack_rows<T>(filter.offsets_, count, depth, depth, nullptr, centre_rows.data);
            for (int64_t c = 0; c < count; ++c) {
                double square = 0;
                for (int64_t j = 0; j < depth; ++j)
                    square += static_cast<double>(filter.offsets_[c * depth + j]) * filter.offsets_[c * depth + j];
                half_squares.data[c] = square / 2;
                greatest_square = square > greatest_square ? square : greatest_square;
            }
        }
    };

    /// Codes hold the features in order of how much the residuals differ there: the first then rule out the more pairs.
    void order_features(const Context& context) {
        constexpr int64_t kSample = 1024;
        const int64_t depth = rows.depth, every = padded() / kSample + 1;
        features_ = context.scratch<int32_t>(depth);
        const Buffer<double> squares(depth);
        for (int64_t j = 0; j < depth; ++j) features_[j] = static_cast<int32_t>(j), squares.data[j] = 0;
        for (int64_t i = 0; i < padded(); i += every) {
            if (order[i] < 0) continue;
            const T *x = rows.row(order[i]), *own = clusters.centre(i);
            for (int64_t j = 0; j < depth; ++j) squares.data[j] += static_cast<double>((x[j] - own[j]) * (x[j] - own[j]));
        }
        for (int64_t j = 1; j < depth; ++j) {  // by insertion
            const int32_t feature = features_[j];
            int64_t place = j;
            for (; place > 0 && squares.data[features_[place - 1]] < squares.data[feature]; --place)
                features_[place] = features_[place - 1];
            features_[place] = feature;
        }
    }

    void make_row_tiles(const Context& context) {
        first_tiles_ = context.scratch<int64_t>(clusters.count);
        int64_t tiles = 0;
        for (int64_t c = 0; c < clusters.count; ++c) {
            first_tiles_[c] = tiles;
            tiles += (clusters.sizes[c] + kStagedRows - 1) / kStagedRows;
        }
        row_codes_ = context.scratch<uint32_t>(tiles * kStagedRows * words);
        for (int64_t c = 0; c < clusters.count; ++c) {
            if (clusters.sizes[c] % kStagedRows == 0) continue;  // else the cluster's last tile lacks rows
            uint32_t* last = row_codes_ + (first_tiles_[c] + clusters.sizes[c] / kStagedRows) * kStagedRows * words;
            for (int64_t w = 0; w < kStagedRows * words; ++w) last[w] = 0;
        }
    }

    /// The stage takes the parts [first, last] of the features.
    void lift_stage(int stage, int first, int last) {
        for (int64_t i = 0; i < padded(); ++i) {
            int32_t excess = 0;
            for (int part = first; part <= last; ++part) excess += excesses_[part][i];
            const int32_t lift = tails_[last][i] - (first == 0 ? 0 : tails_[first - 1][i]);
            row_lifts_[stage][i] = lift;
            column_lifts_[stage][i] = lift - excess;
        }
        for (int64_t i = padded(); i < padded() + kStagedRows; ++i) row_lifts_[stage][i] = 0;
    }

    /// |c_a - c_b|^2 / 2, rounded up.
    int32_t half_square_between(int64_t a, int64_t b) const {
        double square = 0;
        for (int64_t j = 0; j < rows.depth; ++j) {
            const double step = static_cast<double>(offsets_[a * rows.depth + j]) - offsets_[b * rows.depth + j];
            square += step * step;
        }
        return static_cast<int32_t>(std::ceil(square * (0.5 + 1e-12) / unit));
    }

    // ------------------------------------------------------------------------------------------------------------ packing

    /// False where something is out of range.
    bool pack_all(const Packing& packing) {
        std::atomic<bool> within{true};
        parallel_for(0, (padded() + kChunk - 1) / kChunk, 4, [&](int64_t begin, int64_t end) {
            const int64_t depth = rows.depth;
            const Buffer<T> z(kChunk * depth), columns(products::packed_columns_size<T>(kChunk, depth)),
                scores(clusters.count * kChunk);
            const Buffer<float> residual((depth + 15) / 16 * 16);
            const Buffer<uint32_t> code(words);
            double constants[kChunk];
            for (int64_t j = depth; j < (depth + 15) / 16 * 16; ++j) residual.data[j] = 0;
            for (int64_t chunk = begin; chunk < end; ++chunk) {
                const int64_t first = chunk * kChunk, last = first + kChunk < padded() ? first + kChunk : padded();
                bool good = true;
                for (int64_t i = first; i < first + kChunk; ++i) {
                    T* own = z.data + (i - first) * depth;
                    if (i + kAhead < last && order[i + kAhead] >= 0) prefetch_row(rows.row(order[i + kAhead]), depth);
                    if (i < last && order[i] >= 0)
                        good &= pack_row(packing, i, own, residual.data, code.data, &constants[i - first]);
                    else
                        pack_nothing(i, i < last, own, &constants[i - first]);
                }
                products::pack_columns<T>(z.data, kChunk, depth, depth, 0, kChunk / products::kWidth<T>, columns.data);
                products::multiply<T>(packing.centre_rows.data, clusters.count, clusters.count, depth, columns.data,
                                      kChunk / products::kWidth<T>, scores.data, kChunk);
                good &= write_biases(packing, first, last, scores.data, constants);
                if (!good) within.store(false, std::memory_order_relaxed);
            }
        });
        return within.load();
    }

    /// Where no row stands.
    void pack_nothing(int64_t position, bool there, T* z, double* constant) {
        for (int64_t j = 0; j < rows.depth; ++j) z[j] = 0;
        *constant = kNobody;
        if (!there) return;
        drop[position] = half_squares_[position] = 0;
        for (int s = 0; s < Stages::kMost; ++s) tails_[s][position] = excesses_[s][position] = 0;
        for (int64_t w = 0; w < words; ++w) *column_word(position, w) = 0;
    }

    /// z = x - centre, the codes, and all of the biases but what depends on the other cluster.
    bool pack_row(const Packing& packing, int64_t position, T* z, float* residual, uint32_t* code, double* constant) {
        constexpr double kUlp = std::numeric_limits<float>::epsilon();
        const int64_t depth = rows.depth, cluster = clusters.of_panel[position / kPanel];
        const T *x = rows.row(order[position]), *offset = offsets_ + cluster * depth;
        for (int64_t j = 0; j < depth; ++j) z[j] = x[j] - packing.centre[j];
        for (int64_t j = 0; j < depth; ++j) residual[j] = static_cast<float>(z[features_[j]] - offset[features_[j]]);
        const ResidualCode made(residual, depth, quantiser.step, words, code);
        write_codes(cluster, position, code);

        // Sums of squares in float lanes are off by less than a ten-thousandth; z and e are rounded before they are coded.
        constexpr double kUp = 1.0001;
        const double gamma = static_cast<double>(depth + 8) * std::numeric_limits<T>::epsilon();
        const double z_square = reduce(z, z, depth, [](auto u, auto v) { return u * v; });
        double errors[Stages::kMost], square = 0, error = 0;
        for (int s = 0; s < Stages::kMost; ++s) {
            const double most = made.squares[s] > made.coded[s] ? made.squares[s] : made.coded[s];
            errors[s] = packing.error_share * kUp * (quantiser.ratio * most + made.rest[s] / quantiser.ratio) / 2;
            error += errors[s];
            square += kUp * most;
        }
        const double rounded = 2 * kUlp * (std::sqrt(z_square) + std::sqrt(square));
        const double rest = std::sqrt(2 * quantiser.ratio * error / packing.error_share);  // no less than |e - e~|
        error += quantiser.ratio * rounded * (std::sqrt(square) + rounded) + rounded * (rest + rounded) / quantiser.ratio;
        error += gamma * (z_square + packing.greatest_square);  // of the biases' products, and of the exact score
        double own = 0;
        if (packing.metric != Metric::euclidean) {
            const double x_square = reduce(x, x, depth, [](auto u, auto v) { return u * v; });
            own = x_square / 2;
            error += gamma * x_square;
        }
        *constant = own + error - z_square / 2;
        const double slack = std::ceil(2 * error / unit) + 4;
        drop[position] = slack < kMostBias ? static_cast<int32_t>(slack) : 0;
        bool within = slack < kMostBias;
        double tail = 0, spare = 0;  // spare: the error of what a cut leaves out, which the bias holds all the same
        for (int s = Stages::kMost - 1; s >= -1; --s) {
            const double units = std::ceil((tail - spare) / unit);
            within = within && std::fabs(units) < kMostBias;
            (s < 0 ? half_squares_ : tails_[s])[position] = within ? static_cast<int32_t>(units) : 0;
            if (s < 0) break;
            excesses_[s][position] = 128 * made.sums[s];
            const double root = std::sqrt(kUp * (2 * tail + made.squares[s])) + rounded;
            tail = root * root / 2;
            spare += errors[s];
        }
        return within;
    }

    void write_codes(int64_t cluster, int64_t position, const uint32_t* code) {
        const int64_t place = position - clusters.starts[cluster];
        uint32_t* tile = row_codes_ + (first_tiles_[cluster] + place / kStagedRows) * kStagedRows * words +
                         place % kStagedRows * quantised::row_stride(words);
        for (int64_t w = 0; w < words; ++w) {
            tile[w * quantised::step_stride(kStagedRows)] = code[w] ^ kExcess;
            *column_word(position, w) = code[w];
        }
    }

    uint32_t* column_word(int64_t position, int64_t word) const {
        return panels_ + (position / kPanel * words + word) * kPanel + position % kPanel;
    }

    bool write_biases(const Packing& packing, int64_t first, int64_t last, const T* scores, const double* constants) {
        const double nobody = kNobody / 2 * inverse_unit_;
        int32_t outside = 0;
        for (int64_t c = 0; c < clusters.count; ++c)
            for (int64_t i = first; i < last; ++i) {
                double bias = static_cast<double>(scores[c * kChunk + i - first]) - packing.half_squares.data[c];
                bias = std::ceil((bias + constants[i - first]) * inverse_unit_);
                outside |= (bias > nobody && bias < -kMostBias) || bias > kMostBias;
                bias = bias < kMostBias ? bias > -kMostBias ? bias : kNever : kMostBias;
                biases_[c * padded() + i] = static_cast<int32_t>(bias);
            }
        return outside == 0;
    }

    double inverse_unit_;
    uint32_t* panels_;                                          // quantised.h
    int32_t* biases_;                                           // (clusters, padded)
    T* offsets_;                                                // (clusters, depth) centres less the common one
    int32_t* half_squares_;                                     // (padded) |e|^2 / 2
    uint32_t* row_codes_;                                       // quantised.h, plus 128; each cluster's rows begin a tile
    int64_t* first_tiles_;                                      // (clusters)
    int32_t* features_;                                         // (depth) which one stands where in the codes
    int32_t *tails_[Stages::kMost], *excesses_[Stages::kMost];  // (padded) of each part of the features
    int32_t *row_lifts_[Stages::kMost], *column_lifts_[Stages::kMost];  // (padded) of each stage
};

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

#endif

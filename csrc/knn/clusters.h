// A rough clustering of the rows, by which the search orders them: most neighbours of a row are of its own cluster, and pairs
// of rows of two clusters are told apart by little more than the distance between these.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/parallel.h"
#include "kmeans/kmeans.h"
#include "knn/buffer.h"
#include "knn/candidates.h"
#include "knn/rows.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

namespace kmeans = fastclust::kmeans;

/// A cluster's rows stand at positions [starts[c], starts[c] + sizes[c]), from its centre outwards, so that a tile's rows are
/// about as far from it; each cluster starts a new panel.
template <class T>
struct Clusters {
    static constexpr int64_t kPanel = 16;

    int64_t count, depth;
    int64_t padded;           // positions
    const T* centres;         // (count, depth)
    const int64_t* starts;    // (count)
    const int64_t* sizes;     // (count)
    const int32_t* order;     // (padded) the row at a position, -1 where there is none
    const int32_t* of_panel;  // (padded / kPanel) whose positions these are

    /// Of the cluster that a position belongs to.
    const T* centre(int64_t position) const { return centres + of_panel[position / kPanel] * depth; }

    /// How many clusters such a search is worth: as many as leave each row enough others in its own to bound its k-th best.
    static int64_t count_for(int64_t rows, int64_t k) {
        constexpr int64_t kLeastSize = 256, kMost = 256;
        const int64_t size = 2 * k + 64 > kLeastSize ? 2 * k + 64 : kLeastSize;
        return rows / size < kMost ? rows / size : kMost;
    }

    /// Lloyd's iteration on a sample, then every row to its nearest centre of those that are the nearest of `least` rows.
    static Clusters of(const Rows<T>& rows, int64_t count, int64_t least, const Context& context) {
        constexpr int64_t kSamplesOfEach = 64, kIterations = 4;
        const auto& kernels = kmeans::FASTCLUST_CAPABILITY::kernels<T>();
        const int64_t depth = rows.depth, samples = count * kSamplesOfEach < rows.count ? count * kSamplesOfEach : rows.count;
        const Buffer<T> sample(samples * depth), init(count * depth), distances(rows.count);
        const Buffer<int64_t> labels(rows.count);
        spread(rows, samples, sample.data);
        spread(Rows<T>{samples, depth, sample.data}, count, init.data);
        T* centres = context.scratch<T>(count * depth);
        T inertia;
        int64_t iterations;
        Arena arena;
        kernels.lloyd({1, 1, samples, count, depth, sample.data, init.data, nullptr, nullptr, kIterations, 0, false, true,
                       centres, labels.data, &inertia, &iterations},
                      arena.context);
        kernels.assign({1, rows.count, count, depth, rows.data, centres, true, labels.data, distances.data}, arena.context);
        count = dissolve_small(rows, count, least, centres, labels.data, distances.data);
        return arranged(labels.data, distances.data, rows.count, count, depth, centres, context);
    }

    /// How many rows reach what a row's own cluster says of its k-th best score, about: from some rows against some others.
    double expected_candidates(const Rows<T>& rows, Metric metric, int64_t k) const {
        constexpr int64_t kRows = 96, kOthers = 512, kOwn = 1024;
        int32_t reached[kRows] = {};
        parallel_for(0, kRows, 4, [&](int64_t begin, int64_t end) {
            const Buffer<T> scores(kOwn);
            for (int64_t s = begin; s < end; ++s) {
                const int64_t position = first_row_from((2 * s + 1) * padded / (2 * kRows)),
                              cluster = of_panel[position / kPanel];
                const T* x = rows.row(order[position]);
                const auto score_of = [&](int64_t other) { return score(metric, x, rows.row(order[other]), depth); };
                int64_t count = 0;
                for (int64_t i = starts[cluster]; i < starts[cluster] + sizes[cluster] && count < kOwn; ++i)
                    if (i != position) scores.data[count++] = score_of(i);
                const T floor = bound_of_rank(scores.data, count, k, std::numeric_limits<T>::lowest());
                for (int64_t o = 0; o < kOthers; ++o) {
                    const int64_t other = first_row_from((2 * o + 1) * padded / (2 * kOthers));
                    reached[s] += other != position && score_of(other) >= floor;
                }
            }
        });
        double all = 0;
        for (const int32_t count : reached) all += count;
        return all / static_cast<double>(kRows * kOthers) * static_cast<double>(rows.count);
    }

   private:
    /// The position of a row, the next from here on or else before.
    int64_t first_row_from(int64_t position) const {
        int64_t at = position;
        while (at < padded && order[at] < 0) ++at;
        while (at == padded || order[at] < 0) --at;
        return at;
    }

    /// Leaves out the clusters of fewer than `least` rows, whose rows go to the nearest centre that stays.
    static int64_t dissolve_small(const Rows<T>& rows, int64_t count, int64_t least, T* centres, int64_t* labels,
                                  T* distances) {
        const int64_t depth = rows.depth;
        const Buffer<int64_t> sizes(count), names(count), moved(rows.count);
        for (int64_t c = 0; c < count; ++c) sizes.data[c] = 0;
        for (int64_t i = 0; i < rows.count; ++i) ++sizes.data[labels[i]];
        int64_t stay = 0;
        for (int64_t c = 0; c < count; ++c) {
            names.data[c] = sizes.data[c] < least ? -1 : stay++;
            for (int64_t j = 0; names.data[c] >= 0 && j < depth; ++j)
                centres[names.data[c] * depth + j] = centres[c * depth + j];
        }
        if (stay == 0) return 0;
        int64_t moving = 0;
        for (int64_t i = 0; i < rows.count; ++i) {
            labels[i] = names.data[labels[i]];
            if (labels[i] < 0) moved.data[moving++] = i;
        }
        const Buffer<T> gathered(moving * depth), nearest_distances(moving);
        const Buffer<int64_t> nearest(moving);
        for (int64_t m = 0; m < moving; ++m)
            for (int64_t j = 0; j < depth; ++j) gathered.data[m * depth + j] = rows.row(moved.data[m])[j];
        Arena arena;
        kmeans::FASTCLUST_CAPABILITY::kernels<T>().assign(
            {1, moving, stay, depth, gathered.data, centres, true, nearest.data, nearest_distances.data}, arena.context);
        for (int64_t m = 0; m < moving; ++m) {
            labels[moved.data[m]] = nearest.data[m];
            distances[moved.data[m]] = nearest_distances.data[m];
        }
        return stay;
    }

    /// `count` of the rows, as far from each other in their order as can be.
    static void spread(const Rows<T>& rows, int64_t count, T* out) {
        for (int64_t i = 0; i < count; ++i) {
            const T* row = rows.row(i * rows.count / count);
            for (int64_t j = 0; j < rows.depth; ++j) out[i * rows.depth + j] = row[j];
        }
    }

    static Clusters arranged(const int64_t* labels, const T* distances, int64_t rows, int64_t count, int64_t depth,
                             const T* centres, const Context& context) {
        auto* starts = context.scratch<int64_t>(count);
        auto* sizes = context.scratch<int64_t>(count);
        for (int64_t c = 0; c < count; ++c) sizes[c] = 0;
        for (int64_t i = 0; i < rows; ++i) ++sizes[labels[i]];
        int64_t padded = 0;
        for (int64_t c = 0; c < count; ++c) {
            starts[c] = padded;
            padded += (sizes[c] + kPanel - 1) / kPanel * kPanel;
        }
        auto* order = context.scratch<int32_t>(padded);
        auto* of_panel = context.scratch<int32_t>(padded / kPanel);
        for (int64_t position = 0; position < padded; ++position) order[position] = -1;
        for (int64_t c = 0; c < count; ++c)
            for (int64_t begin = starts[c]; begin < starts[c] + sizes[c]; begin += kPanel)
                of_panel[begin / kPanel] = static_cast<int32_t>(c);
        const Buffer<int64_t> next(count);
        for (int64_t c = 0; c < count; ++c) next.data[c] = starts[c];
        for (int64_t i = 0; i < rows; ++i) order[next.data[labels[i]]++] = static_cast<int32_t>(i);
        parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c)
                std::sort(order + starts[c], order + starts[c] + sizes[c],
                          [&](int32_t a, int32_t b) { return Ranked<T>{distances[b], a}.before({distances[a], b}); });
        });
        return {count, depth, padded, centres, starts, sizes, order, of_panel};
    }
};

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

// Which candidates of k-means++ may be the one to pick, and the rows that they may come nearer to: of no others need distances
// be computed.
#pragma once

#include "kmeans/candidate_screen.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

template <class T>
class Shortlist;

#if defined(__AVX512VNNI__)

/// For `candidates` at most, in groups of kCandidateLanes.
template <>
class Shortlist<float> {
   public:
    Shortlist(int64_t n, int64_t d, int64_t candidates, int pieces, const Context& context)
        : n_(n),
          pieces_(pieces),
          screen_(n, d, pieces, context),
          groups_(context.scratch<Group>((candidates + kCandidateLanes - 1) / kCandidateLanes)) {
        for (int64_t g = 0; g * kCandidateLanes < candidates; ++g)
            groups_[g] = {context.scratch<int64_t>(span_count(n)),
                          context.scratch<int16_t>(n),
                          context.scratch<uint8_t>(n),
                          context.scratch<Gains>(span_count(n)),
                          {}};
    }

    CandidateScreen<float>& screen() { return screen_; }

    /// Of candidates at rows ids[0 .. count), where the masses (N) sum up to `total`: sets the bits of those that may leave the
    /// least, per group.
    void choose(const int64_t* ids, int64_t count, const float* masses, const float* weights, double total,
                unsigned* possible) {
        double best = 0;
        for (int64_t first = 0, g = 0; first < count; first += kCandidateLanes, ++g) {
            const int size = static_cast<int>(count - first < kCandidateLanes ? count - first : kCandidateLanes);
            find(groups_[g], ids + first, size, masses, weights);
            for (int l = 0; l < size; ++l) best = groups_[g].sum.least[l] > best ? groups_[g].sum.least[l] : best;
        }
        const double rounding = 4e-16 * static_cast<double>(n_) * total;  // of the sums of masses
        for (int64_t l = 0; l < count; ++l) {
            const auto& sum = groups_[l / kCandidateLanes].sum;
            const int lane = static_cast<int>(l % kCandidateLanes);
            const bool out = sum.most[lane] < best - rounding && sum.least[lane] < best;
            unsigned& of_group = possible[l / kCandidateLanes];
            of_group = (lane == 0 ? 0 : of_group) | (out ? 0U : 1U << lane);
        }
    }

    /// Calls body(row, nearer) for the rows of a span that candidates of a group may come nearer to, ascending.
    template <class Body>
    void for_rows(int64_t group, int64_t span, const Body& body) const {
        const Group& of = groups_[group];
        for (int64_t i = span * kSpanRows; i < span * kSpanRows + of.counts[span]; ++i)
            body(span * kSpanRows + of.offsets[i], of.nearer[i]);
    }

   private:
    using Gains = CandidateScreen<float>::Gains;

    struct Group {
        int64_t* counts;   // (spans) of rows
        int16_t* offsets;  // (N) which they are, span by span from its first row's place on
        uint8_t* nearer;   // (N) likewise: by which candidates
        Gains* gains;      // (spans)
        struct {
            double least[kCandidateLanes], most[kCandidateLanes];
        } sum;  // of gains
    };

    void find(Group& group, const int64_t* ids, int count, const float* masses, const float* weights) {
        screen_.set_candidates(ids, count);
        for_pieces(pieces_, span_count(n_), [&](int, int64_t begin, int64_t end) {
            for (int64_t span = begin; span < end; ++span) {
                const int64_t first = span * kSpanRows;
                group.counts[span] = screen_.find(first, span_end(span, n_) - first, masses, weights, group.offsets + first,
                                                  group.nearer + first, group.gains[span]);
            }
        });
        group.sum = {};
        for (int64_t span = 0; span < span_count(n_); ++span)
            for (int l = 0; l < count; ++l) {
                group.sum.least[l] += static_cast<double>(group.gains[span].least[l]);
                group.sum.most[l] += static_cast<double>(group.gains[span].most[l]);
            }
    }

    const int64_t n_;
    const int pieces_;
    CandidateScreen<float> screen_;
    Group* groups_;
};

#endif

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

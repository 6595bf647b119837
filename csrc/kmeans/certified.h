// Nearest centroids through 8-bit products, each certified: a label is taken from them only where no other centroid's score
// can be higher, given the bounds of quantisation and rounding; between two that are left, float scores decide.
//
// In units of scale_x scale_c, where one scale_c serves all centroids, the score x.c_k - |c_k|^2 / 2 is
//     t_k = q_x.q_k - h_k / scale_x,   h_k = |c_k|^2 / (2 scale_c),
// and is off by at most  E = (|x - x~| max |c| + |x~| max |c - c~|) / (scale_x scale_c)  and rounding. E is one number per row,
// so the four highest t of a row are nearly all there is to keep of it: whatever lies more than E below the exact score of the
// first is ruled out. Where that leaves more than three, a second look at the products, which are kept, finds them.
//
// Rows are the lanes of a vector and centroids come one by one, so that nothing is ever reduced across lanes. A score's lowest
// bits hold its centroid's index, which makes keeping the highest four a matter of seven minima and maxima.
#pragma once

#include "kmeans/codes.h"
#include "kmeans/float_scores.h"
#include "kmeans/reach.h"
#include "kmeans/staged.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

/// Fewer centroids are searched sooner than rivals are kept.
constexpr int64_t kLeastForRivals = 32;

/// Finds the nearest centroids of one block at a time; one per piece, since it holds the buffers.
template <class T>
class CertifiedAssigner;

#if defined(__AVX512VNNI__)

template <>
class CertifiedAssigner<float> {
   public:
    CertifiedAssigner(int64_t k, int64_t d, const Context& context)
        : staged_(d, context),
          products_(context.scratch<int32_t>((k + QuantisedCentres::kGroup) * kBlockRows)),
          tops_(context.scratch<float>(QuantisedCentres::groups(k) * kBlockRows)),
          every_(context.scratch<int32_t>(QuantisedCentres::groups(k))),
          float_scores_(d, context) {
        for (int64_t g = 0; g < QuantisedCentres::groups(k); ++g) every_[g] = static_cast<int32_t>(g);
    }

    /// The nearest of `centres`, or of the groups of them that lie `within` reach, for rows[0 .. count), ascending; how many
    /// float scores, of rows of `all`, it took to be certain of them. Without `exact` it takes none: the best 8-bit score
    /// decides. Scores found here are upper bounds.
    int64_t assign(const QuantisedRows& data, const QuantisedCentres& centres, const QuantisedCentres& all, const float* x,
                   const int64_t* rows, int64_t count, bool exact, const Nearest<float>& nearest, Within* within = nullptr) {
        const quantised::Multiplier multiplier(data.steps);
        Within everything{every_, QuantisedCentres::groups(centres.k), nullptr};
        within_ = within == nullptr ? &everything : within;
        searched_ = centres.columns_of(within_->groups, within_->count);
        int64_t scored = 0;
        for (int64_t first = 0; first < count; first += kBlockRows) {
            const int64_t size = count - first < kBlockRows ? count - first : kBlockRows;
            staged_.stage(data, rows + first, size);
            staged_.bound(centres, kScoreBits);
            std::fill_n(least_, kBlockRows, __builtin_inff());
            prefetch(data, centres, x, rows + first, size, count - first - size);
            keep_highest(centres);
            if (nearest.standing)
                scored += challenge(centres, all, data, x, rows + first, size, nearest.from(first));
            else
                scored += conclude(centres, data, x, rows + first, size, exact, nearest.from(first));
            if (within_->margins != nullptr) keep_margins(size);
        }
        return scored;
    }

    /// The nearest among what was the nearest and its rivals, by float scores, where all others are known to be farther.
    void assign_among_rivals(const QuantisedRows& data, const QuantisedCentres& centres, const float* x, const int64_t* rows,
                             int64_t count, const Nearest<float>& nearest) {
        for (int64_t first = 0; first < count; first += kBlockRows) {
            open_count_ = count - first < kBlockRows ? count - first : kBlockRows;
            for (int64_t i = 0; i < open_count_; ++i) open_[i] = static_cast<int32_t>(i);
            for (int64_t i = 0; i < open_count_; ++i) {
                fetch_open(i, centres, data, x, rows + first);
                rank_rivals(data.length(rows[first + i]), centres, i, nearest.from(first + i));
            }
        }
    }

   private:
    static constexpr int64_t kLanes = quantised::kWidth;
    static constexpr int kIndexBits = 10, kScoreBits = 23 - kIndexBits;
    static constexpr int64_t kChunk = 1 << kIndexBits;  // centroids whose indices a score's lowest bits can tell apart
    static constexpr float kNone = -3e38f;
    static constexpr int kKept = kRivals + 2;  // the nearest, its rivals, and one that stands for all others

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
            for (int64_t j = 0; j < centres.d; j += 16) __builtin_prefetch(data.vector(x, rows[i]) + j);
    }

    /// The highest scores of each staged row, to best_.
    void keep_highest(const QuantisedCentres& centres) {
        constexpr int64_t kGroups = kChunk / QuantisedCentres::kGroup;
        if (within_->count == 0)
            for (auto& of_lanes : best_) std::fill_n(of_lanes, kBlockRows, kNone);
        for (int64_t g = 0, last; g < within_->count; g = last) {
            const int64_t chunk = within_->groups[g] / kGroups;
            for (last = g + 1; last < within_->count && within_->groups[last] / kGroups == chunk;) ++last;
            if (staged_.lanes == kLanes)
                keep_highest<1>(centres, g, last);
            else if (staged_.lanes == 2 * kLanes)
                keep_highest<2>(centres, g, last);
            else
                keep_highest<3>(centres, g, last);
            if (g == 0)
                begin(chunk * kChunk);
            else
                merge(chunk * kChunk);
        }
    }

    /// The same among the groups [first, last) of those within reach, all of one chunk, to highest_.
    template <int Panels>
    void keep_highest(const QuantisedCentres& centres, int64_t first, int64_t last) {
        constexpr int64_t kGroup = QuantisedCentres::kGroup;
        for (auto& of_lanes : highest_)
            for (int64_t i = 0; i < Panels * kLanes; ++i) of_lanes[i] = kNone;
        for (int64_t g = first; g < last; ++g) {
            const int64_t column = within_->groups[g] * kGroup;
            const int64_t size = centres.k - column < kGroup ? centres.k - column : kGroup;
            int32_t* products = products_ + column * kBlockRows;
            staged_.multiply<Panels>(centres.group_of(column), size, centres.steps, products);
            float* tops = within_->margins == nullptr ? nullptr : tops_ + within_->groups[g] * kBlockRows;
            const auto index = static_cast<int32_t>(column % kChunk);
            for (int lane = 0; lane < Panels * kLanes; lane += kLanes)
                if (tops == nullptr)
                    keep_group<false>(products + lane, centres.halves + column, index, size, lane, nullptr);
                else
                    keep_group<true>(products + lane, centres.halves + column, index, size, lane, tops + lane);
        }
    }

    /// The highest scores of 16 rows with a group of centroids join highest_; the highest of the group goes to `tops`.
    template <bool kTops>
    void keep_group(const int32_t* products, const float* halves, int32_t index, int64_t size, int64_t lane, float* tops) {
        const __m512 inverse = _mm512_loadu_ps(staged_.inverses + lane);
        const __m512i index_bits = _mm512_set1_epi32(kChunk - 1);
        __m512 kept[kKept], top = _mm512_set1_ps(kNone);
        for (int t = 0; t < kKept; ++t) kept[t] = _mm512_loadu_ps(highest_[t] + lane);
        for (int64_t i = 0; i < size; ++i) {
            const __m512 score = StagedRows::scores(products + i * kBlockRows, halves[i], inverse);
            const __m512i own = _mm512_set1_epi32(index + static_cast<int32_t>(i));
            constexpr int kSelect = 0xCA;  // of three bits a, b, c: a ? b : c
            __m512 tagged =
                _mm512_castsi512_ps(_mm512_ternarylogic_epi32(index_bits, own, _mm512_castps_si512(score), kSelect));
            if constexpr (kTops) top = _mm512_max_ps(top, tagged);
#pragma GCC unroll 4
            for (int t = 0; t < kKept; ++t) {
                const __m512 lower = _mm512_min_ps(tagged, kept[t]);
                kept[t] = _mm512_max_ps(tagged, kept[t]);
                tagged = lower;
            }
        }
        for (int t = 0; t < kKept; ++t) _mm512_storeu_ps(highest_[t] + lane, kept[t]);
        if constexpr (kTops) _mm512_storeu_ps(tops, top);
    }

    /// highest_, of the chunk of centroids from `first` on, becomes best_.
    void begin(int64_t first) {
        const int64_t lanes = staged_.lanes;
        for (int t = 0; t < kKept; ++t)
            for (int64_t i = 0; i < lanes; ++i) {
                best_[t][i] = highest_[t][i];
                index_[t][i] = static_cast<int32_t>(first) + index_of(highest_[t][i]);
            }
    }

    /// The same joins best_.
    void merge(int64_t first) {
        const int64_t lanes = staged_.lanes;
        for (const auto& of_lanes : highest_)
            for (int64_t i = 0; i < lanes; ++i) {
                float score = of_lanes[i];
                auto index = static_cast<int32_t>(first) + index_of(score);
                for (int t = 0; t < kKept; ++t) {
                    const bool higher = score > best_[t][i];
                    const float lower = higher ? best_[t][i] : score;
                    const int32_t lower_index = higher ? index_[t][i] : index;
                    best_[t][i] = higher ? score : best_[t][i];
                    index_[t][i] = higher ? index : index_[t][i];
                    score = lower, index = lower_index;
                }
            }
    }

    static int32_t index_of(float tagged) {
        int32_t bits;
        __builtin_memcpy(&bits, &tagged, 4);
        return bits & static_cast<int32_t>(kChunk - 1);
    }

    /// |c|^2 - 2 x.c of what scores at most t, its bound included: at least that.
    float beyond(int64_t i, float t) const { return -2 * staged_.units[i] * (t + staged_.bounds[i]); }

    /// What the groups' highest scores say of them, to the margins that were asked for.
    void keep_margins(int64_t count) {
        Within& within = *within_;
        __m512 slopes[3], starts[3];  // of |c|^2 - 2 x.c less that of the nearest, at least, by the 8-bit score
        for (int panel = 0; panel < 3; ++panel) {
            const __m512 unit = _mm512_mul_ps(_mm512_set1_ps(-2), _mm512_loadu_ps(staged_.units + panel * kLanes));
            slopes[panel] = unit;
            starts[panel] = _mm512_fmsub_ps(unit, _mm512_loadu_ps(staged_.bounds + panel * kLanes),
                                            _mm512_loadu_ps(ranked_[0] + panel * kLanes));
        }
        bool bounded = true;
        for (int64_t i = 0; i < count; ++i) {
            const float distance = ranked_[0][i] + staged_.squares[i];
            bounded &= distance < __builtin_inff() && staged_.bounds[i] < __builtin_inff();
            within.distance = distance > within.distance ? distance : within.distance;
            within.square = staged_.squares[i] > within.square ? staged_.squares[i] : within.square;
        }
        for (int64_t i = 0; i < within.count; ++i) {
            const int64_t g = within.groups[i];
            __m512 margin = _mm512_set1_ps(__builtin_inff());
            for (int panel = 0; panel < 3 && panel * kLanes < count; ++panel) {
                const int64_t left = count - panel * kLanes;
                const auto lanes = static_cast<__mmask16>(left < kLanes ? (1U << left) - 1 : 0xFFFF);
                const __m512 top = _mm512_loadu_ps(tops_ + g * kBlockRows + panel * kLanes);
                margin = _mm512_mask_min_ps(margin, lanes, margin, _mm512_fmadd_ps(slopes[panel], top, starts[panel]));
            }
            const float least = bounded ? _mm512_reduce_min_ps(margin) : -__builtin_inff();
            within.margins[g] = least < within.margins[g] ? least : within.margins[g];
        }
    }

    /// From best_; where the bound leaves more than one centroid, from float scores.
    int64_t conclude(const QuantisedCentres& centres, const QuantisedRows& data, const float* x, const int64_t* rows,
                     int64_t count, bool exact, const Nearest<float>& nearest) {
        for (int64_t i = 0; i < count; ++i) ranked_[0][i] = -2 * staged_.units[i] * (best_[0][i] - staged_.bounds[i]);
        for (int t = 0; t <= kRivals; ++t)
            for (int64_t i = 0; i < count; ++i)
                labels_[t][i] = static_cast<int32_t>(centres.id(index_[t < searched_ ? t : 0][i]));
        for (int t = 1; t <= kRivals; ++t)
            for (int64_t i = 0; i < count; ++i) ranked_[t][i] = t < searched_ ? beyond(i, best_[t][i]) : __builtin_inff();
        for (int64_t i = 0; i < count; ++i) farther_[i] = beyond(i, best_[kKept - 1][i]);
        open_count_ = 0;
        for (int64_t i = 0; i < count; ++i) leave_open(i, exact && !(best_[1][i] < best_[0][i] - 2 * staged_.bounds[i]));
        const int64_t scored = settle(centres, data, x, rows);
        for (int64_t i = 0; i < count; ++i) nearest.labels[i] = labels_[0][i];
        for (int64_t i = 0; i < count; ++i) nearest.scores[i] = ranked_[0][i];
        for (int64_t i = 0; i < count; ++i) ranked_[1][i] = ranked_[2][i] < ranked_[1][i] ? ranked_[2][i] : ranked_[1][i];
        if (centres.k < kLeastForRivals) {
            for (int64_t i = 0; i < count; ++i) farther_[i] = ranked_[1][i] < farther_[i] ? ranked_[1][i] : farther_[i];
        } else {
            for (int t = 1; t <= kRivals; ++t)
                for (int64_t i = 0; i < count; ++i) nearest.rivals[t - 1][i] = labels_[t][i];
            for (int64_t i = 0; i < count; ++i)
                nearest.leads[i] = distance_gap(ranked_[0][i], ranked_[1][i], staged_.squares[i], centres.d);
        }
        for (int64_t i = 0; i < count; ++i)
            nearest.gaps[i] = distance_gap(ranked_[0][i], farther_[i], staged_.squares[i], centres.d);
        return scored;
    }

    /// Float scores for the open rows, whose second score lies within twice the bound of the first, or which have no bound.
    int64_t settle(const QuantisedCentres& centres, const QuantisedRows& data, const float* x, const int64_t* rows) {
        int64_t scored = 0;
        for (int64_t o = 0; o < open_count_; ++o, ++scored) {
            const int64_t i = fetch_open(o, centres, data, x, rows);
            ranked_[0][i] = score(centres, i, centres.column(labels_[0][i]));
            const float least = ranked_[0][i] / (-2 * staged_.units[i]) - staged_.bounds[i];
            if (best_[kKept - 1][i] < least) {
                for (int t = 1; t < kKept && !(best_[t][i] < least); ++t, ++scored) {
                    ranked_[t][i] = score(centres, i, centres.column(labels_[t][i]));
                    if (comes_first(i, t, 0)) exchange(i, t, 0);
                }
            } else {
                look_again(i, least);
                for (auto& of_lanes : ranked_) of_lanes[i] = __builtin_inff();
            }
        }
        return scored + score_possible(centres);
    }

    /// The nearest so far against centroids that have moved.
    int64_t challenge(const QuantisedCentres& centres, const QuantisedCentres& all, const QuantisedRows& data, const float* x,
                      const int64_t* rows, int64_t count, const Nearest<float>& nearest) {
        int64_t scored = 0;
        open_count_ = 0;
        for (int64_t i = 0; i < count; ++i) {
            for (int t = 0; t <= kRivals; ++t) {
                ranked_[t][i] = t == 0 ? nearest.scores[i] : __builtin_inff();
                labels_[t][i] = nearest.labels[i];
            }
            challengers_[i] = highest_challenger(centres, i, nearest);
            farther_[i] = beyond(i, challengers_[i]);
            leave_open(i, !(challengers_[i] < nearest.scores[i] / (-2 * staged_.units[i]) - staged_.bounds[i]));
        }
        for (int64_t o = 0; o < open_count_; ++o, ++scored) {
            const int64_t i = fetch_open(o, centres, data, x, rows);
            ranked_[0][i] = score(all, i, all.column(labels_[0][i]));
            const float least = ranked_[0][i] / (-2 * staged_.units[i]) - staged_.bounds[i];
            if (!(challengers_[i] < least)) look_again(i, least);
        }
        scored += score_possible(centres);
        for (int64_t i = 0; i < count; ++i) {
            for (int t = 1; t <= kRivals; ++t) farther_[i] = ranked_[t][i] < farther_[i] ? ranked_[t][i] : farther_[i];
            const float gap = distance_gap(ranked_[0][i], farther_[i], staged_.squares[i], centres.d);
            nearest.gaps[i] = gap < nearest.gaps[i] ? gap : nearest.gaps[i];
            nearest.scores[i] = ranked_[0][i];
            if (labels_[0][i] == nearest.labels[i]) continue;
            nearest.gaps[i] = nearest.leads[i] < nearest.gaps[i] ? nearest.leads[i] : nearest.gaps[i];
            nearest.labels[i] = labels_[0][i];
            nearest.without_rivals(i);
        }
        return scored;
    }

    /// The best 8-bit score but for the nearest centroid's own and its rivals', of which is known what they can reach.
    float highest_challenger(const QuantisedCentres& centres, int64_t i, const Nearest<float>& nearest) const {
        int t = 0;
        for (; t < kKept - 1; ++t) {
            if (!(best_[t][i] > kNone)) break;
            const auto id = static_cast<int32_t>(centres.id(index_[t][i]));
            if (id != nearest.labels[i] && id != nearest.rivals[0][i] && id != nearest.rivals[1][i]) break;
        }
        return best_[t][i];
    }

    void rank_rivals(float length, const QuantisedCentres& centres, int64_t i, const Nearest<float>& nearest) {
        const int32_t before = *nearest.labels;
        for (int t = 0; t <= kRivals; ++t) {
            labels_[t][i] = t == 0 ? before : *nearest.rivals[t - 1];
            ranked_[t][i] =
                t > 0 && labels_[t][i] == before ? __builtin_inff() : score(centres, i, centres.column(labels_[t][i]));
        }
        const float score_before = ranked_[0][i], square = length * length;
        for (int t = 1; t <= kRivals; ++t)
            if (comes_first(i, t, 0)) exchange(i, t, 0);
        float rival = ranked_[1][i];
        for (int t = 1; t <= kRivals; ++t) {
            *nearest.rivals[t - 1] = labels_[t][i];
            rival = ranked_[t][i] < rival ? ranked_[t][i] : rival;
        }
        *nearest.labels = labels_[0][i];
        *nearest.scores = ranked_[0][i];
        *nearest.leads = distance_gap(ranked_[0][i], rival, square, centres.d);
        if (labels_[0][i] != before) *nearest.gaps += distance_gap(ranked_[0][i], score_before, square, centres.d);
    }

    /// Has score_possible score what reaches `least`; nothing else is nearer than that.
    void look_again(int64_t i, float least) {
        farther_[i] = beyond(i, least);
        least_[i] = least == least ? least : -__builtin_inff();
    }

    /// Scores the centroids that reach least_, all of a row where that is -inf.
    int64_t score_possible(const QuantisedCentres& centres) {
        int64_t scored = 0;
        for (int64_t lane = 0; lane < kBlockRows; lane += kLanes) {
            const __m512 least = _mm512_loadu_ps(least_ + lane);
            const __mmask16 open = _mm512_cmp_ps_mask(least, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
            if (open == 0) continue;
            for (int64_t g = 0; g < within_->count; ++g) scored += score_possible(centres, within_->groups[g], lane, open);
        }
        return scored;
    }

    /// The same of one group, for the `open` of 16 lanes.
    int64_t score_possible(const QuantisedCentres& centres, int64_t group, int64_t lane, __mmask16 open) {
        const __m512 inverse = _mm512_loadu_ps(staged_.inverses + lane), least = _mm512_loadu_ps(least_ + lane);
        const int64_t first = group * QuantisedCentres::kGroup, end = first + QuantisedCentres::kGroup;
        int64_t scored = 0;
        for (int64_t column = first; column < end && column < centres.k; ++column) {
            const __m512 score_of = StagedRows::scores(products_ + column * kBlockRows + lane, centres.halves[column], inverse);
            unsigned possible = _mm512_mask_cmp_ps_mask(open, score_of, least, _CMP_NLT_UQ);
            for (; possible != 0; possible &= possible - 1, ++scored) {
                const int64_t i = lane + __builtin_ctz(possible);
                join(score(centres, i, column), static_cast<int32_t>(centres.id(column)), i);
            }
        }
        return scored;
    }

    /// A float score of lane i joins those it has, in order; the last of them makes room.
    void join(float value, int32_t label, int64_t i) {
        if (value < ranked_[kRivals][i] || (value == ranked_[kRivals][i] && label < labels_[kRivals][i])) {
            const float last = ranked_[kRivals][i];
            ranked_[kRivals][i] = value, labels_[kRivals][i] = label;
            for (int t = kRivals; t > 0 && comes_first(i, t, t - 1); --t) exchange(i, t, t - 1);
            value = last;
        }
        farther_[i] = value < farther_[i] ? value : farther_[i];
    }

    /// Whether lane i's score `t` is the lower, or of the lower label.
    bool comes_first(int64_t i, int t, int other) const {
        return ranked_[t][i] < ranked_[other][i] || (ranked_[t][i] == ranked_[other][i] && labels_[t][i] < labels_[other][i]);
    }

    void exchange(int64_t i, int t, int other) {
        const float value = ranked_[t][i];
        const int32_t label = labels_[t][i];
        ranked_[t][i] = ranked_[other][i], labels_[t][i] = labels_[other][i];
        ranked_[other][i] = value, labels_[other][i] = label;
    }

    void leave_open(int64_t i, bool open) {
        open_[open_count_] = static_cast<int32_t>(i);
        open_count_ += open;
    }

    /// Has the o-th open row centred, and those after it on their way: they lie apart in memory. Gives its lane.
    int64_t fetch_open(int64_t o, const QuantisedCentres& centres, const QuantisedRows& data, const float* x,
                       const int64_t* rows) {
        constexpr int64_t kAhead = 4;
        for (int64_t next = o == 0 ? 1 : o + kAhead; next <= o + kAhead && next < open_count_; ++next)
            for (int64_t j = 0; j < centres.d; j += 16) __builtin_prefetch(data.vector(x, rows[open_[next]]) + j);
        const int64_t i = open_[o];
        float_scores_.fetch(i, centres, data, x, rows[i]);
        return i;
    }

    /// |c|^2 - 2 x.c of lane i.
    float score(const QuantisedCentres& centres, int64_t i, int64_t column) const {
        return float_scores_.score(centres, i, column);
    }

    StagedRows staged_;
    int32_t* products_;         // (K and the rest of its last group, kBlockRows)
    float* tops_;               // (groups, kBlockRows) the highest score of each group
    int32_t* every_;            // (groups) 0, 1, ...
    Within* within_ = nullptr;  // of the search
    int64_t searched_ = 0;      // centroids in it
    FloatScores float_scores_;
    int32_t open_[kBlockRows + 1];      // lanes whose bound leaves more than one centroid
    int64_t open_count_ = 0;            // of the last block
    float highest_[kKept][kBlockRows];  // of a chunk, tagged with the index in it
    float best_[kKept][kBlockRows];     // of all chunks so far
    int32_t index_[kKept][kBlockRows];
    float ranked_[kRivals + 1][kBlockRows];    // |c|^2 - 2 x.c of the nearest centroid, at most, and of its rivals, at least
    int32_t labels_[kRivals + 1][kBlockRows];  // which they are
    float challengers_[kBlockRows];            // what challenge() found
    float farther_[kBlockRows];                // the same of every other centroid, at least
    float least_[kBlockRows];                  // the score that makes a centroid possible
};

#endif

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

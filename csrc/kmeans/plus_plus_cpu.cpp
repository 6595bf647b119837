#include "kmeans/differences.h"
#include "kmeans/kmeans_cpu.h"
#include "kmeans/shortlist.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {
namespace {

/// Draws the rows of one problem and start after another. masses_[i] is w_i times the squared distance of row i to its nearest
/// pick; its sums per block of rows make a draw cheap, and are added up in order so that threads do not matter.
///
/// A candidate makes few masses less, and only the candidate that leaves the least is picked. Distances are computed of the
/// rows whose mass may become less by a candidate that may be that one (shortlist.h, where the CPU has 8-bit products); all
/// other masses take part in the sums as they are.
template <class T>
class Sampler {
   public:
    Sampler(const PlusPlus<T>& a, int pieces, const Context& context)
        : a_(a),
          pieces_(pieces),
          blocks_((a.n + kBlockRows - 1) / kBlockRows),
          groups_((a.candidates + kCandidateLanes - 1) / kCandidateLanes),
          masses_(context.scratch<T>(a.n)),
          block_masses_(context.scratch<double>(blocks_)),
          masses_before_(context.scratch<double>(blocks_)),
          candidates_(context.scratch<int64_t>(a.candidates)),
          candidate_rows_(a.d, context),
          possible_(context.scratch<unsigned>(groups_)),
          trials_(context.scratch<Trial>(groups_)) {
        for (int64_t group = 0; group < groups_; ++group)
            trials_[group] = {context.scratch<int8_t>(blocks_), context.scratch<int8_t>(a.n),
                              context.scratch<CandidateVector<T>>(a.n), context.scratch<CandidateVector<double>>(blocks_)};
        if constexpr (kCertifies<T>) {
            constexpr int64_t kPicksWorthQuantising = 8;
            if (a.restarts * a.k >= kPicksWorthQuantising && a.d >= kLeastDepth && a.d <= quantised::kMaxDepth)
                shortlist_ = new (context.scratch<Shortlist<T>>(1)) Shortlist<T>(a.n, a.d, a.candidates, pieces, context);
        }
    }

    void draw_problem(int64_t problem) {
        x_ = a_.x + problem * a_.n * a_.d;
        weights_ = a_.sample_weight == nullptr ? nullptr : a_.sample_weight + problem * a_.n;
        if constexpr (kCertifies<T>)
            if (shortlist_ != nullptr) shortlist_->screen().set_rows(x_);
        for (int64_t restart = 0; restart < a_.restarts; ++restart) {
            const int64_t run = problem * a_.restarts + restart;
            const T* uniforms = a_.uniforms + run * a_.k * a_.candidates;
            int64_t* rows = a_.rows + run * a_.k;
            for (int64_t pick = 0; pick < a_.k; ++pick) rows[pick] = next(pick, uniforms + pick * a_.candidates);
        }
    }

   private:
    /// What masses would be left were one of a group of candidates picked, where for any of them that is less.
    struct Trial {
        int8_t* counts;                         // (blocks) of such rows
        int8_t* offsets;                        // (N) of them in their block, ascending, from its first row's place on
        CandidateVector<T>* left;               // (N) likewise: their masses
        CandidateVector<double>* block_masses;  // (blocks)
    };

    /// The rows of a span that are measured, ascending.
    struct Open {
        int64_t count = 0;
        int16_t offsets[kSpanRows];  // in the span
        uint8_t nearer[kSpanRows];   // bit l: candidate l may be nearer than all picks

        void add(int64_t offset, unsigned by) {
            offsets[count] = static_cast<int16_t>(offset);
            nearer[count] = static_cast<uint8_t>(by);
            count += by != 0;
        }
    };

    int64_t next(int64_t pick, const T* uniforms) {
        const double total = pick == 0 ? 0 : sum_up_blocks();
        if (total == 0) {
            set_masses([&](int64_t row) { return weight(row); });
            const int64_t picked = row_at(uniforms[0] * sum_up_blocks());
            set_masses([&](int64_t row) { return pick == 0 ? first_mass(row, picked) : T(0); });
            return picked;
        }
        for (int64_t l = 0; l < a_.candidates; ++l) candidates_[l] = row_at(uniforms[l] * total);
        find_possible(total);
        for (int64_t group = 0; group < groups_; ++group)
            if (possible_[group] != 0) try_candidates(group);
        const int64_t best = least_mass();
        accept(trials_[best / kCandidateLanes], static_cast<int>(best % kCandidateLanes));
        return candidates_[best];
    }

    T weight(int64_t row) const { return weights_ == nullptr ? T(1) : weights_[row]; }

    T first_mass(int64_t row, int64_t picked) {
        const T mass = weight(row) * squared_difference(x_ + row * a_.d, x_ + picked * a_.d, a_.d);
        note_mass(row, mass);
        return mass;
    }

    void note_mass(int64_t row, T mass) {
        if constexpr (kCertifies<T>)
            if (shortlist_ != nullptr) shortlist_->screen().set_nearest(row, mass, weight(row));
    }

    int64_t begin_of(int64_t block) const { return block * kBlockRows; }
    int64_t end_of(int64_t block) const { return block + 1 < blocks_ ? (block + 1) * kBlockRows : a_.n; }

    template <class Mass>
    void set_masses(const Mass& mass) {
        for_pieces(pieces_, blocks_, [&](int, int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                double sum = 0;
                for (int64_t row = begin_of(block); row < end_of(block); ++row) {
                    masses_[row] = mass(row);
                    sum += static_cast<double>(masses_[row]);
                }
                block_masses_[block] = sum;
            }
        });
    }

    /// The sum of all masses; leaves those before each block.
    double sum_up_blocks() {
        double sum = 0;
        for (int64_t block = 0; block < blocks_; ++block) {
            masses_before_[block] = sum;
            sum += block_masses_[block];
        }
        return sum;
    }

    /// The lowest row whose prefix sum of masses exceeds `target`, the last row with mass where rounding hides it.
    int64_t row_at(double target) const {
        int64_t block = 0;
        for (int64_t end = blocks_; end - block > 1;) {
            const int64_t middle = block + (end - block) / 2;
            (masses_before_[middle] > target ? end : block) = middle;
        }
        double sum = masses_before_[block];
        if (!(sum + block_masses_[block] > target)) return last_with_mass(a_.n);
        for (int64_t row = begin_of(block); row < end_of(block); ++row) {
            sum += static_cast<double>(masses_[row]);
            if (sum > target) return row;
        }
        return last_with_mass(end_of(block));
    }

    /// Before `end`.
    int64_t last_with_mass(int64_t end) const {
        int64_t row = end - 1;
        while (row > 0 && !(masses_[row] > 0)) --row;
        return row;
    }

    void find_possible(double total) {
        if constexpr (kCertifies<T>)
            if (shortlist_ != nullptr)
                return shortlist_->choose(candidates_, a_.candidates, masses_, weights_, total, possible_);
        for (int64_t group = 0; group < groups_; ++group) possible_[group] = (1U << group_size(group)) - 1;
    }

    int group_size(int64_t group) const {
        const int64_t left = a_.candidates - group * kCandidateLanes;
        return static_cast<int>(left < kCandidateLanes ? left : kCandidateLanes);
    }

    void try_candidates(int64_t group) {
        candidate_rows_.set(x_, candidates_ + group * kCandidateLanes, group_size(group));
        for_pieces(pieces_, span_count(a_.n), [&](int, int64_t begin, int64_t end) {
            for (int64_t span = begin; span < end; ++span) try_candidates(group, span);
        });
    }

    void try_candidates(int64_t group, int64_t span) {
        const Trial& trial = trials_[group];
        Open open;
        find_open(group, span, open);
        const int64_t end = (span_end(span, a_.n) + kBlockRows - 1) / kBlockRows;
        for (int64_t block = span * (kSpanRows / kBlockRows), o = 0; block < end; ++block) {
            const int64_t begin = begin_of(block), shift = begin - span * kSpanRows;
            int8_t count = 0;
            for (; o < open.count && open.offsets[o] < shift + kBlockRows; ++o) {
                fetch(open, o, span);
                trial.offsets[begin + count] = static_cast<int8_t>(open.offsets[o] - shift);
                count += measure(span * kSpanRows + open.offsets[o], open.nearer[o], trial.left[begin + count]);
            }
            trial.counts[block] = count;
            sum_up(trial, block);
        }
    }

    void find_open(int64_t group, int64_t span, Open& open) const {
        const int64_t first = span * kSpanRows;
        const unsigned possible = possible_[group];
        if constexpr (kCertifies<T>)
            if (shortlist_ != nullptr)
                return shortlist_->for_rows(group, span,
                                            [&](int64_t row, unsigned nearer) { open.add(row - first, nearer & possible); });
        for (int64_t row = first; row < span_end(span, a_.n); ++row)  // one without mass stays so
            open.add(row - first, masses_[row] > 0 ? possible : 0);
    }

    /// Has rows after the o-th on their way, where they lie apart in memory.
    [[gnu::always_inline]] void fetch(const Open& open, int64_t o, int64_t span) const {
        constexpr int64_t kAhead = 8, kLine = 64 / sizeof(T);
        for (int64_t next = o == 0 ? 1 : o + kAhead; next <= o + kAhead && next < open.count; ++next) {
            const T* row = x_ + (span * kSpanRows + open.offsets[next]) * a_.d;
            for (int64_t j = 0; j < a_.d; j += kLine) __builtin_prefetch(row + j);
        }
    }

    /// The masses of a row that `nearer` candidates would leave, and whether one of them is less.
    bool measure(int64_t row, unsigned nearer, CandidateVector<T>& left) const {
        const T* x = x_ + row * a_.d;
        const T mass = masses_[row];
        CandidateVector<T> masses;
        constexpr int kOneByOne = 2;
        if (__builtin_popcount(nearer) > kOneByOne) {
            candidate_rows_.measure(x, masses);
            masses *= weight(row);
        } else {
            masses = mass - CandidateVector<T>{};
            for (; nearer != 0; nearer &= nearer - 1) {
                const int l = __builtin_ctz(nearer);
                masses[l] = weight(row) * squared_difference(x, candidate_rows_.row(l), a_.d);
            }
        }
        const auto less = masses < mass;
        left = less ? masses : mass - CandidateVector<T>{};
        return any(less);
    }

    template <class Mask>
    static bool any(const Mask& mask) {
        int64_t words[sizeof(Mask) / 8], found = 0;
        __builtin_memcpy(words, &mask, sizeof(Mask));
        for (const int64_t word : words) found |= word;
        return found != 0;
    }

    /// What is left in a block, over its rows in order.
    void sum_up(const Trial& trial, int64_t block) const {
        const int64_t begin = begin_of(block);
        CandidateVector<double> sums = {};
        if (trial.counts[block] == 0) {
            trial.block_masses[block] = sums + block_masses_[block];
            return;
        }
        int64_t row = begin;
        for (int64_t i = begin; i < begin + trial.counts[block]; ++i, ++row) {
            for (; row < begin + trial.offsets[i]; ++row) sums += static_cast<double>(masses_[row]);
            sums += __builtin_convertvector(trial.left[i], CandidateVector<double>);
        }
        for (; row < end_of(block); ++row) sums += static_cast<double>(masses_[row]);
        trial.block_masses[block] = sums;
    }

    /// The candidate that leaves the least mass, the first of equals.
    int64_t least_mass() const {
        int64_t best = -1;
        double least = 0;
        for (int64_t group = 0; group < groups_; ++group) {
            if (possible_[group] == 0) continue;
            CandidateVector<double> sums = {};
            for (int64_t block = 0; block < blocks_; ++block) sums += trials_[group].block_masses[block];
            for (unsigned possible = possible_[group]; possible != 0; possible &= possible - 1) {
                const int l = __builtin_ctz(possible);
                if (best < 0 || sums[l] < least) least = sums[l], best = group * kCandidateLanes + l;
            }
        }
        return best;
    }

    void accept(const Trial& trial, int lane) {
        for_pieces(pieces_, blocks_, [&](int, int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                const int64_t begin = begin_of(block);
                for (int64_t i = begin; i < begin + trial.counts[block]; ++i) {
                    const int64_t row = begin + trial.offsets[i];
                    const T left = trial.left[i][lane];
                    if (!(left < masses_[row])) continue;
                    masses_[row] = left;
                    note_mass(row, left);
                }
                block_masses_[block] = trial.block_masses[block][lane];
            }
        });
    }

    const PlusPlus<T>& a_;
    const int pieces_;
    const int64_t blocks_, groups_;  // of rows, of candidates
    T* masses_;                      // (N)
    double* block_masses_;           // (blocks)
    double* masses_before_;          // (blocks) of all blocks before, when a row is drawn
    int64_t* candidates_;            // (L)
    CandidateRows<T> candidate_rows_;
    unsigned* possible_;  // (groups) bit l: its candidate l may be the one to pick
    Trial* trials_;       // (groups)
    Shortlist<T>* shortlist_ = nullptr;

    const T* x_ = nullptr;
    const T* weights_ = nullptr;
};

}  // namespace

template <class T>
void plus_plus(const PlusPlus<T>& a, const Context& context) {
    for_problems<Sampler<T>>(a, context, [](Sampler<T>& sampler, int64_t problem) { sampler.draw_problem(problem); });
}

template void plus_plus<float>(const PlusPlus<float>&, const Context&);
template void plus_plus<double>(const PlusPlus<double>&, const Context&);

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

#include "kmeans/kmeans_cpu.h"
#include "kmeans/nearest.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {
namespace {

/// |x - c|^2 in T: exactly zero where the rows are equal.
template <class T>
T squared_difference(const T* x, const T* c, int64_t d) {
    typedef T Unaligned __attribute__((vector_size(products::kVectorBytes), aligned(sizeof(T)), may_alias));
    constexpr int kLanes = products::kLanes<T>;
    Unaligned even = {}, odd = {};
    int64_t j = 0;
    for (; j + 2 * kLanes <= d; j += 2 * kLanes) {
        const Unaligned left = *reinterpret_cast<const Unaligned*>(x + j) - *reinterpret_cast<const Unaligned*>(c + j);
        const Unaligned right =
            *reinterpret_cast<const Unaligned*>(x + j + kLanes) - *reinterpret_cast<const Unaligned*>(c + j + kLanes);
        even += left * left;
        odd += right * right;
    }
    T sums[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = even[lane] + odd[lane];
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    for (; j < d; ++j) sums[0] += (x[j] - c[j]) * (x[j] - c[j]);
    return sums[0];
}

/// Draws the rows of one problem and start after another. masses_[i] is w_i times the squared distance of row i to its nearest
/// pick; its sums per block of rows make a draw cheap, and are added up in order so that threads do not matter.
template <class T>
class Sampler {
   public:
    Sampler(const PlusPlus<T>& a, int pieces, const Context& context)
        : a_(a),
          pieces_(pieces),
          blocks_((a.n + kBlockRows - 1) / kBlockRows),
          masses_(context.scratch<T>(a.n)),
          block_masses_(context.scratch<double>(blocks_)),
          candidate_masses_(context.scratch<T>(a.candidates * a.n)),
          candidate_block_masses_(context.scratch<double>(a.candidates * blocks_)),
          candidates_(context.scratch<int64_t>(a.candidates)) {}

    void draw_problem(int64_t problem) {
        x_ = a_.x + problem * a_.n * a_.d;
        weights_ = a_.sample_weight == nullptr ? nullptr : a_.sample_weight + problem * a_.n;
        for (int64_t restart = 0; restart < a_.restarts; ++restart) {
            const int64_t run = problem * a_.restarts + restart;
            const T* uniforms = a_.uniforms + run * a_.k * a_.candidates;
            int64_t* rows = a_.rows + run * a_.k;
            for (int64_t pick = 0; pick < a_.k; ++pick) rows[pick] = next(pick, uniforms + pick * a_.candidates);
        }
    }

   private:
    int64_t next(int64_t pick, const T* uniforms) {
        const double total = pick == 0 ? 0 : total_mass(block_masses_);
        if (total == 0) {
            weigh_rows();
            candidates_[0] = row_at(uniforms[0] * total_mass(block_masses_));
            measure(1, pick == 0);
            return accept(0);
        }
        for (int64_t l = 0; l < a_.candidates; ++l) candidates_[l] = row_at(uniforms[l] * total);
        measure(a_.candidates, false);
        int64_t best = 0;
        double least = total_mass(candidate_block_masses_);
        for (int64_t l = 1; l < a_.candidates; ++l) {
            const double mass = total_mass(candidate_block_masses_ + l * blocks_);
            if (mass < least) least = mass, best = l;
        }
        return accept(best);
    }

    double total_mass(const double* block_masses) const {
        double sum = 0;
        for (int64_t block = 0; block < blocks_; ++block) sum += block_masses[block];
        return sum;
    }

    int64_t begin_of(int64_t block) const { return block * kBlockRows; }
    int64_t end_of(int64_t block) const { return block + 1 < blocks_ ? (block + 1) * kBlockRows : a_.n; }

    /// The lowest row whose prefix sum of masses exceeds `target`, the last row with mass where rounding hides it.
    int64_t row_at(double target) const {
        double sum = 0;
        int64_t found = 0;
        for (int64_t block = 0; block < blocks_; ++block) {
            if (block_masses_[block] == 0) continue;
            const bool here = sum + block_masses_[block] > target;
            double inner = sum;
            for (int64_t row = begin_of(block); here && row < end_of(block); ++row) {
                if (!(masses_[row] > 0)) continue;
                found = row;
                inner += static_cast<double>(masses_[row]);
                if (inner > target) break;
            }
            if (here) return found;
            sum += block_masses_[block];
            last_with_mass(block, found);
        }
        return found;
    }

    void last_with_mass(int64_t block, int64_t& found) const {
        for (int64_t row = end_of(block) - 1; row >= begin_of(block); --row)
            if (masses_[row] > 0) {
                found = row;
                return;
            }
    }

    void weigh_rows() {
        for (int64_t block = 0; block < blocks_; ++block) {
            block_masses_[block] = 0;
            for (int64_t row = begin_of(block); row < end_of(block); ++row) {
                masses_[row] = weights_ == nullptr ? T(1) : weights_[row];
                block_masses_[block] += static_cast<double>(masses_[row]);
            }
        }
    }

    /// What masses would be left were candidate l picked, for l < count.
    void measure(int64_t count, bool first) {
        for_pieces(pieces_, blocks_, [&](int, int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block)
                for (int64_t l = 0; l < count; ++l) {
                    const T* candidate = x_ + candidates_[l] * a_.d;
                    T* left = candidate_masses_ + l * a_.n;
                    double sum = 0;
                    for (int64_t row = begin_of(block); row < end_of(block); ++row) {
                        const T mass =
                            (weights_ == nullptr ? T(1) : weights_[row]) * squared_difference(x_ + row * a_.d, candidate, a_.d);
                        left[row] = first || mass < masses_[row] ? mass : masses_[row];
                        sum += static_cast<double>(left[row]);
                    }
                    candidate_block_masses_[l * blocks_ + block] = sum;
                }
        });
    }

    int64_t accept(int64_t l) {
        for (int64_t row = 0; row < a_.n; ++row) masses_[row] = candidate_masses_[l * a_.n + row];
        for (int64_t block = 0; block < blocks_; ++block) block_masses_[block] = candidate_block_masses_[l * blocks_ + block];
        return candidates_[l];
    }

    const PlusPlus<T>& a_;
    const int pieces_;
    const int64_t blocks_;
    T* masses_;                       // (N)
    double* block_masses_;            // (blocks)
    T* candidate_masses_;             // (L, N)
    double* candidate_block_masses_;  // (L, blocks)
    int64_t* candidates_;             // (L)

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

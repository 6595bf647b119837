// Neighbour lists to a symmetrised CSR matrix without a sort. W's entries go to buckets by their columns; a bucket, small
// enough for a cache, gives some rows of W^T; each of these meets W's own row in a dense one, whose map of bits gives its
// entries back in ascending order.
#include <atomic>
#include <cmath>
#include <stdexcept>

#include "common/parallel.h"
#include "knn/buffer.h"
#include "knn/graph.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {
namespace {

template <class T>
struct Entry {
    int32_t column;
    T weight;
};

/// A row of the result. The bits say which columns it holds, a bit of a group which words of those are not zero.
template <class T>
class DenseRow {
   public:
    explicit DenseRow(int64_t n)
        : group_count_((n + 4095) / 4096), weights_(n), columns_(n + 1), bits_(group_count_ * 64), groups_(group_count_) {
        for (int64_t w = 0; w < group_count_ * 64; ++w) bits_.data[w] = 0;
        for (int64_t g = 0; g < group_count_; ++g) groups_.data[g] = 0;
    }

    template <bool kMax>
    void add(int64_t column, T weight) {
        uint64_t& word = bits_.data[column / 64];
        const uint64_t bit = uint64_t{1} << (column % 64);
        const T before = word & bit ? weights_.data[column] : T(0);
        weights_.data[column] = !kMax ? before + weight : before > weight ? before : weight;
        word |= bit;
        groups_.data[column / 4096] |= uint64_t{1} << (column / 64 % 64);
    }

    /// Empties the row into `out`, columns ascending; returns how many.
    int64_t drain(Entry<T>* out) {
        const int64_t count = drain_columns();
        for (int64_t c = 0; c < count; ++c) out[c] = {columns_.data[c], weights_.data[columns_.data[c]]};
        return count;
    }

   private:
    /// Most words hold one column or two: both are written before it is known.
    int64_t drain_columns() {
        constexpr uint64_t kTop = uint64_t{1} << 63;
        int64_t count = 0;
        for (int64_t g = 0; g < group_count_; ++g) {
            for (uint64_t group = groups_.data[g]; group != 0; group &= group - 1) {
                const int64_t w = 64 * g + __builtin_ctzll(group);
                uint64_t word = bits_.data[w];
                const int64_t end = count + __builtin_popcountll(word);
                bits_.data[w] = 0;
                for (; count < end; count += 2) {
                    columns_.data[count] = static_cast<int32_t>(64 * w + __builtin_ctzll(word));
                    word &= word - 1;
                    columns_.data[count + 1] = static_cast<int32_t>(64 * w + __builtin_ctzll(word | kTop));
                    word &= word - 1;
                }
                count = end;
            }
            groups_.data[g] = 0;
        }
        return count;
    }

    int64_t group_count_;
    Buffer<T> weights_;
    Buffer<int32_t> columns_;
    Buffer<uint64_t> bits_, groups_;
};

/// weights = max(similarities, 0)^power.
template <class T>
void raise(const T* similarities, int64_t count, double power, T* weights) {
    constexpr int kMostFactors = 8;
    const int factors = power <= kMostFactors ? static_cast<int>(power) : 0;
    for (int64_t c = 0; c < count; ++c) weights[c] = similarities[c] > T(0) ? similarities[c] : T(0);
    if (factors == 0 || factors != power)
        for (int64_t c = 0; c < count; ++c) weights[c] = std::pow(weights[c], static_cast<T>(power));
    for (int f = 1; f < factors && factors == power; ++f)
        for (int64_t c = 0; c < count; ++c) weights[c] *= similarities[c];
}

template <class T>
class Builder {
   public:
    Builder(const Graph<T>& g, const Context& context) : g_(g), weights_(context.scratch<T>(g.n * g.k)) {
        while (g.n >> bucket_shift_ >= kMostBuckets) ++bucket_shift_;
        buckets_ = (g.n + bucket_rows() - 1) / bucket_rows();
        part_rows_ = kPartEntries / (g.k + 1) + 1;
        parts_ = (g.n + part_rows_ - 1) / part_rows_;
        ends_ = context.scratch<int64_t>(parts_ * buckets_);
        regions_ = context.scratch<int64_t>(buckets_ + 1);
        placed_ = context.scratch<Placed>(both() ? g.n * g.k : 0);
        fill_buckets();
        plan_regions();
        united_ = context.scratch<Entry<T>>(regions_[buckets_]);
    }

    void write() {
        g_.symmetrize == Symmetrize::max ? unite_buckets<true>() : unite_buckets<false>();
        g_.crow[0] = 0;
        for (int64_t i = 0; i < g_.n; ++i) g_.crow[i + 1] += g_.crow[i];
        copy_out(g_.allocate(g_.owner, g_.crow[g_.n]));
    }

   private:
    struct Placed {
        int32_t row;  // of W^T
        Entry<T> entry;
    };

    static constexpr int64_t kPartEntries = 16384;  // few enough to be met in a cache the second and the third time
    static constexpr int64_t kMostBuckets = 128;

    bool both() const { return g_.symmetrize != Symmetrize::none; }
    int64_t bucket_rows() const { return int64_t{1} << bucket_shift_; }
    int64_t first_of(int64_t bucket) const { return bucket << bucket_shift_ < g_.n ? bucket << bucket_shift_ : g_.n; }

    void fill_buckets() {
        std::atomic<bool> outside{false};
        parallel_for(0, parts_, 1, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) {
                const int64_t first = p * part_rows_, last = first + part_rows_ < g_.n ? first + part_rows_ : g_.n;
                if (!weigh(first, last))
                    outside.store(true, std::memory_order_relaxed);
                else
                    fill_buckets_of(p, first, last);
            }
        });
        if (outside.load()) throw std::invalid_argument("knn_graph: indices must be in [0, N)");
    }

    /// Halved for their mean, so that the rest only adds up. False where an index is none.
    bool weigh(int64_t first, int64_t last) {
        const int64_t begin = first * g_.k, end = last * g_.k;
        raise(g_.similarities + begin, end - begin, g_.power, weights_ + begin);
        if (g_.symmetrize == Symmetrize::mean)
            for (int64_t e = begin; e < end; ++e) weights_[e] /= 2;
        uint64_t signs = 0;  // of j and of n - 1 - j: no branch, so that many are looked at together
        for (int64_t e = begin; e < end; ++e) {
            const auto j = static_cast<uint64_t>(g_.indices[e]);
            signs |= j | (static_cast<uint64_t>(g_.n) - 1 - j);
        }
        return signs >> 63 == 0;
    }

    /// A part's entries by their buckets, where the part begins; ends_ tells where each bucket of it ends.
    void fill_buckets_of(int64_t part, int64_t first, int64_t last) {
        int64_t* at = ends_ + part * buckets_;
        for (int64_t b = 0; b < buckets_; ++b) at[b] = 0;
        if (!both()) return;
        for (int64_t e = first * g_.k; e < last * g_.k; ++e) at[g_.indices[e] >> bucket_shift_] += weights_[e] != T(0);
        int64_t before = first * g_.k;
        for (int64_t b = 0; b < buckets_; ++b) {
            const int64_t count = at[b];
            at[b] = before;
            before += count;
        }
        Placed* const placed = placed_;
        const int64_t shift = bucket_shift_;
        for (int64_t i = first; i < last; ++i)
            for (int64_t e = i * g_.k; e < (i + 1) * g_.k; ++e) {
                const int64_t j = g_.indices[e];
                const T weight = weights_[e];
                if (weight == T(0)) continue;
                placed[at[j >> shift]++] = {static_cast<int32_t>(j), {static_cast<int32_t>(i), weight}};
            }
    }

    /// Where a part's entries of the bucket begin.
    int64_t begin_of(int64_t part, int64_t bucket) const {
        return bucket > 0 ? ends_[part * buckets_ + bucket - 1] : part * part_rows_ * g_.k;
    }

    /// Calls visit(entry) for the bucket's entries, in the order of W's rows.
    template <class Visit>
    void for_each_placed(int64_t bucket, const Visit& visit) const {
        for (int64_t p = 0; p < parts_ && both(); ++p)
            for (int64_t e = begin_of(p, bucket); e < ends_[p * buckets_ + bucket]; ++e) visit(placed_[e]);
    }

    /// Where each bucket's rows of the result are put together: there is room for W's and W^T's entries.
    void plan_regions() {
        regions_[0] = 0;
        for (int64_t b = 0; b < buckets_; ++b) {
            int64_t room = (first_of(b + 1) - first_of(b)) * g_.k;
            for (int64_t p = 0; p < parts_ && both(); ++p) room += ends_[p * buckets_ + b] - begin_of(p, b);
            regions_[b + 1] = regions_[b] + room;
        }
    }

    template <bool kMax>
    void unite_buckets() {
        parallel_for(0, buckets_, 1, [&](int64_t begin, int64_t end) {
            DenseRow<T> dense(g_.n);
            Buffer<int64_t> starts(bucket_rows() + 1);
            for (int64_t b = begin; b < end; ++b) {
                transpose(b, starts.data);
                unite<kMax>(b, starts.data, dense);
            }
        });
    }

    /// W^T's rows of the bucket, at the end of its region: what is united grows from its beginning and never meets them.
    void transpose(int64_t bucket, int64_t* starts) {
        const int64_t first = first_of(bucket), rows = first_of(bucket + 1) - first;
        for (int64_t r = 0; r <= rows; ++r) starts[r] = 0;
        for_each_placed(bucket, [&](const Placed& placed) { ++starts[placed.row - first]; });
        int64_t after = regions_[bucket + 1];
        for (int64_t r = rows; r-- > 0;) starts[r] = after -= starts[r];
        for_each_placed(bucket, [&](const Placed& placed) { united_[starts[placed.row - first]++] = placed.entry; });
        for (int64_t r = rows; r > 0; --r) starts[r] = starts[r - 1];
        starts[0] = after;
    }

    template <bool kMax>
    void unite(int64_t bucket, const int64_t* starts, DenseRow<T>& dense) {
        const int64_t first = first_of(bucket), last = first_of(bucket + 1);
        Entry<T>* out = united_ + regions_[bucket];
        for (int64_t i = first; i < last; ++i) {
            for (int64_t e = i * g_.k; e < (i + 1) * g_.k; ++e)
                if (weights_[e] != T(0)) dense.template add<kMax>(g_.indices[e], weights_[e]);
            for (int64_t e = starts[i - first]; e < starts[i - first + 1]; ++e)
                dense.template add<kMax>(united_[e].column, united_[e].weight);
            const int64_t count = dense.drain(out);
            g_.crow[i + 1] = count;
            out += count;
        }
    }

    void copy_out(const Edges<T>& edges) {
        parallel_for(0, buckets_, 1, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) {
                const Entry<T>* from = united_ + regions_[b];
                for (int64_t e = g_.crow[first_of(b)]; e < g_.crow[first_of(b + 1)]; ++e, ++from) {
                    edges.col[e] = from->column;
                    edges.weights[e] = from->weight;
                }
            }
        });
    }

    const Graph<T>& g_;
    T* weights_;  // (N, k), as the neighbours come
    int64_t parts_, part_rows_, buckets_, bucket_shift_ = 6;
    int64_t *ends_, *regions_;  // (parts, buckets) of placed_, (buckets + 1) of united_
    Placed* placed_;
    Entry<T>* united_;
};

}  // namespace

template <class T>
void graph(const Graph<T>& g, const Context& context) {
    Builder<T>(g, context).write();
}

template void graph<float>(const Graph<float>&, const Context&);
template void graph<double>(const Graph<double>&, const Context&);

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

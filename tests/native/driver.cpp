// Every CPU kernel without torch, under a sanitizer: `driver THREADS` runs each at awkward sizes on that many std::threads and
// prints a digest of all results, which may not depend on THREADS. Inputs and outputs are of the exact size, so that an access
// beyond them is seen.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "common/parallel.h"
#include "diffusion/diffusion.h"
#include "kmeans/kmeans.h"
#include "knn/knn.h"
#include "pairwise_kl/pairwise_kl.h"
#include "soft_assign/soft_assign.h"

namespace {

int threads = 1;
uint64_t digest = 1469598103934665603ULL;  // FNV-1a

}  // namespace

namespace fastclust {

int num_threads() {
    return threads;
}

void run_parallel(int64_t begin, int64_t end, int64_t grain, TaskRange range, void* closure) {
    const int64_t pieces =
        std::min<int64_t>(threads, (end - begin + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1));
    std::vector<std::thread> running;
    for (int64_t p = 0; p < pieces; ++p)
        running.emplace_back(range, begin + (end - begin) * p / pieces, begin + (end - begin) * (p + 1) / pieces, closure);
    for (std::thread& thread : running) thread.join();
}

}  // namespace fastclust

namespace {

using fastclust::Context;

struct Host {
    std::vector<void*> blocks;
    Context context{this, [](void* owner, size_t bytes) {
                        void* block = std::aligned_alloc(64, std::max<size_t>(64, (bytes + 63) / 64 * 64));
                        static_cast<Host*>(owner)->blocks.push_back(block);
                        return block;
                    }};
    ~Host() {
        for (void* block : blocks) std::free(block);
    }
};

template <class T>
void note(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) digest = (digest ^ bytes[i]) * 1099511628211ULL;
}

template <class T>
std::vector<T> gaussian(int64_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<T> values(count);
    for (T& value : values) value = static_cast<T>(std::normal_distribution<double>()(random));
    return values;
}

std::vector<int64_t> labels_below(int64_t count, int64_t classes) {
    std::vector<int64_t> labels(count);
    for (int64_t i = 0; i < count; ++i) labels[i] = i * 7 % (classes + 1) - 1;
    return labels;
}

template <class T>
void run_kmeans(int64_t batch, int64_t n, int64_t k, int64_t d) {
    const auto& kernels = fastclust::kmeans::FASTCLUST_CAPABILITY::kernels<T>();
    constexpr int64_t kRestarts = 2, kCandidates = 3;
    const auto x = gaussian<T>(batch * n * d, 1);
    auto uniforms = gaussian<T>(batch * kRestarts * k * kCandidates, 2);
    for (T& u : uniforms) u = std::abs(u) - std::floor(std::abs(u));
    std::vector<int64_t> rows(batch * kRestarts * k), labels(batch * kRestarts * n), n_iter(batch * kRestarts);
    std::vector<T> init(batch * kRestarts * k * d), centroids(init.size()), inertia(batch * kRestarts);
    const Host seeding;
    kernels.plus_plus({batch, kRestarts, n, k, d, kCandidates, x.data(), nullptr, uniforms.data(), rows.data()},
                      seeding.context);
    note(rows);
    for (size_t i = 0; i < rows.size(); ++i) {
        const T* row = x.data() + (static_cast<int64_t>(i) / (kRestarts * k) * n + rows[i]) * d;
        std::copy(row, row + d, init.begin() + static_cast<int64_t>(i) * d);
    }
    const Host lloyd;
    kernels.lloyd({batch, kRestarts, n, k, d, x.data(), init.data(), nullptr, nullptr, 40, 0.0, false, true, centroids.data(),
                   labels.data(), inertia.data(), n_iter.data()},
                  lloyd.context);
    note(centroids), note(labels), note(inertia), note(n_iter);
    const std::vector<T> first(centroids.begin(), centroids.begin() + k * d);
    std::vector<int64_t> nearest(n);
    std::vector<T> distances(n);
    const Host assign;
    kernels.assign({1, n, k, d, x.data(), first.data(), true, nearest.data(), distances.data()}, assign.context);
    note(nearest), note(distances);
}

#if defined(__AVX512VNNI__)
/// Enough rows, in groups, for the search to order them by clusters; of one cluster far more than of the others.
void run_clusters() {
    namespace knn = fastclust::knn;
    constexpr int64_t n = 2100, d = 67, k = 3, groups = 11;
    const auto centres = gaussian<float>(groups * d, 8);
    auto x = gaussian<float>(n * d, 9);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < d; ++j) x[i * d + j] = x[i * d + j] / 2 + centres[(i % 2 == 0 ? 0 : i % groups) * d + j];
    std::vector<float> values(n * k);
    std::vector<int64_t> indices(n * k);
    const Host search;
    knn::FASTCLUST_CAPABILITY::kernels<float>().search(
        {n, n, k, d, x.data(), nullptr, knn::Metric::euclidean, true, values.data(), indices.data()}, search.context);
    note(values), note(indices);
}
#endif

template <class T>
void run_graph(int64_t n, int64_t k, int64_t d, int64_t columns) {
    namespace knn = fastclust::knn;
    const auto x = gaussian<T>(n * d, 3);
    std::vector<T> values(n * k);
    std::vector<int64_t> indices(n * k), crow(n + 1);
    for (const auto metric : {knn::Metric::euclidean, knn::Metric::inner_product, knn::Metric::cosine}) {
        const Host search;
        knn::FASTCLUST_CAPABILITY::kernels<T>().search(
            {n, n, k, d, x.data(), nullptr, metric, true, values.data(), indices.data()}, search.context);
        note(values), note(indices);
    }
    struct Made {
        std::vector<int64_t> col;
        std::vector<T> weights;
    } made;
    const Host graph;
    knn::FASTCLUST_CAPABILITY::kernels<T>().graph(
        {n, k, values.data(), indices.data(), 3.0, knn::Symmetrize::sum, crow.data(), &made,
         [](void* owner, int64_t count) {
             auto& out = *static_cast<Made*>(owner);
             out.col.resize(count), out.weights.resize(count);
             return knn::Edges<T>{out.col.data(), out.weights.data()};
         }},
        graph.context);
    note(crow), note(made.col), note(made.weights);

    const auto y = gaussian<T>(n * columns, 4);
    std::vector<T> f(n * columns), residual(columns);
    std::vector<int64_t> n_iter(columns);
    const auto edges = static_cast<int64_t>(made.col.size());
    const Host diffusion;
    fastclust::diffusion::FASTCLUST_CAPABILITY::kernels<T>().solve(
        {{n, edges, crow.data(), made.col.data(), made.weights.data()},
         columns,
         y.data(),
         0.9,
         1e-6,
         10,
         f.data(),
         residual.data(),
         n_iter.data()},
        diffusion.context);
    note(f), note(residual), note(n_iter);
}

template <class T>
void run_pairs(int64_t b, int64_t k, int64_t d) {
    const auto x = gaussian<T>(b * d, 5), centroids = gaussian<T>(k * d, 6), grad = gaussian<T>(b * k, 7);
    std::vector<T> log_p(b * k), grad_x(b * d), grad_centroids(k * d), loss(1), grad_log_p(b * k);
    const Host assign;
    const auto& soft = fastclust::soft_assign::FASTCLUST_CAPABILITY::kernels<T>();
    soft.forward({b, k, d, x.data(), centroids.data(), log_p.data()}, assign.context);
    soft.backward({b, k, d, grad.data(), x.data(), centroids.data(), log_p.data(), grad_x.data(), grad_centroids.data()},
                  assign.context);
    note(log_p), note(grad_x), note(grad_centroids);

    const auto labels = labels_below(b, 3);
    const Host pairs;
    const fastclust::pairwise_kl::Batch<T> batch{b, k, log_p.data(), labels.data(), 2};
    fastclust::pairwise_kl::FASTCLUST_CAPABILITY::kernels<T>().loss({batch, false, loss.data(), grad_log_p.data()},
                                                                    pairs.context);
    note(loss), note(grad_log_p);
}

template <class T>
void run_all() {
    run_kmeans<T>(1, 1, 1, 1);
    run_kmeans<T>(3, 67, 5, 3);
    run_kmeans<T>(1, 900, 33, 17);
    run_kmeans<T>(1, 130, 19, 150);
    run_graph<T>(2, 1, 1, 1);
    run_graph<T>(301, 9, 17, 5);
    run_graph<T>(40, 39, 65, 33);
    run_graph<T>(700, 21, 35, 3);
    run_graph<T>(513, 5, 131, 1);
    run_pairs<T>(2, 1, 1);
    run_pairs<T>(131, 33, 7);
}

}  // namespace

int main(int, char** argv) {
    threads = std::atoi(argv[1]);
    run_all<float>();
    run_all<double>();
#if defined(__AVX512VNNI__)
    run_clusters();
#endif
    std::printf("%016llx\n", static_cast<unsigned long long>(digest));
}

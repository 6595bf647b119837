#include <cmath>

#include "common/parallel.h"
#include "soft_assign/soft_assign.h"

namespace fastclust::soft_assign::FASTCLUST_CAPABILITY {
namespace {

constexpr int kRows = 4;         // rows of x per pass over the centroids
constexpr int kClusters = 32;    // clusters whose distances are summed side by side
constexpr int64_t kBlock = 256;  // rows per partial sum of grad_centroids, unless that makes more than kMaxBlocks
constexpr int64_t kMaxBlocks = 64;

/// -|x_n - mu_k|^2 for `rows` rows of x, into log_p; `transposed` holds the centroids as (D, padded K).
template <class T>
void negative_distances(const Forward<T>& a, const T* transposed, int64_t padded, int64_t row, int rows) {
    for (int64_t first = 0; first < a.k; first += kClusters) {
        T sum[kRows][kClusters] = {};
        for (int64_t j = 0; j < a.d; ++j) {
            const T* mu = transposed + j * padded + first;
            for (int r = 0; r < rows; ++r) {
                const T x = a.x[(row + r) * a.d + j];
                for (int c = 0; c < kClusters; ++c) sum[r][c] += (x - mu[c]) * (x - mu[c]);
            }
        }
        const int clusters = static_cast<int>(a.k - first < kClusters ? a.k - first : kClusters);
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < clusters; ++c) a.log_p[(row + r) * a.k + first + c] = -sum[r][c];
    }
}

template <class T>
void normalise(T* log_p, int64_t k) {
    T largest = log_p[0];
    for (int64_t c = 1; c < k; ++c) largest = log_p[c] > largest ? log_p[c] : largest;
    double sum = 0;
    for (int64_t c = 0; c < k; ++c) {
        log_p[c] -= largest;
        sum += static_cast<double>(std::exp(log_p[c]));
    }
    const T log_sum = static_cast<T>(std::log(sum));
    for (int64_t c = 0; c < k; ++c) log_p[c] -= log_sum;
}

template <class T>
void forward(const Forward<T>& a, const Context& context) {
    const int64_t padded = (a.k + kClusters - 1) / kClusters * kClusters;
    T* transposed = context.scratch<T>(a.d * padded);
    for (int64_t j = 0; j < a.d; ++j)
        for (int64_t c = 0; c < padded; ++c) transposed[j * padded + c] = c < a.k ? a.centroids[c * a.d + j] : T(0);
    parallel_for(0, a.n, 32, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += kRows) {
            const int rows = static_cast<int>(end - row < kRows ? end - row : kRows);
            negative_distances(a, transposed, padded, row, rows);
            for (int r = 0; r < rows; ++r) normalise(a.log_p + (row + r) * a.k, a.k);
        }
    });
}

/// Rows [begin, end): their grad_x, and their share of grad_centroids added to `centroid_sums` (K, D).
template <class T>
void backward_rows(const Backward<T>& a, int64_t begin, int64_t end, T* centroid_sums) {
    for (int64_t i = 0; i < a.k * a.d; ++i) centroid_sums[i] = 0;
    for (int64_t row = begin; row < end; ++row) {
        const T *grad = a.grad + row * a.k, *log_p = a.log_p + row * a.k, *x = a.x + row * a.d;
        T *grad_x = a.grad_x + row * a.d, total = 0;
        for (int64_t c = 0; c < a.k; ++c) total += grad[c];
        for (int64_t j = 0; j < a.d; ++j) grad_x[j] = 0;
        for (int64_t c = 0; c < a.k; ++c) {
            const T t = 2 * (grad[c] - std::exp(log_p[c]) * total);
            const T* mu = a.centroids + c * a.d;
            T* sum = centroid_sums + c * a.d;
            for (int64_t j = 0; j < a.d; ++j) {
                const T share = t * (mu[j] - x[j]);
                grad_x[j] += share;
                sum[j] -= share;
            }
        }
    }
}

template <class T>
void backward(const Backward<T>& a, const Context& context) {
    const int64_t evenly = (a.n + kMaxBlocks - 1) / kMaxBlocks, block = evenly > kBlock ? evenly : kBlock;
    const int64_t blocks = (a.n + block - 1) / block, size = a.k * a.d;
    T* partial = context.scratch<T>(blocks * size);
    parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t last = (b + 1) * block < a.n ? (b + 1) * block : a.n;
            backward_rows(a, b * block, last, partial + b * size);
        }
    });
    for (int64_t i = 0; i < size; ++i) a.grad_centroids[i] = 0;
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t i = 0; i < size; ++i) a.grad_centroids[i] += partial[b * size + i];
}

template <class T>
constexpr Kernels<T> kTable{forward<T>, backward<T>};

}  // namespace

FASTCLUST_DEFINE_KERNELS

}  // namespace fastclust::soft_assign::FASTCLUST_CAPABILITY

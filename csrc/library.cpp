// Every op of fastclust, on one page. T is float32 or float64; sizes are in capitals; `?` marks an optional tensor.
// A change here needs a new SCHEMA in fastclust/_library.py, so that new Python never meets an old library.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastclust, m) {
    // Lloyd's algorithm from R starts per problem: x (B, N, D) T, init (B, R, K, D) T, sample_weight (B, N) T,
    // fixed_labels (B, N) int64 with -1 for free points
    // -> centroids (B, R, K, D) T, labels (B, R, N) int64, inertia (B, R) T, n_iter (B, R) int64
    m.def(
        "kmeans_lloyd(Tensor x, Tensor init, Tensor? sample_weight, Tensor? fixed_labels, int max_iter, float tol, "
        "bool spherical, bool exact) -> (Tensor centroids, Tensor labels, Tensor inertia, Tensor n_iter)");
    // D^2 sampling: x (B, N, D) T, sample_weight (B, N) T, uniforms (B, R, K, L) T in [0, 1): L candidates per pick, the best
    // kept -> rows of x (B, R, K) int64
    m.def("kmeans_plus_plus(Tensor x, Tensor? sample_weight, Tensor uniforms) -> Tensor");
    // Nearest centroid: x (B, N, D) T, centroids (B, K, D) T -> labels (B, N) int64, squared distances (B, N) T
    m.def("kmeans_assign(Tensor x, Tensor centroids, bool exact) -> (Tensor labels, Tensor distances)");

    // Exact neighbours: x (N, D) T, queries (M, D) T or none for the graph of x with itself, self excluded
    // -> values (M, k) T, indices (M, k) int64, best first. metric: cosine, inner_product or euclidean
    m.def("knn(Tensor x, Tensor? queries, int k, str metric, bool exact) -> (Tensor values, Tensor indices)");
    // Affinity graph: similarities (N, k) T, indices (N, k) int64 -> CSR of W or its symmetrised sum, mean or maximum,
    // w_ij = max(similarity, 0)^power; crow (N + 1) int64, col (E) int64 ascending in each row, weights (E) T
    m.def(
        "knn_to_csr(Tensor similarities, Tensor indices, float power, str symmetrize) "
        "-> (Tensor crow, Tensor col, Tensor weights)");

    // Block CG on (I - alpha D^-1/2 W D^-1/2) F = Y: crow (N + 1) int64, col (E) int64, weights (E) T, y (N, C) T
    // -> f (N, C) T, relative residual (C) T, n_iter (C) int64
    m.def(
        "diffuse(Tensor crow, Tensor col, Tensor weights, Tensor y, float alpha, float tol, int max_iter) "
        "-> (Tensor f, Tensor residual, Tensor n_iter)");

    // log softmax_k of -|x - mu_k|^2: x (N, D) T, centroids (K, D) T -> log_p (N, K) T
    m.def("soft_assign(Tensor x, Tensor centroids) -> Tensor");
    m.def(
        "soft_assign_backward(Tensor grad, Tensor x, Tensor centroids, Tensor log_p) "
        "-> (Tensor grad_x, Tensor grad_centroids)");

    // Contrastive symmetric KL over all pairs of rows: log_p (B, K) T, labels (B) int64 with -1 for rows in no pair
    // -> loss () T and, with_grad, its gradient (B, K) T, else (0, K): both want the same pairs. detach_target holds the first
    // argument of each KL fixed in the gradient
    m.def(
        "pairwise_kl(Tensor log_p, Tensor labels, float margin, bool detach_target, bool with_grad) "
        "-> (Tensor loss, Tensor grad)");
}

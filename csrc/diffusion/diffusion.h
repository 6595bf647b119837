// Label diffusion on a graph (Zhou et al. 2004; Iscen et al. 2019): (I - alpha S) F = Y, S = D^-1/2 W D^-1/2, for all columns
// of Y at once by conjugate gradients, each column with step sizes and a stopping test of its own.
#pragma once

#include <cstdint>

#include "common/context.h"
#include "common/kernels.h"

namespace fastclust::diffusion {

/// The symmetric weights W (N, N) in CSR.
template <class T>
struct Graph {
    int64_t n, edges;
    const int64_t* crow;  // (N + 1)
    const int64_t* col;   // (E) ascending in each row
    const T* weights;     // (E) finite, not negative
};

enum class Fault { none, crow, column_range, column_order, weight };

struct Finding {
    Fault fault = Fault::none;
    int64_t row = -1;  // the first row with a fault; -1 where crow as a whole is wrong
};

template <class T>
struct Solve {
    Graph<T> graph;
    int64_t c;
    const T* y;  // (N, C)
    double alpha, tol;
    int64_t max_iter;
    T* f;             // (N, C) out
    T* residual;      // (C) out: |y - (I - alpha S) f| / |y| of the f returned; 0 where y is 0
    int64_t* n_iter;  // (C) out: steps until the recurrence for that ratio came to tol, at most max_iter
};

template <class T>
struct Kernels {
    /// Whether crow and col are a CSR of the size told and the weights finite and not negative. Waits for the device.
    Finding (*inspect)(const Graph<T>&, const Context&);
    /// Rows of degree 0 have a zero row in S, so F = Y there. N is below 2^31.
    void (*solve)(const Solve<T>&, const Context&);
};

FASTCLUST_DECLARE_KERNELS

}  // namespace fastclust::diffusion

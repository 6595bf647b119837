// What the CUDA sources of this room share.
#pragma once

#include "common/cuda.h"
#include "knn/knn.h"

namespace fastclust::knn::cuda {

template <class T>
void search(const Search<T>& a, const Context& context);

template <class T>
void graph(const Graph<T>& a, const Context& context);

}  // namespace fastclust::knn::cuda

// The graph's kernel for this capability: graph_cpu.cpp.
#pragma once

#include "knn/knn.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

template <class T>
void graph(const Graph<T>& g, const Context& context);

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

// What the room's CPU files offer each other.
#pragma once

#include "kmeans/kmeans.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

template <class T>
void lloyd(const Lloyd<T>& a, const Context& context);

template <class T>
void plus_plus(const PlusPlus<T>& a, const Context& context);

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY

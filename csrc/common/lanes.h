// The sum of a vector's lanes.
#pragma once

#include <cstddef>
#include <type_traits>

namespace fastclust::lanes::FASTCLUST_CAPABILITY {

/// Halves on halves. Vectors go by reference: handed over, they would warn where the CPU has none so wide.
template <class V>
inline auto sum(const V& vector) {
    constexpr std::size_t kBytes = sizeof(V), kCount = kBytes / sizeof(vector[0]);
    if constexpr (kCount == 2) {
        return vector[0] + vector[1];
    } else {
        using T = std::remove_cvref_t<decltype(vector[0])>;
        typedef T Half __attribute__((vector_size(kBytes / 2)));
        Half low, high;
        __builtin_memcpy(&low, &vector, kBytes / 2);
        __builtin_memcpy(&high, reinterpret_cast<const char*>(&vector) + kBytes / 2, kBytes / 2);
        const Half both = low + high;
        return sum(both);
    }
}

}  // namespace fastclust::lanes::FASTCLUST_CAPABILITY

// Working memory of one thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastclust::knn::FASTCLUST_CAPABILITY {

template <class T>
struct Buffer {
    T* data;

    explicit Buffer(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
        data = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (data == nullptr) throw std::bad_alloc();
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data); }
};

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

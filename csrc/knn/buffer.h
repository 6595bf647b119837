// Working memory that is gone before the op returns.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/context.h"

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

/// Scratch for a kernel that another one calls, freed when that is done with it.
class Arena {
   public:
    Context context{this, [](void* owner, size_t bytes) { return static_cast<Arena*>(owner)->allocate(bytes); }};

    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() {
        while (newest_ != nullptr) {
            Header* const older = newest_->older;
            std::free(newest_);
            newest_ = older;
        }
    }

   private:
    struct alignas(64) Header {
        Header* older;
    };

    void* allocate(size_t bytes) {
        auto* header = static_cast<Header*>(std::aligned_alloc(64, sizeof(Header) + (bytes + 127) / 64 * 64));
        if (header == nullptr) throw std::bad_alloc();
        header->older = newest_;
        newest_ = header;
        return header + 1;
    }

    Header* newest_ = nullptr;
};

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

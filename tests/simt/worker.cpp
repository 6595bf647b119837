// Serves tests/test_simt.py: reads calls from stdin, runs each under several thread orders, writes the results to stdout.
// A call: name, int64 arguments, double arguments, input arrays; a reply: output arrays. Every list is led by its length.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "common/finite.h"
#include "kmeans/kmeans.h"
#include "planted.h"
#include "simt.h"

namespace {

using fastclust::Context;
using Bytes = std::vector<unsigned char>;

constexpr int kOrders = 3;  // ascending, descending, shuffled

struct Call {
    std::string name;
    std::vector<int64_t> ints;
    std::vector<double> reals;
    std::vector<Bytes> arrays;

    std::vector<std::pair<void*, size_t>> outputs;

    template <class T>
    T* in(size_t i) const {
        if (arrays.at(i).empty()) return nullptr;
        void* memory = simt::allocate(arrays[i].size());
        std::memcpy(memory, arrays[i].data(), arrays[i].size());
        return static_cast<T*>(memory);
    }
    template <class T>
    T* out(int64_t count) {
        outputs.emplace_back(simt::allocate(static_cast<size_t>(count) * sizeof(T)), static_cast<size_t>(count) * sizeof(T));
        return static_cast<T*>(outputs.back().first);
    }
    Context context() const {
        Context c;
        c.allocate = [](void*, size_t bytes) { return simt::allocate(bytes); };
        return c;
    }
};

template <class T>
void finite_scan(Call& c) {
    const auto bad = fastclust::finite::cuda::kernels<T>().scan(c.in<T>(0), c.ints[0], c.ints[1], c.context());
    auto* out = c.out<int64_t>(2);
    out[0] = bad.count;
    out[1] = bad.first;
}

template <class T>
void kmeans_assign(Call& c) {
    const int64_t b = c.ints[0], n = c.ints[1], k = c.ints[2], d = c.ints[3];
    fastclust::kmeans::cuda::kernels<T>().assign(
        {b, n, k, d, c.in<T>(0), c.in<T>(1), c.ints[4] != 0, c.out<int64_t>(b * n), c.out<T>(b * n)}, c.context());
}

template <class T>
void kmeans_lloyd(Call& c) {
    fastclust::kmeans::Lloyd<T> a{};
    a.batch = c.ints[0], a.restarts = c.ints[1], a.n = c.ints[2], a.k = c.ints[3], a.d = c.ints[4];
    a.max_iter = c.ints[5], a.spherical = c.ints[6] != 0, a.exact = c.ints[7] != 0, a.tol = c.reals[0];
    a.x = c.in<T>(0), a.init = c.in<T>(1), a.sample_weight = c.in<T>(2), a.fixed_labels = c.in<int64_t>(3);
    const int64_t groups = a.batch * a.restarts;
    a.centroids = c.out<T>(groups * a.k * a.d), a.labels = c.out<int64_t>(groups * a.n);
    a.inertia = c.out<T>(groups), a.n_iter = c.out<int64_t>(groups);
    fastclust::kmeans::cuda::kernels<T>().lloyd(a, c.context());
}

template <class T>
void kmeans_plus_plus(Call& c) {
    fastclust::kmeans::PlusPlus<T> a{};
    a.batch = c.ints[0], a.restarts = c.ints[1], a.n = c.ints[2], a.k = c.ints[3], a.d = c.ints[4], a.candidates = c.ints[5];
    a.x = c.in<T>(0), a.sample_weight = c.in<T>(1), a.uniforms = c.in<T>(2);
    a.rows = c.out<int64_t>(a.batch * a.restarts * a.k);
    fastclust::kmeans::cuda::kernels<T>().plus_plus(a, c.context());
}

void planted(Call& c) {
    const std::string fault(c.arrays[1].begin(), c.arrays[1].end());
    const int64_t n = static_cast<int64_t>(c.arrays[0].size() / sizeof(float));
    auto* x = c.out<float>(n);
    std::memcpy(x, c.arrays[0].data(), c.arrays[0].size());
    fastclust::planted::run(fault, x, n);
}

#define FOR_BOTH_FLOATS(name)          \
    {#name ".float32", name<float>}, { \
        #name ".float64", name<double> \
    }

const std::map<std::string, void (*)(Call&)> kCalls = {
    {"planted", planted},          FOR_BOTH_FLOATS(finite_scan),      FOR_BOTH_FLOATS(kmeans_assign),
    FOR_BOTH_FLOATS(kmeans_lloyd), FOR_BOTH_FLOATS(kmeans_plus_plus),
};

template <class T>
bool read(T* target, size_t count) {
    return std::fread(target, sizeof(T), count, stdin) == count;
}

template <class T>
void read_list(std::vector<T>& list) {
    int64_t count = 0;
    if (!read(&count, 1)) std::exit(1);
    list.resize(static_cast<size_t>(count));
    if (!read(list.data(), list.size())) std::exit(1);
}

bool read_call(Call& call) {
    int64_t count = 0;
    if (!read(&count, 1)) return false;
    call.name.resize(static_cast<size_t>(count));
    read(call.name.data(), call.name.size());
    read_list(call.ints);
    read_list(call.reals);
    if (!read(&count, 1)) std::exit(1);
    call.arrays.resize(static_cast<size_t>(count));
    for (Bytes& array : call.arrays) read_list(array);
    return true;
}

/// The outputs, those of every order being the same.
std::vector<Bytes> serve(Call& call) {
    std::vector<Bytes> results;
    for (int order = 0; order < kOrders; ++order) {
        simt::set_order(order);
        call.outputs.clear();
        kCalls.at(call.name)(call);
        std::vector<Bytes> now;
        for (const auto& [memory, bytes] : call.outputs) {
            const auto* begin = static_cast<const unsigned char*>(memory);
            now.emplace_back(begin, begin + bytes);
        }
        simt::release_all();
        if (order > 0 && now != results)
            simt::fail("order: %s gives other results when threads run in another order", call.name.c_str());
        results = std::move(now);
    }
    return results;
}

void reply(const std::vector<Bytes>& arrays) {
    const auto put = [](const void* data, size_t bytes) { std::fwrite(data, 1, bytes, stdout); };
    const int64_t count = static_cast<int64_t>(arrays.size());
    put(&count, sizeof count);
    for (const Bytes& array : arrays) {
        const int64_t bytes = static_cast<int64_t>(array.size());
        put(&bytes, sizeof bytes);
        put(array.data(), array.size());
    }
    std::fflush(stdout);
}

}  // namespace

int main() {
    for (Call call; read_call(call);) reply(serve(call));
}

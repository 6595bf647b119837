// Serves tests/test_simt.py: reads calls from stdin, runs each under several thread orders, writes the results to stdout.
// A call: name, int64 arguments, double arguments, input arrays; a reply: output arrays. Every list is led by its length.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "common/finite.h"
#include "common/half_cuda.h"
#include "diffusion/diffusion.h"
#include "kmeans/kmeans.h"
#include "knn/knn.h"
#include "pairwise_kl/pairwise_kl_cuda.h"
#include "planted.h"
#include "simt.h"
#include "soft_assign/soft_assign.h"

namespace {

using fastclust::Bfloat16;
using fastclust::Computed;
using fastclust::Context;
using fastclust::Float16;
using Bytes = std::vector<unsigned char>;

constexpr int kOrders = 3;  // ascending, descending, shuffled

struct Call {
    std::string name;
    std::vector<int64_t> ints;
    std::vector<double> reals;
    std::vector<Bytes> arrays;

    std::vector<std::pair<void*, size_t>> outputs;

    /// With "far" the rows of x that are given are the last of so many that they would not fit into memory, the others are
    /// zeros, and of outputs that long the last bytes alone are sent.
    bool far() const { return name.starts_with("far_"); }
    std::string op() const { return far() ? name.substr(4) : name; }
    static constexpr size_t kFarBytes = size_t{1} << 16;

    template <class T>
    T* in(size_t i) const {
        if (arrays.at(i).empty()) return nullptr;
        void* memory = simt::allocate(arrays[i].size());
        std::memcpy(memory, arrays[i].data(), arrays[i].size());
        return static_cast<T*>(memory);
    }
    /// Rows as they are stored; halves lie an element into their memory, as those of a view may.
    template <class S>
    const S* rows(size_t i, int64_t values = 0) const {
        if (arrays.at(i).empty()) return nullptr;
        if (far() && values > 0) {
            const size_t bytes = static_cast<size_t>(values) * sizeof(S);
            auto* memory = static_cast<unsigned char*>(simt::allocate(bytes));
            std::memcpy(memory + bytes - arrays[i].size(), arrays[i].data(), arrays[i].size());
            return reinterpret_cast<const S*>(memory);
        }
        constexpr size_t kOffset = fastclust::kIsHalf<S> ? 1 : 0;
        S* memory = static_cast<S*>(simt::allocate(arrays[i].size() + kOffset * sizeof(S))) + kOffset;
        std::memcpy(memory, arrays[i].data(), arrays[i].size());
        return memory;
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

template <class S>
void finite_scan(Call& c) {
    const auto bad =
        fastclust::finite::cuda::kernels<S>().scan(c.rows<S>(0, c.ints[0] * c.ints[1]), c.ints[0], c.ints[1], c.context());
    auto* out = c.out<int64_t>(2);
    out[0] = bad.count;
    out[1] = bad.first;
}

template <class S>
void kmeans_assign(Call& c) {
    using T = Computed<S>;
    const int64_t b = c.ints[0], n = c.ints[1], k = c.ints[2], d = c.ints[3];
    fastclust::kmeans::cuda::kernels<S>().assign(
        {b, n, k, d, c.rows<S>(0, b * n * d), c.in<T>(1), c.ints[4] != 0, c.out<int64_t>(b * n), c.out<T>(b * n)}, c.context());
}

template <class S>
void kmeans_lloyd(Call& c) {
    using T = Computed<S>;
    fastclust::kmeans::Lloyd<S> a{};
    a.batch = c.ints[0], a.restarts = c.ints[1], a.n = c.ints[2], a.k = c.ints[3], a.d = c.ints[4];
    a.max_iter = c.ints[5], a.spherical = c.ints[6] != 0, a.exact = c.ints[7] != 0, a.tol = c.reals[0];
    a.x = c.rows<S>(0, a.batch * a.n * a.d), a.init = c.in<T>(1), a.sample_weight = c.in<T>(2),
    a.fixed_labels = c.in<int64_t>(3);
    const int64_t groups = a.batch * a.restarts;
    a.centroids = c.out<T>(groups * a.k * a.d), a.labels = c.out<int64_t>(groups * a.n);
    a.inertia = c.out<T>(groups), a.n_iter = c.out<int64_t>(groups);
    fastclust::kmeans::cuda::kernels<S>().lloyd(a, c.context());
}

template <class S>
void kmeans_plus_plus(Call& c) {
    using T = Computed<S>;
    fastclust::kmeans::PlusPlus<S> a{};
    a.batch = c.ints[0], a.restarts = c.ints[1], a.n = c.ints[2], a.k = c.ints[3], a.d = c.ints[4], a.candidates = c.ints[5];
    a.x = c.rows<S>(0, a.batch * a.n * a.d), a.sample_weight = c.in<T>(1), a.uniforms = c.in<T>(2);
    a.rows = c.out<int64_t>(a.batch * a.restarts * a.k);
    fastclust::kmeans::cuda::kernels<S>().plus_plus(a, c.context());
}

template <class T>
void soft_assign(Call& c) {
    const int64_t n = c.ints[0], k = c.ints[1], d = c.ints[2];
    fastclust::soft_assign::cuda::kernels<T>().forward({n, k, d, c.in<T>(0), c.in<T>(1), c.out<T>(n * k)}, c.context());
}

template <class T>
void soft_assign_backward(Call& c) {
    const int64_t n = c.ints[0], k = c.ints[1], d = c.ints[2];
    fastclust::soft_assign::cuda::kernels<T>().backward(
        {n, k, d, c.in<T>(0), c.in<T>(1), c.in<T>(2), c.in<T>(3), c.out<T>(n * d), c.out<T>(k * d)}, c.context());
}

template <class T>
fastclust::pairwise_kl::Batch<T> pairwise_batch(Call& c) {
    return {c.ints[0], c.ints[1], c.in<T>(0), c.in<int64_t>(1), static_cast<T>(c.reals[0])};
}

template <class T>
void pairwise_kl(Call& c) {
    const auto batch = pairwise_batch<T>(c);
    const auto found = fastclust::pairwise_kl::cuda::kernels<T>().inspect(batch, c.context());
    T* loss = c.out<T>(1);
    T* grad = c.out<T>(c.ints[0] * c.ints[1]);
    fastclust::pairwise_kl::cuda::kernels<T>().loss({batch, c.ints[2] != 0, loss, grad}, c.context());
    auto* findings = c.out<int64_t>(4);
    findings[0] = found.log_p.count, findings[1] = found.log_p.first;
    findings[2] = found.labels.count, findings[3] = found.labels.first;
}

/// The fourth of the whole numbers is the number of rows of a panel; with a fifth the loss alone is wanted.
void pairwise_kl_products(Call& c) {
    const auto batch = pairwise_batch<float>(c);
    float* loss = c.out<float>(1);
    float* grad = c.ints.size() > 4 ? nullptr : c.out<float>(batch.b * batch.k);
    fastclust::pairwise_kl::cuda::loss_by_products({batch, c.ints[2] != 0, loss, grad}, c.ints[3], c.context());
}

template <class T>
fastclust::diffusion::Graph<T> csr(Call& c) {
    return {c.ints[0], c.ints[1], c.in<int64_t>(0), c.in<int64_t>(1), c.in<T>(2)};
}

template <class T>
void diffuse(Call& c) {
    const int64_t n = c.ints[0], columns = c.ints[2];
    fastclust::diffusion::cuda::kernels<T>().solve({csr<T>(c), columns, c.in<T>(3), c.reals[0], c.reals[1], c.ints[3],
                                                    c.out<T>(n * columns), c.out<T>(columns), c.out<int64_t>(columns)},
                                                   c.context());
}

template <class T>
void inspect_graph(Call& c) {
    const auto found = fastclust::diffusion::cuda::kernels<T>().inspect(csr<T>(c), c.context());
    auto* out = c.out<int64_t>(2);
    out[0] = static_cast<int64_t>(found.fault);
    out[1] = found.row;
}

template <class S>
void knn(Call& c) {
    fastclust::knn::Search<S> a{};
    a.n = c.ints[0], a.m = c.ints[1], a.k = c.ints[2], a.d = c.ints[3];
    a.metric = static_cast<fastclust::knn::Metric>(c.ints[4]), a.exact = c.ints[5] != 0;
    a.x = c.rows<S>(0, a.n * a.d), a.queries = c.rows<S>(1);
    a.values = c.out<Computed<S>>(a.m * a.k), a.indices = c.out<int64_t>(a.m * a.k);
    fastclust::knn::cuda::kernels<S>().search(a, c.context());
}

template <class T>
void knn_graph(Call& c) {
    using fastclust::knn::Edges;
    fastclust::knn::Graph<T> g{};
    g.n = c.ints[0], g.k = c.ints[1], g.symmetrize = static_cast<fastclust::knn::Symmetrize>(c.ints[2]), g.power = c.reals[0];
    g.similarities = c.in<T>(0), g.indices = c.in<int64_t>(1), g.crow = c.out<int64_t>(g.n + 1);
    g.owner = &c;
    g.allocate = [](void* call, int64_t count) {
        return Edges<T>{static_cast<Call*>(call)->out<int64_t>(count), static_cast<Call*>(call)->out<T>(count)};
    };
    fastclust::knn::cuda::kernels<T>().graph(g, c.context());
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

#define FOR_ALL_STORAGES(name)                                  \
    FOR_BOTH_FLOATS(name), {#name ".float16", name<Float16>}, { \
        #name ".bfloat16", name<Bfloat16>                       \
    }

const std::map<std::string, void (*)(Call&)> kCalls = {
    {"planted", planted},
    FOR_ALL_STORAGES(finite_scan),
    FOR_ALL_STORAGES(kmeans_assign),
    FOR_ALL_STORAGES(kmeans_lloyd),
    FOR_ALL_STORAGES(kmeans_plus_plus),
    FOR_BOTH_FLOATS(soft_assign),
    FOR_BOTH_FLOATS(soft_assign_backward),
    FOR_BOTH_FLOATS(pairwise_kl),
    {"pairwise_kl_products.float32", pairwise_kl_products},
    FOR_BOTH_FLOATS(diffuse),
    FOR_BOTH_FLOATS(inspect_graph),
    FOR_ALL_STORAGES(knn),
    FOR_BOTH_FLOATS(knn_graph),
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
    for (int order = 0; order < (call.far() ? 1 : kOrders); ++order) {
        simt::set_order(order);
        simt::set_sparse(call.far());
        call.outputs.clear();
        kCalls.at(call.op())(call);
        std::vector<Bytes> now;
        for (const auto& [memory, bytes] : call.outputs) {
            const auto* begin = static_cast<const unsigned char*>(memory);
            now.emplace_back(call.far() && bytes > Call::kFarBytes ? begin + bytes - Call::kFarBytes : begin, begin + bytes);
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

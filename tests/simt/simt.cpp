#include "simt.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#error "the SIMT shim switches fibers in x86-64 assembly"
#endif

// Saves the callee-saved registers on the running stack, stores its pointer in *rdi and goes on with the stack rsi.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
simt_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");

namespace simt {
namespace {

constexpr size_t kWarp = 32, kStackBytes = 128 * 1024, kMaxThreads = 1024;
constexpr size_t kSparseBytes = 1 << 20;  // from here on memory is sparse where that is asked for
constexpr size_t kSparseBlocks = 2;       // that run at either end of a grid of more than kSmallGrid
constexpr size_t kSmallGrid = 32;
constexpr size_t kPage = 4096;
constexpr size_t kCellBytes = 2;  // the finest grain at which two threads may own neighbouring elements

/// Who touched a cell, and what that thread had passed by then.
struct Stamp {
    uint64_t place = 0;  // launch and block
    uint32_t barriers = 0, warp_barriers = 0;
    uint16_t thread = 0;
    enum Spread : uint8_t { kThread, kWarpWide, kBlockWide, kGridWide } spread = kThread;  // reads by several threads
    bool atomic = false;

    uint32_t launch() const { return static_cast<uint32_t>(place >> 32); }
    uint32_t block() const { return static_cast<uint32_t>(place); }
};

struct Cell {
    Stamp write, read;
};

struct Allocation {
    unsigned char* begin;
    size_t bytes;
    std::vector<Cell> cells;
};

struct Mapping {
    void* begin;
    size_t bytes;
};

enum class State { kRunnable, kBarrier, kWarp, kDone };

struct Copy {
    void* target;
    const void* source;
    size_t bytes, valid_bytes;
};

struct Fiber {
    void* stack_pointer;
    State state;
    Extent index;
    Site site;
    uint32_t barriers, warp_barriers, collectives;
    std::deque<std::vector<Copy>> groups;
    std::vector<Copy> open_group;
};

struct Warp {
    alignas(16) unsigned char lanes[2][kWarp * kLaneBytes];  // two, in turn: a lane may be one collective ahead of another
};

const char* kernel_name = "";
int order_setting = 0;
bool sparse_setting = false;
uint32_t launch_number = 0, block_number = 0;
Fiber fibers[kMaxThreads];
Warp warps[kMaxThreads / kWarp];
Fiber* running = nullptr;
void* scheduler_stack = nullptr;
unsigned char* stacks = nullptr;
void* shared_memory = nullptr;
const std::function<void()>* thread_body = nullptr;
std::vector<std::unique_ptr<Allocation>> allocations;  // ascending addresses
size_t allocations_version = 1;                        // grows with each change of the list
std::vector<Mapping> mappings;                         // sparse memory

size_t index_of(const Fiber& fiber) {
    return static_cast<size_t>(&fiber - fibers);
}

Allocation* find(const void* address) {
    static Allocation* latest = nullptr;
    static size_t version = 0;
    const auto* p = static_cast<const unsigned char*>(address);
    if (version == allocations_version && p >= latest->begin && p < latest->begin + latest->bytes) return latest;
    auto after =
        std::upper_bound(allocations.begin(), allocations.end(), p, [](const auto* q, const auto& a) { return q < a->begin; });
    if (after == allocations.begin()) return nullptr;
    Allocation* a = (--after)->get();
    if (p >= a->begin + a->bytes) return nullptr;
    latest = a;
    version = allocations_version;
    return a;
}

inline bool ordered(const Stamp& before, const Stamp& now) {
    if (before.launch() != now.launch()) return true;
    if (before.spread == Stamp::kGridWide || before.place != now.place) return false;
    if (before.barriers != now.barriers) return true;
    if (before.spread == Stamp::kBlockWide || before.thread / kWarp != now.thread / kWarp) return false;
    if (before.warp_barriers != now.warp_barriers) return true;
    return before.spread == Stamp::kThread && before.thread == now.thread;
}

inline void add_reader(Stamp& read, const Stamp& now) {
    if (ordered(read, now)) {
        read = now;
        return;
    }
    if (read.spread == Stamp::kGridWide && !read.atomic) return;
    const bool same_block = read.spread != Stamp::kGridWide && read.place == now.place;
    const bool same_warp = same_block && read.spread != Stamp::kBlockWide && read.thread / kWarp == now.thread / kWarp;
    const bool atomic = read.atomic && now.atomic;
    read = now;
    read.spread = same_warp ? Stamp::kWarpWide : same_block ? Stamp::kBlockWide : Stamp::kGridWide;
    read.atomic = atomic;
}

[[noreturn]] void race(const char* what, const Allocation& a, size_t offset, const Stamp& before, const Stamp& now) {
    fail("race in %s: %s at byte %zu of %zu of %s memory by thread %u of block %u and thread %u of block %u", kernel_name, what,
         offset, a.bytes, a.begin == shared_memory ? "shared" : "global", before.thread, before.block(), now.thread,
         now.block());
}

void note(const void* address, size_t bytes, bool writes, bool atomic) {
    const auto* p = static_cast<const unsigned char*>(address);
    if (running == nullptr || (p >= stacks && p < stacks + kMaxThreads * kStackBytes)) return;
    Allocation* a = find(address);
    if (a == nullptr || a->begin + a->bytes < p + bytes) {
        if (__asan_region_is_poisoned(const_cast<void*>(address), bytes) != nullptr)
            fail("out of bounds in %s: %s of %zu bytes at %p by thread %zu of block %u", kernel_name, writes ? "write" : "read",
                 bytes, address, index_of(*running), block_number);
        return;
    }
    Stamp now;
    now.place = uint64_t{launch_number} << 32 | block_number;
    now.barriers = running->barriers;
    now.warp_barriers = running->warp_barriers;
    now.thread = static_cast<uint16_t>(index_of(*running));
    now.atomic = atomic;
    const size_t offset = static_cast<size_t>(p - a->begin);
    for (size_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
        Cell& cell = a->cells[i];
        if (!ordered(cell.write, now) && !(atomic && cell.write.atomic))
            race(writes ? "two writes" : "a read and a write", *a, offset, cell.write, now);
        if (writes) {
            if (!ordered(cell.read, now) && !(atomic && cell.read.atomic))
                race("a read and a write", *a, offset, cell.read, now);
            cell.write = now;
        }
        if (!writes || atomic) add_reader(cell.read, now);
    }
}

void wait_as(State state, Site site) {
    running->state = state;
    running->site = site;
    simt_switch(&running->stack_pointer, scheduler_stack);
}

void fiber_main() {
    (*thread_body)();
    running->state = State::kDone;
    simt_switch(&running->stack_pointer, scheduler_stack);
}

void prepare(Fiber& fiber, Extent index) {
    // Six zero registers, the return address, and a stack that is 8 short of 16-byte alignment, as after a call.
    auto* top = reinterpret_cast<uint64_t*>(stacks + (index_of(fiber) + 1) * kStackBytes) - 1;
    *--top = reinterpret_cast<uint64_t>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = 0;
    fiber.stack_pointer = top;
    fiber.state = State::kRunnable;
    fiber.index = index;
    fiber.barriers = fiber.warp_barriers = fiber.collectives = 0;
    fiber.groups.clear();
    fiber.open_group.clear();
}

/// Releases fibers [begin, end) if all of them wait in `state` at one place in the source.
bool release(size_t begin, size_t end, State state) {
    for (size_t i = begin; i < end; ++i)
        if (fibers[i].state != state || fibers[i].site.line() != fibers[begin].site.line() ||
            fibers[i].site.file_name() != fibers[begin].site.file_name())
            return false;
    for (size_t i = begin; i < end; ++i) fibers[i].state = State::kRunnable;
    return true;
}

[[noreturn]] void report_stuck(size_t threads) {
    for (size_t i = 0; i < threads; ++i)
        if (fibers[i].state == State::kBarrier || fibers[i].state == State::kWarp)
            fail("divergent %s in %s: thread %zu waits at line %u of %s, not every thread does",
                 fibers[i].state == State::kBarrier ? "barrier" : "warp collective", kernel_name, i,
                 static_cast<unsigned>(fibers[i].site.line()), fibers[i].site.file_name());
    fail("stuck in %s", kernel_name);
}

void run_block(size_t threads, const std::vector<size_t>& sequence) {
    size_t done = 0;
    while (done < threads) {
        bool moved = false;
        for (const size_t i : sequence) {
            if (fibers[i].state != State::kRunnable) continue;
            moved = true;
            running = &fibers[i];
            threadIdx = running->index;
            simt_switch(&scheduler_stack, running->stack_pointer);
            running = nullptr;
            if (fibers[i].state == State::kDone) {
                if (!fibers[i].groups.empty() || !fibers[i].open_group.empty())
                    fail("%s ends with copies that nobody waited for", kernel_name);
                ++done;
            }
        }
        for (size_t w = 0; w < threads; w += kWarp) moved |= release(w, std::min(w + kWarp, threads), State::kWarp);
        if (!moved && !release(0, threads, State::kBarrier) && done < threads) report_stuck(threads);
    }
}

/// Zeros that end, but for alignment, where a page begins that may not be touched; another lies before them.
void* map_sparsely(size_t bytes) {
    const size_t aligned = (bytes + 127) / 128 * 128, whole = (aligned + kPage - 1) / kPage * kPage;
    void* memory = mmap(nullptr, whole + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no room for %zu sparse bytes", bytes);
    auto* begin = static_cast<unsigned char*>(memory) + kPage;
    mprotect(begin, whole, PROT_READ | PROT_WRITE);
    mappings.push_back({memory, whole + 2 * kPage});
    return begin + whole - aligned;
}

std::vector<size_t> arrange(size_t count) {
    std::vector<size_t> sequence(count);
    std::iota(sequence.begin(), sequence.end(), size_t{0});
    if (order_setting == 1) std::reverse(sequence.begin(), sequence.end());
    if (order_setting > 1) std::shuffle(sequence.begin(), sequence.end(), std::mt19937(static_cast<unsigned>(order_setting)));
    return sequence;
}

}  // namespace

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::fputs("simt: ", stderr);
    std::vfprintf(stderr, format, arguments);
    std::fputs("\n", stderr);
    std::fflush(stderr);
    std::_Exit(3);
}

void run(const char* kernel, Extent grid, Extent block, size_t shared_bytes, const std::function<void()>& thread) {
    const size_t threads = size_t{block.x} * block.y * block.z, blocks = size_t{grid.x} * grid.y * grid.z;
    if (threads == 0 || threads > kMaxThreads) fail("%s: %zu threads per block", kernel, threads);
    if (grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u) fail("%s: grid too large", kernel);
    if (stacks == nullptr)
        stacks = static_cast<unsigned char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    kernel_name = kernel;
    ++launch_number;
    gridDim = grid;
    blockDim = block;
    thread_body = &thread;
    const std::vector<size_t> sequence = arrange(threads);
    for (const size_t b : arrange(blocks)) {
        if (sparse_setting && blocks > kSmallGrid && b >= kSparseBlocks && b + kSparseBlocks < blocks) continue;
        block_number = static_cast<uint32_t>(b);
        blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                    static_cast<unsigned>(b / grid.x / grid.y)};
        shared_memory = allocate(shared_bytes);
        for (size_t i = 0; i < threads; ++i)
            prepare(fibers[i], {static_cast<unsigned>(i % block.x), static_cast<unsigned>(i / block.x % block.y),
                                static_cast<unsigned>(i / block.x / block.y)});
        run_block(threads, sequence);
        ++allocations_version;
        std::erase_if(allocations, [](const auto& a) { return a->begin == shared_memory; });
        std::free(shared_memory);
        shared_memory = nullptr;
    }
}

void set_order(int order) {
    order_setting = order;
}

void set_sparse(bool sparse) {
    sparse_setting = sparse;
}

int64_t most_blocks() {
    return sparse_setting ? int64_t{1} << 20 : 5;
}

/// A small machine, so that small problems already need several waves of blocks; or one that needs no second wave.
int processors() {
    return sparse_setting ? 1 << 20 : 1;
}

void* allocate(size_t bytes) {
    if (sparse_setting && bytes >= kSparseBytes) return map_sparsely(bytes);
    auto allocation = std::make_unique<Allocation>();
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes) != 0) fail("out of memory");
    allocation->begin = static_cast<unsigned char*>(memory);
    allocation->bytes = bytes;
    allocation->cells.resize(bytes / kCellBytes + 1);
    std::memset(allocation->begin, sparse_setting ? 0 : 0xFF, bytes);
    void* begin = allocation->begin;
    auto after = std::upper_bound(allocations.begin(), allocations.end(), begin,
                                  [](const void* q, const auto& a) { return q < a->begin; });
    ++allocations_version;
    allocations.insert(after, std::move(allocation));
    return begin;
}

void release_all() {
    for (const auto& a : allocations) std::free(a->begin);
    allocations.clear();
    for (const Mapping& m : mappings) munmap(m.begin, m.bytes);
    mappings.clear();
    ++allocations_version;
}

void* shared() {
    return shared_memory;
}

void barrier(Site site) {
    wait_as(State::kBarrier, site);
    ++running->barriers;
}

void warp_barrier(Site site) {
    wait_as(State::kWarp, site);
    ++running->warp_barriers;
}

int lane() {
    return static_cast<int>(index_of(*running) % kWarp);
}

const unsigned char* exchange(const void* mine, size_t bytes, Site site) {
    Fiber& self = *running;
    if (blockDim.x * blockDim.y * blockDim.z % kWarp != 0) fail("%s: a warp collective in a broken warp", kernel_name);
    unsigned char* slots = warps[index_of(self) / kWarp].lanes[self.collectives++ % 2];
    std::memcpy(slots + static_cast<size_t>(lane()) * kLaneBytes, mine, bytes);
    wait_as(State::kWarp, site);
    return slots;
}

void note_read(const void* address, size_t bytes) {
    note(address, bytes, false, false);
}

void note_write(const void* address, size_t bytes) {
    note(address, bytes, true, false);
}

void note_atomic(const void* address, size_t bytes) {
    note(address, bytes, true, true);
}

void copy_later(void* target, const void* source, size_t bytes, size_t valid_bytes) {
    if (reinterpret_cast<uintptr_t>(target) % bytes != 0 || reinterpret_cast<uintptr_t>(source) % bytes != 0)
        fail("%s: cp.async of %zu bytes is not aligned", kernel_name, bytes);
    if (valid_bytes > 0) note_read(source, valid_bytes);
    note_write(target, bytes);  // the copy may land at any time from here on
    running->open_group.push_back({target, source, bytes, valid_bytes});
}

void commit_copies() {
    running->groups.push_back(std::move(running->open_group));
    running->open_group.clear();
}

void wait_copies(int groups_in_flight) {
    while (running->groups.size() > static_cast<size_t>(groups_in_flight)) {
        for (const Copy& copy : running->groups.front()) {
            note_write(copy.target, copy.bytes);
            std::memset(copy.target, 0, copy.bytes);
            std::memcpy(copy.target, copy.source, copy.valid_bytes);
        }
        running->groups.pop_front();
    }
}

}  // namespace simt

// What -fsanitize=thread calls in the kernels.
extern "C" {
#define SIMT_HOOKS(bytes)                         \
    void __tsan_read##bytes(void* p) {            \
        simt::note_read(p, bytes);                \
    }                                             \
    void __tsan_write##bytes(void* p) {           \
        simt::note_write(p, bytes);               \
    }                                             \
    void __tsan_unaligned_read##bytes(void* p) {  \
        simt::note_read(p, bytes);                \
    }                                             \
    void __tsan_unaligned_write##bytes(void* p) { \
        simt::note_write(p, bytes);               \
    }
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
    simt::note_read(p, bytes);
}
void __tsan_write_range(void* p, size_t bytes) {
    simt::note_write(p, bytes);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}

#include "common/capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastclust {
namespace {

#if defined(__x86_64__)
constexpr Capability kAll[] = {Capability::generic, Capability::avx2, Capability::avx512, Capability::avx512_vnni,
                               Capability::amx};

/// The tiles of AMX are Linux's to grant, once for all threads of the process.
bool tiles_granted() {
#if defined(__linux__)
    constexpr unsigned kTile = 1U << 24, kInt8 = 1U << 25;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl; the state's number in XCR0
    unsigned eax, ebx, ecx, edx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kTile) == 0 || (edx & kInt8) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

Capability detect() {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) return tiles_granted() ? Capability::amx : Capability::avx512_vnni;
    if (avx512) return Capability::avx512;
    return avx2 ? Capability::avx2 : Capability::generic;
}
#else
constexpr Capability kAll[] = {Capability::generic};

Capability detect() {
    return Capability::generic;
}
#endif

Capability choose() {
    const Capability best = detect();
    const char* wanted = std::getenv("FASTCLUST_CPU_CAPABILITY");
    if (wanted == nullptr || *wanted == '\0') return best;
    for (const Capability capability : kAll) {
        if (std::string(wanted) != name_of(capability)) continue;
        if (capability > best)
            throw std::invalid_argument(std::string("FASTCLUST_CPU_CAPABILITY: this CPU has no ") + wanted + "; its best is " +
                                        name_of(best));
        return capability;
    }
    std::string names;
    for (const Capability capability : kAll) names += std::string(names.empty() ? "" : ", ") + name_of(capability);
    throw std::invalid_argument(std::string("FASTCLUST_CPU_CAPABILITY: ") + wanted + " is none of " + names);
}

}  // namespace

Capability cpu_capability() {
    static const Capability chosen = choose();
    return chosen;
}

const char* name_of(Capability capability) {
    switch (capability) {
        case Capability::amx:
            return "amx";
        case Capability::avx512_vnni:
            return "avx512_vnni";
        case Capability::avx512:
            return "avx512";
        case Capability::avx2:
            return "avx2";
        default:
            return "generic";
    }
}

}  // namespace fastclust

// CPU kernels are compiled once per capability and chosen at run time.
//
#pragma once

#include "common/export.h"

namespace fastclust {

enum class Capability { generic, avx2, avx512, avx512_vnni, amx };

/// The best capability that this CPU and its operating system grant, lowered by FASTCLUST_CPU_CAPABILITY where that is set.
FASTCLUST_API Capability cpu_capability();
FASTCLUST_API const char* name_of(Capability capability);

}  // namespace fastclust

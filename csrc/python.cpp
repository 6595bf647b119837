// fastclust._C: importing it loads the ops; its attributes tell how they were built.
#include <pybind11/pybind11.h>

#include "common/capability.h"

#define FASTCLUST_TEXT_OF(value) #value
#define FASTCLUST_TEXT(value) FASTCLUST_TEXT_OF(value)

// fastclust/_library.py looks for these bytes before it loads the file.
extern "C" __attribute__((used)) const char fastclust_schema[] = "fastclust-schema-" FASTCLUST_TEXT(FASTCLUST_SCHEMA) ";";

PYBIND11_MODULE(_C, m) {
    m.doc() = "Loads torch.ops.fastclust and tells how it was built.";
    m.attr("SCHEMA") = FASTCLUST_SCHEMA;
    m.attr("VERSION") = FASTCLUST_VERSION;
    m.attr("COMPILER") = FASTCLUST_COMPILER;
    m.attr("TORCH_VERSION") = FASTCLUST_TORCH_VERSION;
    m.attr("CUDA_VERSION") = FASTCLUST_CUDA_VERSION;              // of nvcc; empty without CUDA kernels
    m.attr("CUDA_ARCHITECTURES") = FASTCLUST_CUDA_ARCHITECTURES;  // "80, 90a"; empty without CUDA kernels
    m.def(
        "cpu_capability", [] { return fastclust::name_of(fastclust::cpu_capability()); },
        "The CPU kernels in use: generic, avx2, avx512, avx512_vnni or amx.");
}

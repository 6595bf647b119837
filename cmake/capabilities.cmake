# One object library per CPU capability: each source compiled again with that capability's flags and namespace.
set(FASTCLUST_CAPABILITIES generic)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    list(APPEND FASTCLUST_CAPABILITIES avx2 avx512 avx512_vnni amx)
endif()
set(FASTCLUST_FLAGS_generic "")
set(FASTCLUST_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi -mbmi2 -mtune=haswell)
set(FASTCLUST_FLAGS_avx512 ${FASTCLUST_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
                           -mtune=icelake-server)
set(FASTCLUST_FLAGS_avx512_vnni ${FASTCLUST_FLAGS_avx512} -mavx512vnni)
set(FASTCLUST_FLAGS_amx ${FASTCLUST_FLAGS_avx512_vnni} -mamx-tile -mamx-int8)

function(fastclust_add_cpu_kernels target)
    foreach(capability IN LISTS FASTCLUST_CAPABILITIES)
        set(objects ${target}_${capability})
        add_library(${objects} OBJECT ${ARGN})
        target_include_directories(${objects} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
        target_compile_definitions(${objects} PRIVATE FASTCLUST_CAPABILITY=${capability})
        # -fno-math-errno and -fno-trapping-math let loops vectorise; nothing here may reorder a sum or drop a NaN.
        target_compile_options(${objects} PRIVATE -O3 -fno-math-errno -fno-trapping-math ${FASTCLUST_FLAGS_${capability}})
        target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
    endforeach()
endfunction()

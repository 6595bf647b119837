# Imported targets torch_cpu and torch_cuda from a torch folder. find_package(Torch) is not used: with a CUDA wheel it is fatal
# unless a full CUDA toolkit is there, and the stable ABI needs nothing but headers and these two libraries.
foreach(name torch_cpu torch_cuda)
    set(library "${FASTCLUST_TORCH_DIR}/lib/lib${name}.so")
    if(EXISTS "${library}")
        add_library(torch::${name} SHARED IMPORTED)
        set_target_properties(torch::${name} PROPERTIES IMPORTED_LOCATION "${library}")
        target_include_directories(torch::${name} SYSTEM INTERFACE "${FASTCLUST_TORCH_DIR}/include")
        # 2.11 is 0x020B << 48. Only what torch 2.11 has is used, so the library runs on it and on everything newer.
        target_compile_definitions(torch::${name} INTERFACE TORCH_TARGET_VERSION=0x020B000000000000)
    endif()
endforeach()
if(NOT TARGET torch::torch_cpu)
    message(FATAL_ERROR "no libtorch_cpu.so in ${FASTCLUST_TORCH_DIR}/lib: set FASTCLUST_TORCH_DIR to an installed torch's folder")
endif()

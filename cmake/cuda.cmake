# The CUDA library, apart from the ops library so that the latter loads where torch has no CUDA. It links the CUDA runtime
# statically: torch's own, whatever its version, stays untouched.
if(NOT TARGET torch::torch_cuda)
    message(FATAL_ERROR "FASTCLUST_CUDA is ON, but the torch in ${FASTCLUST_TORCH_DIR} is a CPU build")
endif()

set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

# Machine code for each architecture, PTX only for the newest.
set(CMAKE_CUDA_ARCHITECTURES "")
list(GET FASTCLUST_CUDA_ARCHITECTURES -1 newest)
foreach(architecture IN LISTS FASTCLUST_CUDA_ARCHITECTURES)
    if(architecture STREQUAL newest)
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${architecture})
    else()
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${architecture}-real)
    endif()
endforeach()
enable_language(CUDA)

add_library(fastclust_cuda SHARED csrc/library_cuda.cpp ${cuda_sources})
target_include_directories(fastclust_cuda PRIVATE csrc ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_definitions(fastclust_cuda PRIVATE USE_CUDA)
target_compile_options(fastclust_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo>)
target_link_libraries(fastclust_cuda PRIVATE fastclust torch::torch_cuda torch::torch_cpu)

set(cuda_version "${CMAKE_CUDA_COMPILER_VERSION}")
list(JOIN FASTCLUST_CUDA_ARCHITECTURES ", " cuda_architectures)

# Whether the CUDA kernels are built, by which nvcc and for which GPUs.
#
#   FUSEDRNN_CUDA                AUTO: if a working nvcc is found; ON: or the build fails; OFF
#   FUSEDRNN_CUDA_ARCHITECTURES  as CMake's CUDA_ARCHITECTURES, such as 90a-real; by default every GPU from sm_80 on
#
# nvcc is sought in CUDACXX, on PATH, in CUDA_PATH and in /usr/local/cuda; docs/building.md tells how to get it.
# Sets why_no_cuda to the reason why they are not built, empty if they are.

set(FUSEDRNN_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO (if nvcc is found), ON or OFF")
set_property(CACHE FUSEDRNN_CUDA PROPERTY STRINGS AUTO ON OFF)
set(FUSEDRNN_CUDA_ARCHITECTURES "" CACHE STRING "GPU targets of the CUDA kernels; empty for all of them")

set(why_no_cuda "")
if(FUSEDRNN_CUDA STREQUAL "AUTO" OR FUSEDRNN_CUDA STREQUAL "ON")
  if(NOT DEFINED ENV{CUDACXX})
    find_program(FUSEDRNN_NVCC nvcc PATHS ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
    if(FUSEDRNN_NVCC)
      set(ENV{CUDACXX} ${FUSEDRNN_NVCC})
    endif()
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # look again: a build folder outlives the installation of nvcc
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER AND DEFINED ENV{CUDACXX})
    set(why_no_cuda "the nvcc $ENV{CUDACXX} did not work when fusedrnn was built")
  elseif(NOT CMAKE_CUDA_COMPILER)
    set(why_no_cuda "no nvcc was found when fusedrnn was built")
  else()
    # The targets are the library's own, and the toolkit may not know all of them: none for CMake's trial program.
    set(CMAKE_CUDA_ARCHITECTURES OFF)
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
      set(why_no_cuda "fusedrnn needs CUDA 12.0 or newer, but was built with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
    endif()
  endif()
elseif(FUSEDRNN_CUDA STREQUAL "OFF")
  set(why_no_cuda "fusedrnn was built with FUSEDRNN_CUDA=OFF")
else()
  message(FATAL_ERROR "FUSEDRNN_CUDA is '${FUSEDRNN_CUDA}', expected AUTO, ON or OFF")
endif()

if(why_no_cuda)
  if(FUSEDRNN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FUSEDRNN_CUDA is ON, but ${why_no_cuda}")
  endif()
  message(STATUS "CUDA kernels: not built: ${why_no_cuda}")
  return()
endif()

set(cuda_architectures ${FUSEDRNN_CUDA_ARCHITECTURES})
if(NOT cuda_architectures)
  # A program for sm_80 runs on 8.x, and so on; sm_90a has Hopper's own instructions. Every other GPU, newer ones
  # included, gets the PTX, which its driver compiles when the module is first used.
  set(cuda_architectures 80-real 86-real 89-real 90a-real)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    message(STATUS "CUDA kernels: nvcc ${CMAKE_CUDA_COMPILER_VERSION} has no targets sm_100 and sm_120: PTX serves them")
  else()
    list(APPEND cuda_architectures 100-real 120-real)
  endif()
  list(APPEND cuda_architectures 80-virtual)
endif()
list(TRANSFORM cuda_architectures REPLACE "^(.+)-real$" "sm_\\1" OUTPUT_VARIABLE cuda_summary)
list(TRANSFORM cuda_summary REPLACE "^(.+)-virtual$" "PTX of compute_\\1")
list(JOIN cuda_summary ", " cuda_summary)
set(cuda_summary "CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${cuda_summary}")
message(STATUS "CUDA kernels: ${cuda_summary}")

# Everything that the kernels are compiled with is here.
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp)
add_library(fusedrnn_cuda STATIC ${cuda_sources})
target_include_directories(fusedrnn_cuda PUBLIC csrc/cuda)
set_target_properties(fusedrnn_cuda PROPERTIES
  CUDA_ARCHITECTURES "${cuda_architectures}"
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_VISIBILITY_PRESET hidden
  CUDA_RUNTIME_LIBRARY Static)  # no libcudart beside torch's own; the driver is loaded at the first call
# The smaller form of machine code (a seventh) is one that drivers older than CUDA 12.4 cannot read, and CUDA 13 needs
# newer drivers anyway.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 13)
  set(compressed -Xfatbin=-compress-all)
else()
  set(compressed --compress-mode=size)
endif()
target_compile_options(fusedrnn_cuda PRIVATE
  -O3
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>
  $<$<COMPILE_LANGUAGE:CUDA>:${compressed};--threads=2;-Xcompiler=-Wall,-Wextra>)  # two GPU targets at a time

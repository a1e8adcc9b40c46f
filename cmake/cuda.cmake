# What the generators need for CUDA: device functions beside Halide's own, and NVIDIA's assembler. Both come from the CUDA
# Toolkit or from the wheels that pyproject.toml pins; what is missing is named, and kernels are then embedded as PTX alone,
# which the driver compiles at the first call. HOLDFAST_REQUIRED_TOOLS="ptxas fatbinary" in the environment makes that an error.
#
#   HOLDFAST_CUDA_ARCHITECTURES: for which machine code is made, as in sm_80; the PTX behind it serves later ones.
set(HOLDFAST_CUDA_ARCHITECTURES "80;90" CACHE STRING "CUDA architectures to make machine code for, e.g. 80;86;89;90")

# The wheel's folder is one of those that Python looks in: pip builds with packages that are in none of its own.
execute_process(COMMAND ${Python_EXECUTABLE} -c "import sys; print(';'.join(f'{path}/nvidia/cu13/bin' for path in sys.path if path))"
  OUTPUT_VARIABLE cuda_hints OUTPUT_STRIP_TRAILING_WHITESPACE)
list(APPEND cuda_hints /usr/local/cuda/bin)
find_program(HOLDFAST_PTXAS ptxas HINTS ${cuda_hints})
find_program(HOLDFAST_FATBINARY fatbinary HINTS ${cuda_hints})
foreach(tool PTXAS FATBINARY)
  if(NOT HOLDFAST_${tool})
    string(TOLOWER ${tool} name)
    if("$ENV{HOLDFAST_REQUIRED_TOOLS}" MATCHES "(^| )${name}( |$)")
      message(FATAL_ERROR "CUDA: no ${name}, which HOLDFAST_REQUIRED_TOOLS has: pip install nvidia-cuda-nvcc, or the CUDA Toolkit")
    endif()
    message(STATUS "CUDA: no ${name} (pip install nvidia-cuda-nvcc, or the CUDA Toolkit): kernels are embedded as PTX alone")
    set(HOLDFAST_PTXAS "")
    set(HOLDFAST_FATBINARY "")
    break()
  endif()
endforeach()
list(JOIN HOLDFAST_CUDA_ARCHITECTURES " " architectures)
set_property(SOURCE ${PROJECT_SOURCE_DIR}/schedules/cuda/machine_code.cpp APPEND PROPERTY COMPILE_DEFINITIONS
  HOLDFAST_PTXAS="${HOLDFAST_PTXAS}" HOLDFAST_FATBINARY="${HOLDFAST_FATBINARY}" HOLDFAST_CUDA_ARCHITECTURES="${architectures}")

# Halide's PTX device library with ours: linked into an executable, it takes the place of the one in libHalide. That is how
# ELF has it; elsewhere there are no tensor cores, and kernels that ask for them do not build.
add_library(holdfast_cuda_device_library INTERFACE)
if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  return()
endif()
execute_process(COMMAND ${Python_EXECUTABLE} -c "import llvmlite" RESULT_VARIABLE no_llvmlite ERROR_QUIET)
if(no_llvmlite)
  message(FATAL_ERROR "llvmlite is missing, which links the device functions of CUDA kernels: pip install llvmlite, at the version that pyproject.toml pins")
endif()
set(device_library ${PROJECT_BINARY_DIR}/generated/cuda_device_library.cpp)
add_custom_command(OUTPUT ${device_library}
  COMMAND Python::Interpreter ${PROJECT_SOURCE_DIR}/schedules/cuda/device_library.py $<TARGET_FILE:Halide::Halide> ${device_library}
  DEPENDS ${PROJECT_SOURCE_DIR}/schedules/cuda/device_library.py VERBATIM)
add_library(holdfast_cuda_device_functions OBJECT ${device_library})
target_link_libraries(holdfast_cuda_device_library INTERFACE holdfast_cuda_device_functions $<TARGET_OBJECTS:holdfast_cuda_device_functions>)
target_link_libraries(holdfast_generators PRIVATE holdfast_cuda_device_library)

# Target `holdfast_apple_objects`: the Metal kernels and Halide's runtime for Apple's systems, compiled on any machine, in
# <build>/apple/<system>/ as Mach-O objects with headers and the text of their MSL. To be linked on a Mac, with -framework Metal
# -framework Foundation. It has what the build has for the target metal: on Linux that takes HOLDFAST_FAKE_METAL.
set(holdfast_apple_systems arm-64-osx arm-64-ios)
set(holdfast_apple_folder ${PROJECT_BINARY_DIR}/apple)

# holdfast_apple_objects(name kernel generator-parameter...)
function(holdfast_apple_objects name kernel)
  foreach(system IN LISTS holdfast_apple_systems)
    set(folder ${holdfast_apple_folder}/${system})
    if(NOT TARGET holdfast_apple_objects_${system})
      file(MAKE_DIRECTORY ${folder})
      add_custom_command(OUTPUT ${folder}/halide_runtime.o
        COMMAND Halide::GenRT -r halide_runtime -o ${folder} -e object target=${system}-metal
        DEPENDS Halide::GenRT VERBATIM)
      add_custom_target(holdfast_apple_objects_${system} DEPENDS ${folder}/halide_runtime.o)
      add_dependencies(holdfast_apple_objects holdfast_apple_objects_${system})
    endif()
    add_custom_command(OUTPUT ${folder}/${name}.o ${folder}/${name}.h ${folder}/${name}.device_code
      COMMAND ${holdfast_generators} -g ${kernel} -f ${name} -n ${name} -o ${folder} -e object,c_header,device_code
        target=${system}-metal-user_context-no_runtime ${ARGN}
      DEPENDS ${holdfast_generators} VERBATIM)
    add_custom_target(holdfast_apple_objects_${system}_${name} DEPENDS ${folder}/${name}.o)
    add_dependencies(holdfast_apple_objects holdfast_apple_objects_${system}_${name})
  endforeach()
endfunction()

add_custom_target(holdfast_apple_objects)

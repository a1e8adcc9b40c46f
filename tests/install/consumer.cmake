# Installs the build, moves the installed tree, and builds and runs examples/c against it, by find_package and by pkg-config.
# Called with HOW (find_package or pkg_config), BUILD, SOURCE, WORK, CONFIG, GENERATOR, C_COMPILER, C_FLAGS, PKG_CONFIG, LIBDIR.
file(REMOVE_RECURSE ${WORK})
execute_process(COMMAND ${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/installed --config ${CONFIG}
  OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
file(RENAME ${WORK}/installed ${WORK}/moved)
set(prefix ${WORK}/moved)

# Nothing in it refers to where it was made.
file(GLOB_RECURSE texts ${prefix}/*.cmake ${prefix}/*.pc)
foreach(text IN LISTS texts)
  file(READ ${text} content)
  foreach(path ${BUILD} ${SOURCE} ${WORK})
    string(FIND "${content}" "${path}" found)
    if(NOT found EQUAL -1)
      message(FATAL_ERROR "${text} contains ${path}")
    endif()
  endforeach()
endforeach()

if(HOW STREQUAL "find_package")
  execute_process(COMMAND ${CMAKE_COMMAND} -S ${SOURCE}/examples/c -B ${WORK}/consumer -G ${GENERATOR}
    -DCMAKE_PREFIX_PATH=${prefix} -DCMAKE_BUILD_TYPE=${CONFIG} -DCMAKE_C_COMPILER=${C_COMPILER} -DCMAKE_C_FLAGS=${C_FLAGS}
    COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND ${CMAKE_COMMAND} --build ${WORK}/consumer COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND ${WORK}/consumer/retention COMMAND_ERROR_IS_FATAL ANY)
else()
  set(ENV{PKG_CONFIG_PATH} ${prefix}/${LIBDIR}/pkgconfig)
  execute_process(COMMAND ${PKG_CONFIG} --cflags --libs holdfast OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE
    COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(flags UNIX_COMMAND "${flags}")
  separate_arguments(c_flags UNIX_COMMAND "${C_FLAGS}")
  execute_process(COMMAND ${C_COMPILER} -std=c99 ${c_flags} ${SOURCE}/examples/c/main.c ${flags} -lm -o ${WORK}/retention
    COMMAND_ERROR_IS_FATAL ANY)
  set(ENV{LD_LIBRARY_PATH} ${prefix}/${LIBDIR})
  execute_process(COMMAND ${WORK}/retention COMMAND_ERROR_IS_FATAL ANY)
endif()

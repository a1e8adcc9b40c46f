# What the stand-in for Metal makes possible. It is always there, so that no test may be skipped for lack of it. Halide's Metal
# runtime keeps its device, queue and kernels until the process ends: leaks, to the address sanitizer.
set(metal_modifications HOLDFAST_TARGET=unset: HOLDFAST_REQUIRED_BACKENDS=set:metal ASAN_OPTIONS=set:detect_leaks=0)
set_property(TEST variants_test.metal PROPERTY ENVIRONMENT_MODIFICATION ${metal_modifications})

if(HOLDFAST_SANITIZE)
  return()  # for the rest, the builds without are enough
endif()

# Threads and groups in another order, anew between barriers: a right kernel does not notice. Barriers are the same in all types.
add_test(NAME variants_test.metal.shuffled
  COMMAND variants_test --gtest_filter=*_f32_*_metal_*layout_*:*_f32_*_metal_*packed*:*/recurrent_f32_*_metal*:*/power*_f32_*_metal)
set_tests_properties(variants_test.metal.shuffled PROPERTIES LABELS gpu TIMEOUT 1500
  ENVIRONMENT FAKEMETAL_ORDER=shuffle ENVIRONMENT_MODIFICATION "${metal_modifications}")
# A kernel that lacks one of its barriers is noticed.
add_test(NAME fakemetal.barriers
  COMMAND Python::Interpreter ${CMAKE_CURRENT_LIST_DIR}/barriers.py $<TARGET_FILE:variants_test>)
set_tests_properties(fakemetal.barriers PROPERTIES LABELS gpu TIMEOUT 1500 ENVIRONMENT_MODIFICATION "HOLDFAST_TARGET=unset:")

# Objects for Apple's systems can be made here, and hold the very MSL that the tests ran.
add_test(NAME apple_objects.build COMMAND ${CMAKE_COMMAND} --build ${PROJECT_BINARY_DIR} --target holdfast_apple_objects)
add_test(NAME apple_objects.same_msl COMMAND ${CMAKE_COMMAND} -DBUILT=${PROJECT_BINARY_DIR} -DAPPLE=${holdfast_apple_folder}
  "-DSYSTEMS=${holdfast_apple_systems}" -P ${CMAKE_CURRENT_LIST_DIR}/same_msl.cmake)
set_tests_properties(apple_objects.build PROPERTIES FIXTURES_SETUP apple_objects TIMEOUT 600 RUN_SERIAL ON LABELS gpu)
set_tests_properties(apple_objects.same_msl PROPERTIES FIXTURES_REQUIRED apple_objects LABELS gpu)

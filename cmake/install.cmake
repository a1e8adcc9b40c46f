# cmake --install: the shared library, headers, CMake package `holdfast` (target holdfast::holdfast) and holdfast.pc.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS holdfast EXPORT holdfast_targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT library
  FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT library)
# holdfast.h includes dlpack.h: the very one that the library was built with goes along.
install(FILES ${DLPACK_INCLUDE_DIR}/dlpack/dlpack.h
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/dlpack COMPONENT library)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/holdfast)
install(EXPORT holdfast_targets NAMESPACE holdfast:: FILE holdfastConfig.cmake DESTINATION ${package_dir} COMPONENT library)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/holdfastConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/holdfastConfigVersion.cmake DESTINATION ${package_dir} COMPONENT library)

# ${pcfiledir} keeps the installed tree movable.
file(RELATIVE_PATH pc_prefix "/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/")
configure_file(cmake/holdfast.pc.in ${PROJECT_BINARY_DIR}/holdfast.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/holdfast.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT library)

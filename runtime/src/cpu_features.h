// What this CPU can do and the operating system lets it do. Names are those of the NEEDS lists in cmake/targets.cmake.
#pragma once
#include <string>

namespace holdfast {

/// Usable features, separated by spaces. Found once, at first use.
const std::string &cpu_features();

/// "", or what a process needs beside the feature amx_tile, and was refused: Linux hands out tile registers on request only, to
/// the whole process, and from then on signal handlers need larger stacks. So the first call asks for them, and nothing else.
const std::string &missing_permission_for_tiles();

/// Those of `needed` (separated by spaces) that are not usable here; "" if all are.
std::string missing_cpu_features(const std::string &needed);

}  // namespace holdfast

// Where a compiled variant runs, and what this machine lacks for that.
#pragma once
#include "../array.h"
#include "../required.h"
#include "instructions.h"

#include <holdfast/holdfast.h>

#include <sstream>
#include <string>
#include <string_view>

namespace test {

/// The backend of a target of cmake/targets.cmake.
constexpr const char *backend_of(std::string_view target) {
#define HOLDFAST_TARGET(name, backend, needs, ...) \
    if (target == #name) return #backend;
#include <targets.inc>
#undef HOLDFAST_TARGET
    return "";
}

/// CPU features that a variant needs and a test on this machine lacks, or why its backend cannot run; "" if it can be tested.
inline std::string missing_here(const std::string &variant) {
    holdfast_variant row;
    for (int n = 0; holdfast_variant_at(nullptr, n, &row) == HOLDFAST_OK; n++) {
        if (variant != row.name) continue;
        std::istringstream words(row.missing);
        bool testable = true;
        for (std::string word; testable && words >> word;) testable = can_be_tested(word);
        return testable ? "" : row.missing;
    }
    return "(not listed by holdfast_variant_at)";
}

/// The same of a variant with a name and a backend, which fails the test where that backend is required.
template<class Variant>
std::string reason_to_skip(const Variant &variant) {
    const std::string missing = missing_here(variant.name);
    if (!missing.empty() && required(variant.backend))
        ADD_FAILURE() << "HOLDFAST_REQUIRED_BACKENDS has " << variant.backend << ": " << missing;
    return missing;
}

/// Why a case cannot be run by calling a kernel of that backend directly; "" if it can. (The library never asks for either.)
inline std::string not_on(const std::string &backend, Layout layout) {
    const bool reversed = backend != "cpu" && layout == Layout::reversed;
    return reversed ? "Halide's runtime does not copy negative strides to a GPU" : "";
}

}  // namespace test

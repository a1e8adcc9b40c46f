// What this machine lacks to run a compiled variant.
#pragma once
#include <holdfast/holdfast.h>

#include <cstdlib>
#include <sstream>
#include <string>

namespace test {

/// CPU features that a variant needs and this machine lacks, or why its backend cannot run; "" if it runs here.
inline std::string missing_here(const std::string &variant) {
    holdfast_variant row;
    for (int n = 0; holdfast_variant_at(nullptr, n, &row) == HOLDFAST_OK; n++)
        if (variant == row.name) return row.missing;
    return "(not listed by holdfast_variant_at)";
}

/// HOLDFAST_REQUIRED_BACKENDS, names separated by spaces, has that one.
inline bool required(const std::string &backend) {
    const char *list = std::getenv("HOLDFAST_REQUIRED_BACKENDS");
    std::istringstream names(list ? list : "");
    for (std::string name; names >> name;)
        if (name == backend) return true;
    return false;
}

}  // namespace test

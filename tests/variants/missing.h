// What this machine lacks to run a compiled variant.
#pragma once
#include <holdfast/holdfast.h>

#include <string>

namespace test {

inline std::string missing_cpu_features(const std::string &variant) {
    holdfast_variant row;
    for (int n = 0; holdfast_variant_at(nullptr, n, &row) == HOLDFAST_OK; n++)
        if (variant == row.name) return row.missing;
    return "(not listed by holdfast_variant_at)";
}

}  // namespace test

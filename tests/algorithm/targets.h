// The targets of cmake/targets.cmake for just-in-time compilation.
#pragma once
#include "Halide.h"

#include <string>
#include <vector>

namespace test {

struct NamedTarget {
    const char *name;
    Halide::Target target;
};
inline const std::vector<NamedTarget> &targets() {
    static const std::vector<NamedTarget> list = {
#define HOLDFAST_TARGET(name, halide_target) {#name, Halide::Target(halide_target)},
#include "halide_targets.inc"
#undef HOLDFAST_TARGET
    };
    return list;
}

/// Features of `target` that this machine lacks; "" if it runs here.
inline std::string missing(const Halide::Target &target) {
    const Halide::Target host = Halide::get_host_target();
    std::string list;
    for (int n = 0; n < Halide::Target::FeatureEnd; n++) {
        const auto feature = (Halide::Target::Feature)n;
        if (target.has_feature(feature) && !host.has_feature(feature)) list += " " + Halide::Target::feature_to_name(feature);
    }
    return list;
}

/// Types differ where rows are read and written: one target of a schedule shows that. The plainest for the generic schedule of rank
/// 0, else the best that this machine runs.
inline bool shows_types(int rank, const NamedTarget &named) {
    if (rank == 0) return named.name == targets().back().name;
    for (const NamedTarget &best : targets())
        if (missing(best.target).empty()) return named.name == best.name;
    return false;
}

}  // namespace test

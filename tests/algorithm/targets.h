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

/// Whether it is the best target that this machine runs.
inline bool best_here(const NamedTarget &named) {
    for (const NamedTarget &best : targets())
        if (missing(best.target).empty()) return named.name == best.name;
    return false;
}

/// The generic schedule, of rank 0, is compiled for the plainest target and the best one; others wherever they match.
inline bool compiled_for(int rank, const NamedTarget &named) {
    return rank > 0 || named.name == targets().back().name || best_here(named);
}

/// Types differ where rows are read and written: one target of a schedule shows that.
inline bool shows_types(int rank, const NamedTarget &named) {
    return rank == 0 ? named.name == targets().back().name : best_here(named);
}

}  // namespace test

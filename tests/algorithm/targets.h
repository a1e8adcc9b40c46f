// The targets of cmake/targets.cmake for just-in-time compilation.
#pragma once
#include "../dtype.h"
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

/// Whether cmake/kernels.cmake has a variant of that kernel and type for the target.
inline bool has_variants(const std::string &kernel, const NamedTarget &named, const Dtype &dtype = f32) {
#define HOLDFAST_VARIANT(of, function, type, chunk, key, value, target, ...) \
    if (kernel == #of && named.name == std::string(#target) && dtype.name == std::string(#type)) return true;
#include "variants.inc"
#undef HOLDFAST_VARIANT
    return false;
}

/// Whether it is the best target of that kernel and type that this machine runs.
inline bool best_here(const std::string &kernel, const NamedTarget &named, const Dtype &dtype = f32) {
    for (const NamedTarget &best : targets())
        if (missing(best.target).empty() && has_variants(kernel, best, dtype)) return named.name == best.name;
    return false;
}

/// The targets that a schedule is compiled for: the generic one, of rank 0, for the plainest, others for all that have such a
/// variant. Types differ where rows are read and written: the best target shows those of 16 bits.
inline bool compiled_for(const std::string &kernel, int rank, const NamedTarget &named, const Dtype &dtype = f32) {
    if (rank == 0) return named.name == targets().back().name && has_variants(kernel, named, dtype);
    return dtype == f32 ? has_variants(kernel, named) : best_here(kernel, named, dtype);
}

}  // namespace test

// What the tests of algorithms are instances of: a kernel for some sizes and types, compiled just in time by one of its schedules.
#pragma once
#include "../../generators/chunkwise.h"
#include "../../generators/head_norm_gate.h"
#include "../../generators/head_norm_gate_backward.h"
#include "../../generators/parallel.h"
#include "../../generators/power.h"
#include "../../generators/power_step.h"
#include "../../generators/recurrent.h"
#include "../../generators/rotate.h"
#include "../../schedules/schedule.h"
#include "../shapes.h"
#include "targets.h"

#include <gtest/gtest.h>

namespace test {

template<class Sizes>
struct Instance {
    std::string schedule;  // its name, or "none"
    NamedTarget target;
    Sizes sizes;
    Size size;  // what the kernel is called with
    Dtype dtype = f32;
    std::vector<int> degrees = {};  // that it is called with, one after the other
};

inline bool rounded(const holdfast::ChunkwiseSizes &sizes) { return sizes.operands != holdfast::Dtype::f32; }

/// The generator's parameters for such sizes.
inline Halide::GeneratorParamsMap parameters(const holdfast::ChunkwiseSizes &s) {
    return {{"chunk", std::to_string(s.chunk)},
            {"key_size", std::to_string(s.key)},
            {"value_size", std::to_string(s.value)},
            {"causal_tile", std::to_string(s.causal_tile)},
            {"round_operands", rounded(s) ? "true" : "false"}};
}
inline Halide::GeneratorParamsMap parameters(const holdfast::PowerSizes &s) {
    return {{"degree", std::to_string(s.degree)}, {"chunk", std::to_string(s.chunk)},
            {"key_size", std::to_string(s.key)},  {"value_size", std::to_string(s.value)},
            {"block", std::to_string(s.block)},   {"causal_tile", std::to_string(s.causal_tile)}};
}
inline Halide::GeneratorParamsMap parameters(const holdfast::PowerStepSizes &s) {
    return {{"degree", std::to_string(s.degree)}, {"key_size", std::to_string(s.key)}, {"value_size", std::to_string(s.value)}};
}
inline Halide::GeneratorParamsMap parameters(const holdfast::ParallelSizes &s) {
    return {{"chunk", std::to_string(s.block)},
            {"key_size", std::to_string(s.key)},
            {"value_size", std::to_string(s.value)},
            {"causal_tile", std::to_string(s.causal_tile)}};
}
inline Halide::GeneratorParamsMap parameters(const holdfast::RecurrentSizes &s) {
    return {{"chunk", std::to_string(s.tokens)}, {"key_size", std::to_string(s.key)}, {"value_size", std::to_string(s.value)}};
}
inline Halide::GeneratorParamsMap parameters(const holdfast::HeadNormGateSizes &) { return {}; }
inline Halide::GeneratorParamsMap parameters(const holdfast::HeadNormGateBackwardSizes &) { return {}; }
inline Halide::GeneratorParamsMap parameters(const holdfast::RotateSizes &) { return {}; }

template<class Sizes>
std::string name(const Instance<Sizes> &i) {
    std::string name = i.schedule + "_" + i.target.name;
    for (const auto &[parameter, value] : parameters(i.sizes)) name += "_" + parameter + "_" + (value == "0" ? "any" : value);
    return name + "_" + i.dtype.name;
}
template<class Sizes>
void PrintTo(const Instance<Sizes> &i, std::ostream *stream) {
    *stream << name(i);
}

/// Compiles it and calls test(kernel). The test is skipped where this CPU cannot run it; an error of Halide's fails it.
template<class Sizes, class Test>
void compile_and(const std::string &kernel, const Instance<Sizes> &i, const Test &test) {
    if (!missing(i.target.target).empty()) GTEST_SKIP() << "this CPU lacks" << missing(i.target.target);
    Halide::GeneratorParamsMap all = parameters(i.sizes);
    if (kernel == "parallel_backward") all.erase("causal_tile");  // it has none
    all["dtype"] = i.dtype.name, all["forced_schedule"] = i.schedule;
    try {
        const Halide::GeneratorContext context(i.target.target.with_feature(Halide::Target::JIT));
        test(Halide::create_callable_from_generator(context, kernel, all));
    } catch (const Halide::Error &e) {
        FAIL() << e.what();
    }
}

/// Of a kernel of any size: without any schedule in all types, if these do not take too long, and all of its schedules in fp32. Other
/// types: variants/.
template<class Funcs, class Sizes>
std::vector<Instance<Sizes>> instances_of_any_size(const std::string &kernel, bool all_types = true) {
    std::vector<Instance<Sizes>> list;
    for (const Dtype &dtype : all_dtypes)
        if (all_types || dtype == f32) list.push_back({"none", targets().back(), {}, {}, dtype});
    for (const auto &schedule : holdfast::Schedule<Funcs, Sizes>::all())
        for (const NamedTarget &named : targets())
            if (compiled_for(kernel, schedule.rank, named) && schedule.matches(named.target, {}))
                list.push_back({schedule.name, named, {}, {}});
    return list;
}

}  // namespace test

// x86 with AVX-512 or AVX2: the sums of some rows, and then what they give: a row's sum, its root and quotients take as long
// as half of its elements, and other rows do not wait for them. Four vectors of a row at a time, without a loop. Rows end in a
// vector of fewer elements. Not parallel: the runtime spreads tokens over threads.
//
// AMD EPYC (Zen 4), one core, AVX-512, 8 heads, V = 64, RMS norm, microseconds, the generic schedule compiled for the same
// processor behind it (retention_bench): 256 tokens 54 (118) in fp32, 67 (133) in fp16, 79 (158) in bf16; 4096 941 (2054),
// 1086 (2156), 1256 (2529). That is 0.41 ns an element in fp32; the same loop in intrinsics takes 0.38, of which the sigmoids
// 0.25. In bf16 rounding takes 0.12. Tried without gain: reciprocals of 14 bits and a step of Newton's in place of quotients;
// all of a row of 64 in registers.
#include "../../generators/head_norm_gate.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int vectors = 4, rows = 8;  // at a time

void apply(HeadNormGateFuncs &f, const HeadNormGateSizes &, const Target &target) {
    Var e("e"), h("h"), t("t"), b("b"), lane("lane"), eo("eo"), em("em"), ei("ei"), ho("ho"), hi("hi");
    RVar ro("ro"), rm("rm"), ri("ri");
    const int vec = target.natural_vector_size<float>();
    const TailStrategy tail = TailStrategy::GuardWithIf;  // in place, nothing may be done twice

    f.result.split(e, eo, ei, vec, tail).split(eo, eo, em, vectors, tail).split(h, ho, hi, rows, tail);
    f.result.reorder(ei, em, eo, hi, ho, t, b).vectorize(ei).unroll(em);
    f.weight_or_one.compute_root().vectorize(e, vec, tail).update().reorder(e, f.over_weight, h).vectorize(e, vec, tail);
    f.first.compute_at(f.result, ho);
    f.factor.compute_at(f.result, ho).vectorize(h, rows, tail);
    for (Func sum : {f.sum, f.squares}) {
        sum.compute_at(f.result, ho).update().split(f.over_value, ro, ri, vec, tail);
        Func lanes = sum.update().rfactor(ri, lane);
        lanes.compute_at(sum, h).vectorize(lane).update().split(ro, ro, rm, vectors, tail).reorder(lane, rm, ro);
        lanes.update().vectorize(lane).unroll(rm);
        sum.update().atomic().vectorize(ri, vec, tail);
        sum.update().specialize(f.value_extent >= vec);
    }
    f.result.specialize(f.gated && !f.layer_norm);
    f.result.specialize(f.gated && f.layer_norm);
}

bool matches(const Target &t, const HeadNormGateSizes &) {
    return t.arch == Target::X86 && !t.has_gpu_feature() && t.has_feature(Target::AVX2);
}

const bool added = Schedule<HeadNormGateFuncs, HeadNormGateSizes>::add({"x86", 10, matches, apply});
}  // namespace

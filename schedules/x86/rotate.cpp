// x86 with AVX-512 or AVX2: as the generic schedule, two vectors of pairs at a time, without a loop: all of 32 pairs with
// AVX-512.
//
// AMD EPYC (Zen 4), one core, AVX-512, 8 heads of 64, halves of rows, microseconds, the generic schedule compiled for the same
// processor behind it (retention_bench): 256 tokens 19.7 (23.4) in fp32, 20.6 (24.7) in fp16, 26.5 (33.0) in bf16; 4096 308
// (384), 332 (391), 421 (523).
#include "../../generators/rotate.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(RotateFuncs &f, const RotateSizes &, const Target &target) {
    Var j("j"), p("p"), h("h"), t("t"), b("b"), jo("jo"), jm("jm"), ji("ji");
    const int vec = target.natural_vector_size<float>(), wide = 2 * vec;
    const TailStrategy tail = TailStrategy::GuardWithIf;  // in place, nothing may be done twice

    f.turn.compute_root().vectorize(j, vec, tail);
    f.result.split(j, jo, ji, wide, tail).split(ji, jm, ji, vec).reorder(ji, p, jm, jo, h, t, b);
    f.result.vectorize(ji).unroll(p).unroll(jm);
    f.rotation.compute_at(f.result, t).hoist_storage_root().vectorize(j, vec, tail);
    Var x_j = f.x.args()[0], x_p = f.x.args()[1];
    f.x.compute_at(f.result, jm).bound_storage(x_j, vec).bound_extent(x_p, 2).vectorize(x_j, vec, tail).unroll(x_p);
    for (const Expr &layout : {f.half_split, f.interleaved}) f.result.specialize(layout);
}

bool matches(const Target &t, const RotateSizes &) {
    return t.arch == Target::X86 && !t.has_gpu_feature() && t.has_feature(Target::AVX2);
}

const bool added = Schedule<RotateFuncs, RotateSizes>::add({"x86", 10, matches, apply});
}  // namespace

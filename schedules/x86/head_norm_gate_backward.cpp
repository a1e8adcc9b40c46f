// x86 with AVX-512 or AVX2: all gradients of a token's heads, some at a time, after one another, in one loop over such blocks,
// so that what they have in common is computed once and stays in L1: elements without their mean, in fp32, what the gate lets
// through, and its slope. Sums for the weight are of each block, and these are added up at the end. Four vectors of a row at a
// time, without a loop. A block goes through a page of each tensor in a burst, which no hardware prefetcher sees coming: lines
// of later tokens are asked for in between. Not parallel: the runtime spreads tokens over threads.
//
// AMD EPYC (Zen 4), one core, AVX-512, 8 heads, V = 64, RMS norm, all three gradients, microseconds, the generic schedule
// compiled for the same processor behind it (retention_bench): 256 tokens 184 (178) in fp32, 173 (208) in fp16, 173 (231) in
// bf16; 4096 4099 (4923), 3170 (3725), 2995 (4002). From memory fp32 goes 0.4 to 0.6 times as fast as copying as many bytes.
// Exponentials and quotients are 0.4 of the 1.2 ns of an element. Without asking for lines, and two tokens to a block: 157,
// 140 and 167 for 256, 5218, 3485 and 3265 for 4096. Heads 2 at a time: up to 1.3 times as long. dgate or dweight alone may
// take 1.25 times what it does by the generic schedule.
#include "../../generators/head_norm_gate_backward.h"
#include "../schedule.h"
#include "prefetch.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int tokens = 1, rows = 8, vectors = 4;  // of a block, of each token of it, and of a row at a time
constexpr int ahead = 2;                          // tokens, that lines of memory are asked for

void apply(HeadNormGateBackwardFuncs &f, const HeadNormGateBackwardSizes &, const Target &target) {
    Var e("e"), h("h"), t("t"), b("b"), w("w"), lane("lane"), eo("eo"), em("em"), ei("ei"), to("to"), ti("ti"), ho("ho"),
        hi("hi"), ask(x86::ask_tokens_ahead(ahead));
    RVar ro("ro"), rm("rm"), ri("ri"), rto("rto"), rti("rti");
    const int vec = target.natural_vector_size<float>();
    const TailStrategy tail = TailStrategy::GuardWithIf;  // rows end where others, or the caller's other memory, begin
    HeadNormGateFuncs &y = f.forward;

    y.weight_or_one.compute_root().vectorize(e, vec, tail).update().reorder(e, y.over_weight, h).vectorize(e, vec, tail);
    // First in vectors: of those behind the last, a condition on a number keeps all but one.
    auto in_vectors = [&](Stage stage, const Var &outer) {
        return stage.split(e, outer, ei, vec, tail).split(outer, outer, em, vectors, tail).vectorize(ei).unroll(em);
    };
    const LoopLevel block(f.result_dx, ho);
    auto gradient_of_rows = [&](Stage gradient, const RDom &wanted) {
        in_vectors(gradient, ask).split(t, to, ti, tokens, tail).split(h, ho, hi, rows, tail);
        gradient.reorder(ei, em, ask, wanted, hi, ti, ho, to, b);
    };
    gradient_of_rows(f.result_dx.update(), f.want_dx), gradient_of_rows(f.result_dgate.update(), f.want_dgate);

    f.dweight.compute_root().vectorize(e, vec, tail).update().split(f.over_tokens.x, rto, rti, tokens, tail);
    Func of_block = f.dweight.update().rfactor({{rto, to}, {f.over_tokens.y, b}});
    in_vectors(f.dweight.update(), eo).reorder(ei, em, eo, h, rto, f.over_tokens.y);
    of_block.compute_root().vectorize(e, vec, tail);
    in_vectors(of_block.update(), eo).split(h, ho, hi, rows, tail).reorder(ei, em, eo, hi, rti, ho, to, b);
    for (Stage other : {f.result_dgate.update(), of_block.update()}) other.compute_with(f.result_dx.update(), ho);

    auto in_block = [&](Func stage) { return stage.compute_at(block).hoist_storage_root(); };
    for (Func of_element : {y.centered, f.through_gate}) in_vectors(in_block(of_element), ask);
    y.sigmoid.compute_at(f.through_gate, em).bound_storage(e, vec).vectorize(e, vec, tail);  // else divided by twice
    y.centered.specialize(!y.layer_norm), f.through_gate.specialize(y.gated);
    for (Func sum : {y.sum, y.squares, f.dfactor, f.dsum}) {  // in the lanes of vectors
        const RVar row = sum.rvars(0)[0];
        in_block(sum).update().split(row, ro, ri, vec, tail);
        Func lanes = sum.update().rfactor(ri, lane);
        lanes.compute_at(sum, h).vectorize(lane).update().split(ro, ro, rm, vectors, tail).reorder(lane, rm, ro);
        lanes.update().vectorize(lane).unroll(rm);
        sum.update().atomic().vectorize(ri, vec, tail);
        sum.update().specialize(y.value_extent >= vec);  // they are then added up by shuffling
    }
    for (Func of_row : {y.factor, f.dsquares}) in_block(of_row).vectorize(h, rows, tail);
    in_block(y.first);

    in_vectors(f.result_dweight.update(0), eo).reorder(ei, em, eo, f.want_dweight, w);
    in_vectors(f.result_dweight.update(1), eo).reorder(ei, em, eo, f.over_heads, w);
}

bool matches(const Target &t, const HeadNormGateBackwardSizes &) {
    return t.arch == Target::X86 && !t.has_gpu_feature() && t.has_feature(Target::AVX2);
}

const bool added = Schedule<HeadNormGateBackwardFuncs, HeadNormGateBackwardSizes>::add({"x86", 10, matches, apply});
}  // namespace

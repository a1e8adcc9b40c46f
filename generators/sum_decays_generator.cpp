// Adds up gradients of log decays, of every token and batch entry, for decays that are one per head: on GPUs, whose kernels leave
// them per token. By blocks, because thousands of terms in one fp32 sum would lose digits.
#include "../schedules/schedule.h"
#include "sum_decays.h"

namespace {
using namespace Halide;
using namespace holdfast;

class SumDecaysGenerator : public Generator<SumDecaysGenerator> {
public:
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};  // schedule.h

    Input<Buffer<float, 3>> gradients{"gradients"};  // (t, h, b), any strides
    Output<Buffer<float, 1>> sums{"sums"};           // (h), any stride

    void generate() {
        Var h("h"), b("b"), n("n");
        const int block = 256;
        const Expr T = gradients.dim(0).extent(), H = sums.dim(0).extent(), B = gradients.dim(2).extent();
        RDom in_block(0, block, "in_block"), over(0, (T + block - 1) / block, 0, B, "over");
        f.of_block = Func("of_block");
        const Expr t = n * block + in_block;
        f.of_block(n, h, b) += select(t < T, gradients(min(t, T - 1), h, b), 0.0f);
        f.of_head = Func("of_head");
        f.of_head(h) += f.of_block(over.x, h, over.y);
        sums(h) = f.of_head(h);
        f.result = sums;
        gradients.dim(0).set_bounds(0, T).set_stride(Expr());
        gradients.dim(1).set_bounds(0, H), gradients.dim(2).set_bounds(0, B);
        sums.dim(0).set_bounds(0, H).set_stride(Expr());
    }
    void schedule() {
        if (!using_autoscheduler()) apply_schedule(f, SumDecaysSizes{}, get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    SumDecaysFuncs f;
};
}  // namespace

HALIDE_REGISTER_GENERATOR(SumDecaysGenerator, sum_decays)

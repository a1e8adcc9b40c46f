// Makes rows of 16 bits zero, of any type, where a GPU has them: gradients that nothing comes to. What is of fp32 convert_state
// clears.
#include "../schedules/schedule.h"
#include "clear.h"

namespace {
using namespace Halide;
using namespace holdfast;

class ClearGenerator : public Generator<ClearGenerator> {
public:
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};  // schedule.h

    Output<Buffer<uint16_t, 4>> cleared{"cleared"};  // (x, y, h, b), any strides

    void generate() {
        Var x("x"), y("y"), h("h"), b("b");
        cleared(x, y, h, b) = cast<uint16_t>(0);
        for (int m = 0; m < 4; m++) cleared.dim(m).set_min(0);
        cleared.dim(0).set_stride(Expr());
        f.cleared = cleared;
    }
    void schedule() {
        if (!using_autoscheduler()) apply_schedule(f, ClearSizes{}, get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    ClearFuncs f;
};
}  // namespace

HALIDE_REGISTER_GENERATOR(ClearGenerator, clear_16)

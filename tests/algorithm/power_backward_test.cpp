// The gradient of power retention compiled just in time: without any schedule, and with every registered one, for each target of
// cmake/targets.cmake that this machine runs. Small chunks and sizes, where every index is an edge.
#include "../../generators/adjoint.h"
#include "../../generators/power_backward.h"
#include "../power_backward_call.h"
#include "instance.h"
#include "produced.h"

namespace {
using namespace Halide;
using namespace test;
using holdfast::PowerBackwardFuncs;
using holdfast::PowerSizes;
using Schedules = holdfast::Schedule<PowerBackwardFuncs, PowerSizes>;
using Instance = test::Instance<PowerSizes>;

std::vector<Instance> instances() {
    const NamedTarget plain = targets().back();
    std::vector<Instance> list = {
        {"none", plain, {2, 2, 2, 2, 3, 2}, {2, 2}, f32, {2}},  // degree, chunk, K, V, block, causal tile
    };
    const std::vector<std::pair<PowerSizes, Size>> scheduled = {
        {{0, 8, 0, 0, 16, 8}, {5, 17}}, {{2, 64, 16, 32, 34, 64}, {16, 32}}, {{3, 64, 16, 64, 48, 64}, {16, 64}}};
    for (const auto &schedule : Schedules::all())
        for (const NamedTarget &named : targets())
            for (const auto &[sizes, size] : scheduled)
                for (const Dtype &dtype : all_dtypes) {
                    if (!compiled_for("power_backward", schedule.rank, named, dtype) ||
                        !schedule.matches(named.target, sizes) || (schedule.rank == 0 && sizes.degree))
                        continue;
                    const bool types = sizes.degree == (schedule.rank == 0 ? 0 : 2);
                    if (!(dtype == f32) && !types) continue;
                    if (sizes.degree == 3 && !best_here("power_backward", named)) continue;  // it takes seconds to compile
                    std::vector<int> degrees = {sizes.degree};
                    if (!sizes.degree) degrees = dtype == f32 ? std::vector<int>{1, 2, 3, 4} : std::vector<int>{2};
                    list.push_back({schedule.name, named, sizes, size, dtype, degrees});
                }
    return list;
}

class PowerBackward : public testing::TestWithParam<Instance> {};

TEST_P(PowerBackward, MatchesReference) {
    const Instance &instance = GetParam();
    const PowerSizes &sizes = instance.sizes;
    // Without a schedule, where all stages are computed again for every element that looks at them.
    const std::string few = "gates_weak layout_padded plain_resets unwanted_5";
    compile_and("power_backward", instance, [&](const Callable &kernel) {
        for (int degree : instance.degrees)
            for (const PowerBackwardCase &c : power_backward_cases(sizes.chunk, instance.dtype))
                if (instance.schedule != "none" || few.find(c.name) != std::string::npos)
                    PowerBackwardCall(c, instance.size, degree, instance.dtype, sizes.value > 0).expect_reference(kernel);
    });
}

HOLDFAST_INSTANCES(PowerBackward, instances());

TEST(PowerBackwardStages, AreComputedForWhatIsWantedAlone) {
    const Target target = targets().back().target.with_feature(Target::JIT).with_feature(Target::TraceStores);
    const Callable kernel = create_callable_from_generator(GeneratorContext(target), "power_backward",
                                                           {{"degree", "0"},
                                                            {"chunk", "8"},
                                                            {"key_size", "0"},
                                                            {"value_size", "0"},
                                                            {"block", "16"},
                                                            {"causal_tile", "8"},
                                                            {"forced_schedule", "generic"}});
    for (const bool normalize : {false, true})
        for (int wanted = 0; wanted < 32; wanted++) {
            SCOPED_TRACE(testing::Message() << "normalize " << normalize << ", wanted " << wanted);
            const bool dq = wanted & 1, dk = wanted & 2, dv = wanted & 4, gates = wanted & 8, dstate = wanted & 16;
            Produced produced;
            PowerBackwardCall({"", {5}, 1, 1, 1, Layout::compact, Gates::weak, normalize, dq, dk, dv, gates, dstate}, {3, 5}, 2)
                .expect_reference([&](auto &&...arguments) { return kernel(produced.context(), arguments...); });
            auto expect = [&](const char *stage, bool needed) {
                EXPECT_EQ(produced.stages.count(stage), needed) << stage << " of " << testing::PrintToString(produced.stages);
            };
            expect("dqueries_state", dq || gates), expect("dkeys_state", dk || gates);
            expect("derived of state_start", dstate);
            const bool phi_k = produced.stages.count("phi_k") || produced.stages.count("derived of phi_k");
            EXPECT_EQ(phi_k, dv || dk || gates) << testing::PrintToString(produced.stages);
            expect("dnum", wanted != 0);
            expect("along_row", gates), expect("along_state", gates);
        }
}

// Values that are the initial state: what is derived counts for the state, and of values there is nothing left.
TEST(MissingAdjoint, FailsTheBuildByItsName) {
    const PowerSizes sizes = {2, 4, 2, 2, 3, 4};
    auto build = [&](bool one_func) -> std::string {
        Var b("b"), h("h"), g("g"), i("i"), d("d"), f("f"), e("e");
        auto input = [](const char *name, const std::vector<Var> &args) {
            Func func(name);
            func(args) = 1.0f;
            return func;
        };
        const Func q = input("q", {d, i, g, h, b}), k = input("k", {d, i, h, b}), v = input("v", {e, i, h, b});
        const Func log_decay = input("log_decay", {i, h, b}), state = input("state", {e, f, h, b});
        const Func keys = input("keys", {f, h, b}), out = input("out", {e, i, g, h, b}), dout = input("dout", {e, i, g, h, b});
        const Func dstate = input("dstate", {e, f, h, b}), dkeys = input("dkeys", {f, h, b});
        try {
            holdfast::power_backward(q, k, one_func ? state : v, log_decay, state, keys, out, dout, dstate, dkeys,
                                     {2, 3, 2, 1, 1, 1}, {2, 1, 1.0f}, sizes);
            return "";
        } catch (const CompileError &error) {
            return error.what();
        }
    };
    EXPECT_EQ(build(false), "");
    EXPECT_NE(build(true).find("autodiff has no adjoint of values"), std::string::npos);
}

// As all kernels ask: Halide itself says zero of what it drops on its way, and nothing of what it does not meet.
TEST(MissingAdjoint, IsOneThatIsZeroToo) {
    Var x("x");
    Func kept("kept"), dropped("dropped"), apart("apart"), whole("whole"), out("out"), one("one");
    kept(x) = cast<float>(x), dropped(x) = kept(x) + 1.0f, apart(x) = 2.0f, one(x) = 1.0f;
    whole(x) = cast<int>(dropped(x));  // has no slope
    out(x) = kept(x) * cast<float>(whole(x));
    const Derivative derivative = propagate_adjoints(out, one, {{0, 7}});
    auto asks_for = [&](const Func &stage) -> std::string {
        try {
            holdfast::adjoint_of(derivative, "it", stage);
            return "";
        } catch (const CompileError &error) {
            return error.what();
        }
    };
    EXPECT_EQ(asks_for(kept), "");
    for (const Func &stage : {dropped, apart})
        EXPECT_NE(asks_for(stage).find("autodiff has no adjoint of it"), std::string::npos);
}

}  // namespace

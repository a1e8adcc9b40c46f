// That the tests of gradients can fail: in the algorithms, on the generic schedule, one adjoint is broken at a time, its sign, a decay
// that is off by one, a state whose gradient is missing, and the comparison with the reference has to see it.
#include "../backward_call.h"
#include "../head_norm_gate_backward_call.h"
#include "../parallel_backward_call.h"
#include "../power_backward_call.h"
#include "targets.h"

#include <gtest/gtest-spi.h>

#include <cctype>
#include <functional>

namespace {
using namespace Halide;
using namespace Halide::Internal;
using namespace test;

/// In the definitions of all Funcs whose names begin with `in`, calls of what begins with `of` become something else.
struct Mutation {
    const char *name, *in, *of;
    std::function<Expr(const Call *)> broken;
    const char *seen;  // what the comparison has to find wrong
};
void PrintTo(const Mutation &m, std::ostream *stream) { *stream << m.name; }

Expr negated(const Call *call) { return -Expr(call); }
Expr missing(const Call *call) { return make_zero(call->type); }
/// With argument n one less, if it is not 0.
std::function<Expr(const Call *)> off_by_one(size_t n) {
    return [=](const Call *call) {
        std::vector<Expr> args = call->args;
        args[n] = max(args[n] - 1, 0);
        return Call::make(call->type, call->name, args, call->call_type, call->func, call->value_index, call->image,
                          call->param);
    };
}

class Break : public IRMutator {
public:
    explicit Break(const Mutation &mutation) : mutation(mutation) {}
    int broken = 0;

private:
    const Mutation &mutation;
    using IRMutator::visit;
    Expr visit(const Call *op) override {
        if (op->call_type != Call::Halide || op->name.rfind(mutation.of, 0) != 0) return IRMutator::visit(op);
        broken++;
        return mutation.broken(op);
    }
};

/// The generator's pipeline, compiled just in time with that mutation, if there is one.
Callable compile(const std::string &generator, const GeneratorParamsMap &params, const Mutation *mutation) {
    const Target target = targets().back().target.with_feature(Target::JIT);
    const AbstractGeneratorPtr made = GeneratorRegistry::create(generator, GeneratorContext(target));
    for (const auto &[name, value] : params) made->set_generatorparam_value(name, value);
    Pipeline pipeline = made->build_pipeline();
    if (mutation) {
        Break mutate(*mutation);
        std::map<std::string, Function> all;
        for (const Func &output : pipeline.outputs())
            for (auto &stage : find_transitive_calls(output.function())) all.insert(stage);
        for (auto &[name, function] : all)
            if (name.rfind(mutation->in, 0) == 0) function.mutate(&mutate);
        EXPECT_GT(mutate.broken, 0) << "no Func that begins with " << mutation->in << " calls one that begins with "
                                    << mutation->of;
    }
    std::vector<Argument> arguments;
    for (const AbstractGenerator::ArgInfo &info : made->arginfos())
        if (info.dir == ArgInfoDirection::Input)
            for (const Parameter &p : made->input_parameter(info.name))
                arguments.emplace_back(p.name(), p.is_buffer() ? Argument::InputBuffer : Argument::InputScalar, p.type(),
                                       p.dimensions(), p.get_argument_estimates());
    return pipeline.compile_to_callable(arguments, target);
}

/// What the comparisons of `run` say against it.
std::string failures_of(const std::function<void()> &run) {
    testing::TestPartResultArray results;
    {
        const testing::ScopedFakeTestPartResultReporter reporter(
            testing::ScopedFakeTestPartResultReporter::INTERCEPT_ONLY_CURRENT_THREAD, &results);
        run();
    }
    std::string text;
    for (int n = 0; n < results.size(); n++)
        if (results.GetTestPartResult(n).failed()) text += results.GetTestPartResult(n).message() + std::string("\n");
    return text;
}

/// Whether a comparison finds `what` wrong, at an index of it: its name alone also stands in traces.
bool finds(const std::string &failures, const std::string &what) {
    const std::string element = what + "[";
    for (size_t at = failures.find(element); at != std::string::npos; at = failures.find(element, at + 1))
        if (at == 0 || !(std::isalnum(failures[at - 1]) || failures[at - 1] == '_')) return true;
    return false;
}

// ---- Chunkwise ---------------------------------------------------------------------------------------------------------

constexpr int C = 4;  // tokens in a chunk
constexpr Size size = {3, 5};
const GeneratorParamsMap sizes = {{"chunk", std::to_string(C)}, {"key_size", "3"}, {"value_size", "5"}};

const Mutation of_chunkwise[] = {
    {"sign_of_keys_in_gates", "dlog_decay_chunks", "key_product", negated, "dlog_decay"},
    {"gates_off_by_one", "dlog_decay_chunks", "row_product", off_by_one(0), "dlog_decay"},
    {"no_state_in_gates", "dlog_decay_chunks", "end_product", missing, "dlog_decay"},
    {"no_gradient_of_the_final_state", "dstate", "dstate_end", missing, "dstate_in"},
    {"decay_of_chunks_off_by_one", "dstate", "chunk_decay", off_by_one(0), "dstate_in"},
    {"sign_of_values_from_states", "v_chunks", "contribution", negated, "dv"},
    {"decay_of_keys_off_by_one", "k_chunks", "key_decay", off_by_one(0), "dk"},
    {"sign_of_states_for_queries", "q_chunks", "state", negated, "dq"},
};

class ChunkwiseMutations : public testing::TestWithParam<Mutation> {};

std::string failures_of_chunkwise(const Mutation *mutation, bool rounded = false) {
    GeneratorParamsMap params = sizes;
    if (rounded) params["dtype"] = "bf16", params["round_operands"] = "true";
    const Callable kernel = compile("chunkwise_backward", params, mutation);
    KernelCase c;
    for (const KernelCase &each : kernel_cases(C))
        if (each.name == "groups") c = each;
    return failures_of([&] { BackwardCall(c, C, size, rounded ? bf16 : f32, {}, rounded).expect_reference(kernel); });
}

TEST_P(ChunkwiseMutations, AreSeen) { EXPECT_TRUE(finds(failures_of_chunkwise(&GetParam()), GetParam().seen)); }
TEST(WithoutMutation, ChunkwiseIsRight) { EXPECT_EQ(failures_of_chunkwise(nullptr), ""); }

INSTANTIATE_TEST_SUITE_P(, ChunkwiseMutations, testing::ValuesIn(of_chunkwise),
                         [](const auto &info) { return info.param.name; });

// Of rounded operands, whose products have their decays taken out; without mutation in chunkwise_backward_test.cpp.
const Mutation of_rounded[] = {
    {"decay_of_rows_off_by_one", "q_chunks", "row_decay", off_by_one(0), "dq"},
    {"decay_of_keys_off_by_one", "v_chunks", "key_decay", off_by_one(0), "dv"},
};

class RoundedMutations : public testing::TestWithParam<Mutation> {};

TEST_P(RoundedMutations, AreSeen) { EXPECT_TRUE(finds(failures_of_chunkwise(&GetParam(), true), GetParam().seen)); }

INSTANTIATE_TEST_SUITE_P(, RoundedMutations, testing::ValuesIn(of_rounded), [](const auto &info) { return info.param.name; });

// ---- Power retention ---------------------------------------------------------------------------------------------------

const Mutation of_power[] = {
    {"sign_of_keys_in_gates", "dgates", "along_key", negated, "dlog_decay"},
    {"gates_off_by_one", "dgates", "along_key", off_by_one(0), "dlog_decay"},
    {"no_state_in_gates", "dgates", "kept", missing, "dlog_decay"},
    {"no_gradient_of_the_final_state", "dstate", "dstate_end", missing, "dstate"},
    {"no_gradient_of_the_final_sum", "dkeys_sum", "dkeys_end", missing, "dkeys"},
    {"decay_of_keys_off_by_one", "dkey", "key_decay", off_by_one(0), "dk"},
    {"sign_of_denominators", "dden", "from_out", negated, "dq"},
    {"no_state_for_queries", "dquery", "dqueries_state", missing, "dq"},
};

class PowerMutations : public testing::TestWithParam<Mutation> {};

std::string failures_of_power(const Mutation *mutation) {
    const GeneratorParamsMap params = {{"chunk", std::to_string(C)}, {"key_size", "0"}, {"value_size", "0"}, {"degree", "0"}};
    const Callable kernel = compile("power_backward", params, mutation);
    const PowerBackwardCase c = {"two calls", {C, C - 1}, 1, 2, 2, Layout::padded, Gates::weak, true};
    return failures_of([&] { PowerBackwardCall(c, size, 2).expect_reference(kernel); });
}

TEST_P(PowerMutations, AreSeen) { EXPECT_TRUE(finds(failures_of_power(&GetParam()), GetParam().seen)); }
TEST(WithoutMutation, PowerIsRight) { EXPECT_EQ(failures_of_power(nullptr), ""); }

INSTANTIATE_TEST_SUITE_P(, PowerMutations, testing::ValuesIn(of_power), [](const auto &info) { return info.param.name; });

// ---- The parallel form -------------------------------------------------------------------------------------------------

const Mutation of_parallel[] = {
    {"sign_of_gates", "dlog_decay_of_rows", "ddecay_after", negated, "dlog_decay"},
    {"gates_off_by_one", "ddecay_after", "ddecay", off_by_one(0), "dlog_decay"},
    {"no_later_blocks_in_gates", "dlog_decay_of_rows", "ddecay_of_later", missing, "dlog_decay"},
    {"sign_of_denominators", "dden", "out_dout", negated, "dq"},
    {"sign_of_earlier_keys_in_gates", "ddecay_before", "ddecay_before", negated, "dlog_decay"},
    {"keys_of_another_block_in_gates", "ddecay_of_later", "ddecay_before", off_by_one(0), "dlog_decay"},
    {"factor_of_another_row", "dnum", "factor_of_row", off_by_one(0), "dv"},
};

class ParallelMutations : public testing::TestWithParam<Mutation> {};

std::string failures_of_parallel(const Mutation *mutation) {
    const Callable kernel = compile("parallel_backward", sizes, mutation);
    const ParallelBackwardCase c = {"three blocks", 1, 2 * C + 1, 2, 2, Layout::padded, Gates::weak, 2, true};
    return failures_of([&] { ParallelBackwardCall(c, size).expect_reference(kernel); });
}

TEST_P(ParallelMutations, AreSeen) { EXPECT_TRUE(finds(failures_of_parallel(&GetParam()), GetParam().seen)); }
TEST(WithoutMutation, ParallelIsRight) { EXPECT_EQ(failures_of_parallel(nullptr), ""); }

INSTANTIATE_TEST_SUITE_P(, ParallelMutations, testing::ValuesIn(of_parallel), [](const auto &info) { return info.param.name; });

// ---- Norm and gate of heads --------------------------------------------------------------------------------------------

const Mutation of_norm[] = {
    {"no_gradient_of_the_mean", "ddistance", "dsum", missing, "dx"},
    {"sign_of_squares", "dcentered", "dsquares", negated, "dx"},
    {"factor_of_another_head", "dcentered", "factor", off_by_one(0), "dx"},
    {"sign_of_swish", "dgate_of_row", "dswish", negated, "dgate"},
    {"gate_of_another_head", "dfactor", "through_gate", off_by_one(1), "dx"},
    {"factor_of_another_token", "dweight", "factor", off_by_one(1), "dweight"},
};

class NormMutations : public testing::TestWithParam<Mutation> {};

std::string failures_of_norm(const Mutation *mutation) {
    const Callable kernel = compile("head_norm_gate_backward", {}, mutation);
    const NormBackwardCase c = {{"layer", 2, 3, 4, 7, Layout::padded, true, true}};
    return failures_of([&] { NormBackwardCall(c, f32).expect_reference(kernel); });
}

TEST_P(NormMutations, AreSeen) { EXPECT_TRUE(finds(failures_of_norm(&GetParam()), GetParam().seen)); }
TEST(WithoutMutation, NormIsRight) { EXPECT_EQ(failures_of_norm(nullptr), ""); }

INSTANTIATE_TEST_SUITE_P(, NormMutations, testing::ValuesIn(of_norm), [](const auto &info) { return info.param.name; });

}  // namespace

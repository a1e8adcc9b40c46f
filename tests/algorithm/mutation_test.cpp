// That the tests of gradients can fail: in the algorithms, without any schedule, one adjoint is broken at a time, its sign, a decay
// that is off by one, a state whose gradient is missing, and the comparison with the reference has to see it.
#include "../backward_call.h"
#include "targets.h"

#include <gtest/gtest-spi.h>

#include <functional>

namespace {
using namespace Halide;
using namespace Halide::Internal;
using namespace test;

/// In the definitions of all Funcs whose names begin with `in`, calls of what begins with `of` become something else.
struct Mutation {
    const char *name, *in, *of;
    std::function<Expr(const Call *)> broken;
    const char *seen;  // in what the comparison says
};
void PrintTo(const Mutation &m, std::ostream *stream) { *stream << m.name; }

Expr negated(const Call *call) { return -Expr(call); }
Expr missing(const Call *call) { return make_zero(call->type); }
/// With argument n one less, if it is not 0.
std::function<Expr(const Call *)> off_by_one(size_t n) {
    return [=](const Call *call) {
        std::vector<Expr> args = call->args;
        args[n] = max(args[n] - 1, 0);
        return Call::make(call->type, call->name, args, call->call_type, call->func, call->value_index, call->image, call->param);
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
        for (const Func &output : pipeline.outputs())
            for (auto &[name, function] : find_transitive_calls(output.function()))
                if (name.rfind(mutation->in, 0) == 0 && seen_by(function)) function.mutate(&mutate);
        EXPECT_GT(mutate.broken, 0) << "no Func that begins with " << mutation->in << " calls one that begins with " << mutation->of;
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

// ---- Chunkwise ---------------------------------------------------------------------------------------------------------

const Mutation of_chunkwise[] = {
    {"sign_of_scores_for_queries", "q_chunks", "scores", negated, "dq"},
};

TEST(Mutations, PrintFunctions) {
    const Target target = targets().back().target.with_feature(Target::JIT);
    const AbstractGeneratorPtr made = GeneratorRegistry::create("chunkwise_backward", GeneratorContext(target));
    made->set_generatorparam_value("forced_schedule", "none");
    Pipeline pipeline = made->build_pipeline();
    std::map<std::string, Function> all;
    for (const Func &output : pipeline.outputs())
        for (auto &[name, function] : find_transitive_calls(output.function())) all.emplace(name, function);
    for (auto &[name, f] : all) {
        std::cout << name << " calls:";
        for (auto &[n2, g] : find_direct_calls(f)) std::cout << " " << n2;
        std::cout << "\n";
    }
}

}  // namespace

// Conditions that the host computes for a kernel, as words. Halide 21's Vulkan back end puts a bool into the block of scalar
// arguments as OpTypeBool, which has no size in memory: drivers may read four bytes of it, where the host wrote one and packed
// the next bool behind it. Here a pass over the final IR of a pipeline hands such a kernel an int32 for every bool. It does not
// help to pass int32 to a pipeline: comparisons of scalars are hoisted out of kernels.
#include "../schedule.h"

#include <map>

namespace {
using namespace Halide;
using namespace Halide::Internal;

/// In one kernel: bools that are not defined inside become comparisons of words.
class WordsInKernel : public IRMutator {
    using IRMutator::visit;
    Scope<> inside;

    template<class T>
    auto let(const T *op) {
        Expr value = mutate(op->value);
        ScopedBinding<> bind(inside, op->name);
        return T::make(op->name, value, mutate(op->body));
    }
    Expr visit(const Let *op) override { return let(op); }
    Stmt visit(const LetStmt *op) override { return let(op); }
    Expr visit(const Variable *op) override {
        if (op->type != Bool() || inside.contains(op->name)) return op;
        conditions[op->name] = op;
        return Variable::make(Int(32), word(op->name)) != 0;
    }

public:
    std::map<std::string, Expr> conditions;

    static std::string word(const std::string &name) { return name + ".word"; }
};

class ConditionsAsWords : public IRMutator {
    using IRMutator::visit;

    Stmt visit(const For *op) override {
        if (op->for_type != ForType::GPUBlock) return IRMutator::visit(op);
        WordsInKernel kernel;
        Stmt stmt = kernel.mutate(op);
        for (const auto &[name, condition] : kernel.conditions)
            stmt = LetStmt::make(WordsInKernel::word(name), cast<int32_t>(condition), stmt);
        return stmt;
    }
};

bool matches(const Target &t) { return t.has_feature(Target::Vulkan); }

void add_passes(Pipeline pipeline, const Target &) { pipeline.add_custom_lowering_pass(new ConditionsAsWords); }

const bool added = holdfast::Lowering::add({30, matches, add_passes});
}  // namespace

// Assertions in kernels. A tile of constant size, `bound_extent`, at the end of an axis whose size is known at run time only, is
// asserted to hold what is needed of it: min(8 o + 8, D) - 8 <= 8 o. Halide 21 does not see that this is always so, because a
// let stands between, and then drops the assertion with a warning (OpenCL, Vulkan), or does not compile the kernel (Metal).
// Here those that follow from the lets around them are taken out; others would stay, and fail the build on Metal.
#include "../schedule.h"

#include <utility>
#include <vector>

namespace {
using namespace Halide;
using namespace Halide::Internal;

class ProvenAssertions : public IRMutator {
    using IRMutator::visit;
    std::vector<std::pair<std::string, Expr>> lets;  // around the statement, outermost first
    bool in_kernel = false;

    Stmt visit(const LetStmt *op) override {
        lets.emplace_back(op->name, op->value);
        Stmt body = mutate(op->body);
        lets.pop_back();
        return LetStmt::make(op->name, op->value, body);
    }
    Stmt visit(const AssertStmt *op) override {
        if (!in_kernel) return op;
        Expr condition = op->condition;
        for (auto let = lets.rbegin(); let != lets.rend(); ++let) condition = substitute(let->first, let->second, condition);
        if (!can_prove(condition)) return op;
        return Evaluate::make(0);
    }
    Stmt visit(const IfThenElse *op) override {  // one thread asserts for all
        Stmt stmt = IRMutator::visit(op);
        const IfThenElse *choice = stmt.as<IfThenElse>();
        return in_kernel && choice && is_no_op(choice->then_case) && !choice->else_case.defined() ? Evaluate::make(0) : stmt;
    }
    Stmt visit(const For *op) override {
        if (in_kernel || op->for_type != ForType::GPUBlock) return IRMutator::visit(op);
        in_kernel = true;
        Stmt kernel = IRMutator::visit(op);
        in_kernel = false;
        return kernel;
    }
};

bool matches(const Target &t) { return t.has_gpu_feature() && !t.has_feature(Target::CUDA); }

void add_passes(Pipeline pipeline, const Target &) { pipeline.add_custom_lowering_pass(new ProvenAssertions); }

const bool added = holdfast::Lowering::add({10, matches, add_passes});
}  // namespace

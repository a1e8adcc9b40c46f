// The stages of head_norm_gate_backward.h.
#include "head_norm_gate_backward.h"

#include "adjoint.h"

#include <map>
#include <string>
#include <vector>

using namespace Halide;

namespace holdfast {
namespace {

/// What autodiff derived, as Funcs with names, for schedules. Nothing here leaves the bounds of out.
class Adjoints : Unguard {
    const Derivative derived;
    std::map<std::string, Func> named;  // by the name that autodiff gave

    using Unguard::visit;
    Expr visit(const Internal::Call *op) override {
        if (op->call_type != Internal::Call::Halide) return Internal::IRMutator::visit(op);
        std::vector<Expr> args;
        for (const Expr &arg : op->args) args.push_back(mutate(arg));
        const auto func = named.find(op->name);
        if (func != named.end()) return func->second(args);
        _halide_user_assert(op->name.find("_d_def__") == std::string::npos) << op->name << " is derived and has no name here\n";
        return Internal::Call::make(op->type, op->name, args, op->call_type, op->func, op->value_index);
    }
    Expr read(const Expr &value) { return mutate(Internal::substitute_in_all_lets(value)); }

public:
    explicit Adjoints(const Derivative &derived) : derived(derived) {}

    /// The adjoint of a stage, or of one of its updates.
    Func operator()(const std::string &name, const Func &stage, int update = -1) {
        const Func adjoint = adjoint_of(derived, stage.name(), stage, update);
        Func func(name);
        named[adjoint.name()] = func;
        func(adjoint.args()) = read(adjoint.value());
        for (int n = 0; n < adjoint.num_update_definitions(); n++) func(adjoint.update_args(n)) = read(adjoint.update_value(n));
        return func;
    }
};

}  // namespace

HeadNormGateBackwardFuncs head_norm_gate_backward(const Func &x, const Func &gate, const Func &weight, const Func &dout,
                                                  const Expr &value_extent, const Expr &head_extent, const Expr &token_extent,
                                                  const Expr &batch_extent, const Expr &layer_norm, const Expr &gated,
                                                  const Expr &weighted, const Expr &eps) {
    Var e("e"), h("h"), t("t"), b("b");
    HeadNormGateBackwardFuncs f;
    f.forward = head_norm_gate(x, gate, weight, value_extent, layer_norm, gated, weighted, eps), f.dout = dout;
    const HeadNormGateFuncs &y = f.forward;

    Adjoints of(propagate_adjoints(
        y.out, dout, {{0, value_extent - 1}, {0, head_extent - 1}, {0, token_extent - 1}, {0, batch_extent - 1}}));
    of("dnormed_and_gated", y.out);
    f.dnormed = of("dnormed", y.normed), f.dswish = of("dswish", y.swish);
    f.dweight = of("dweight_or_one", y.weight_or_one, 0);
    f.dfactor = of("dfactor", y.factor), f.dsquares = of("dsquares", y.squares, 0);
    f.dcentered = of("dcentered", y.centered);
    f.dsum = of("dsum", y.sum, 0), f.ddistance = of("ddistance", y.distance);

    f.dx = Func("dx_of_row"), f.dgate = Func("dgate_of_row");
    f.dx(e, h, t, b) = select(layer_norm, f.ddistance(e, h, t, b), f.dcentered(e, h, t, b));
    f.dgate(e, h, t, b) = f.dswish(e, h, t, b) * swish_slope(gate(e, h, t, b), y.power(e, h, t, b));
    return f;
}

}  // namespace holdfast

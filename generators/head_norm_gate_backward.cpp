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
        if (func != named.end()) return func->second.outputs() == 1 ? Expr(func->second(args)) : func->second(args)[0];
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

    /// The same for one that is a sum, with `over` in place of its RDom.
    Func operator()(const std::string &name, const Func &stage, int update, const RDom &over) {
        const Func adjoint = adjoint_of(derived, stage.name(), stage, update);
        const std::vector<RVar> rvars = adjoint.rvars(0);
        std::map<std::string, Expr> replaced;
        for (size_t n = 0; n < rvars.size(); n++) replaced[rvars[n].name()] = over[(int)n];
        Func func(name);
        named[adjoint.name()] = func;
        func(adjoint.args()) = read(adjoint.value());
        func(adjoint.update_args()) = Internal::substitute(replaced, read(adjoint.update_value()));
        return func;
    }

    /// What is derived from now on reads `func` as the first element of `tuple`.
    void holds(const Func &tuple, const Func &func) {
        for (auto &known : named)
            if (known.second.name() == func.name()) known.second = tuple;
    }
};

}  // namespace

HeadNormGateBackwardFuncs head_norm_gate_backward(const Func &x, const Func &gate, const Func &weight, const Func &dout,
                                                  const Expr &value_extent, const Expr &head_extent, const Expr &token_extent,
                                                  const Expr &batch_extent, const Expr &layer_norm, const Expr &gated,
                                                  const Expr &weighted, const Expr &eps, const Expr &want_dweight) {
    Var e("e"), h("h"), t("t"), b("b");
    HeadNormGateBackwardFuncs f;
    f.forward = head_norm_gate(x, gate, weight, value_extent, layer_norm, gated, weighted, eps), f.dout = dout;
    const HeadNormGateFuncs &y = f.forward;

    Adjoints of(propagate_adjoints(
        y.out, dout, {{0, value_extent - 1}, {0, head_extent - 1}, {0, token_extent - 1}, {0, batch_extent - 1}}));
    of("dnormed_and_gated", y.out);
    f.dnormed = of("dnormed", y.normed), f.dswish = of("dswish", y.swish);
    f.through_gate = Func("through_gate");
    f.through_gate(e, h, t, b) =
        Tuple(f.dnormed(e, h, t, b), swish_slope(gate(e, h, t, b), y.power(e, h, t, b), y.sigmoid(e, h, t, b)));
    of.holds(f.through_gate, f.dnormed);
    f.over_tokens = RDom(0, token_extent, 0, batch_extent, "over_tokens");
    f.over_tokens.where(want_dweight);
    f.dweight = of("dweight_or_one", y.weight_or_one, 0, f.over_tokens);
    f.dfactor = of("dfactor", y.factor), f.dsquares = of("dsquares", y.squares, 0);
    f.dcentered = of("dcentered", y.centered);
    f.dsum = of("dsum", y.sum, 0), f.ddistance = of("ddistance", y.distance);

    f.dx = Func("dx_of_row"), f.dgate = Func("dgate_of_row");
    f.dx(e, h, t, b) = select(layer_norm, f.ddistance(e, h, t, b), f.dcentered(e, h, t, b));
    f.dgate(e, h, t, b) = f.dswish(e, h, t, b) * f.through_gate(e, h, t, b)[1];
    return f;
}

}  // namespace holdfast

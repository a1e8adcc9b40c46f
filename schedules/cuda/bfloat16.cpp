// bfloat16, as Halide 21's PTX back end does not take it.
#include "lowering.h"

namespace holdfast::cuda {
namespace {

// Kernels store bf16 in integers (generators/dtypes.h): fp32 from the bits of `x`, shifted up, is a bfloat16 widened.
class WidenBFloat16 : public KernelMutator {
    using KernelMutator::visit;
    Expr visit(const Reinterpret *op) override {
        Expr bits;
        if (in_kernel && op->type.element_of() == Float(32)) {
            const Call *shift = op->value.as<Call>();
            const Mul *times = op->value.as<Mul>();
            if (shift && (shift->is_intrinsic(Call::shift_left) || shift->is_intrinsic(Call::widening_shift_left)) &&
                is_const(shift->args[1], 16))
                bits = shift->args[0];
            if (times && is_const(times->b, 65536)) bits = times->a;
            if (const Cast *c = bits.as<Cast>()) bits = c->value;
            if (bits.defined() && bits.type().element_of() != UInt(16)) bits = Expr();
        }
        if (!bits.defined()) return IRMutator::visit(op);
        return cast(op->type, reinterpret(BFloat(16, op->type.lanes()), mutate(bits)));
    }
};

// Halide 21's PTX backend aborts on bfloat16 casts and constants.
class LowerBFloat16 : public KernelMutator {
    using KernelMutator::visit;
    static Expr each_lane(const Expr &e, const std::function<Expr(Expr)> &f) {
        if (e.type().is_scalar()) return f(e);
        std::vector<Expr> v;
        for (int i = 0; i < e.type().lanes(); i++) v.push_back(f(element(e, i)));
        return Shuffle::make_concat(v);
    }
    Expr visit(const Cast *op) override {
        if (!in_kernel || op->type.is_bfloat() == op->value.type().is_bfloat()) return IRMutator::visit(op);
        Expr v = mutate(op->value);
        int lanes = op->type.lanes();
        if (v.type().is_bfloat())
            return cast(op->type, reinterpret(Float(32, lanes), cast(UInt(32, lanes), reinterpret(UInt(16, lanes), v))
                                                                    << make_const(UInt(32, lanes), 16)));
        return each_lane(cast(Float(32, lanes), v), [](Expr x) {
            return reinterpret(BFloat(16), Call::make(UInt(16), "holdfast_cvt_bf16", {x}, Call::PureExtern));
        });
    }
    Expr visit(const FloatImm *op) override {
        if (!in_kernel || !op->type.is_bfloat()) return op;
        return reinterpret(BFloat(16), make_const(UInt(16), bfloat16_t(op->value).to_bits()));
    }
    template<typename T>
    Expr arithmetic(const T *op) {
        if (in_kernel && op->type.is_bfloat())
            fail("bfloat16", text("arithmetic in bfloat16; cast to float in the algorithm: ", Expr(op)));
        return IRMutator::visit(op);
    }
    Expr visit(const Add *op) override { return arithmetic(op); }
    Expr visit(const Sub *op) override { return arithmetic(op); }
    Expr visit(const Mul *op) override { return arithmetic(op); }
    Expr visit(const Div *op) override { return arithmetic(op); }
    Expr visit(const Min *op) override { return arithmetic(op); }
    Expr visit(const Max *op) override { return arithmetic(op); }
};

}  // namespace

Pass widen_bfloat16() { return std::make_unique<WidenBFloat16>(); }
Pass lower_bfloat16() { return std::make_unique<LowerBFloat16>(); }

}  // namespace holdfast::cuda

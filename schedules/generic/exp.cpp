// exp() on CPUs: good to 1.6 roundings; infinity where that is what fp32 has, zero below -86.99. Halide's own takes log 2 off in two
// parts, which LLVM makes one of, and so is off by 6e-7 at -16 and by 4e-6 at -80, where sums of gates are; and it calls floor(), which
// is no instruction of the oldest x86.
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace Halide::Internal;

/// 2^(k - 1) 2 exp(r), x = k log 2 + r: neither is infinite where the product is not.
class ExpOf {
public:
    explicit ExpOf(const Type &type) : type(type) {}

    Expr operator()(const Expr &given) {
        const Expr x = let(clamp(given, number(-87.3), number(88.8)));
        const Type bits = UInt(32, type.lanes()), whole = Int(32, type.lanes());
        // Compilers that reorder sums stop at operations on bits. Next to such a number the last digit is the one before the
        // point.
        const Expr shifted = let(reinterpret(bits, x * number(1.44269504) + number(3 << 22)));
        const Expr k = let(cast(type, reinterpret(whole, shifted) - make_const(whole, 0x4b400000)));
        // The first part of log 2 has few digits: multiplied by k, and taken off x, it is exact.
        const Expr near = reinterpret(bits, x - k * number(0.693145751953125)) & make_const(bits, ~1u);
        const Expr r = let(reinterpret(type, near) - k * number(1.42860677e-6));
        Expr power = number(2 * 0.00138144335);  // good to 5e-9, |r| < 0.347
        for (double coefficient : {0.0083687967, 0.0416683964, 0.166665196, 0.49999994, 1.0, 1.0})
            power = power * r + number(2 * coefficient);
        const Expr exponent = (shifted << make_const(bits, 23)) + make_const(bits, 126u << 23);
        // Not multiplied into the sum that `power` is: the larger term could be infinite, and the other one negative.
        Expr result = Call::make(type, Call::strict_mul, {power, reinterpret(type, exponent)}, Call::PureIntrinsic);
        for (; !values.empty(); values.pop_back()) result = Let::make(values.back().first, values.back().second, result);
        return result;
    }

private:
    const Type type;
    std::vector<std::pair<std::string, Expr>> values;

    Expr number(double x) const { return make_const(type, x); }
    /// Computed once.
    Expr let(const Expr &value) {
        values.emplace_back(unique_name("exp"), value);
        return Variable::make(value.type(), values.back().first);
    }
};

class Exp : public IRMutator {
    using IRMutator::visit;

    Expr visit(const Call *op) override {
        if (!op->is_extern() || op->name != "exp_f32") return IRMutator::visit(op);
        return ExpOf(op->type)(mutate(op->args[0]));
    }
};

bool matches(const Target &t) { return !t.has_gpu_feature(); }

void add_passes(Pipeline pipeline, const Target &) { pipeline.add_custom_lowering_pass(new Exp); }

const bool added = holdfast::Lowering::add({20, matches, add_passes});
}  // namespace

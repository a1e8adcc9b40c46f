// See float16.h. Denormal numbers of fp32 do not occur, which a GPU may take for zero.
#include "float16.h"

#include "../schedule.h"

namespace holdfast::gpu {
namespace {
using namespace Halide;
using namespace Halide::Internal;

Expr constant(const Type &type, uint32_t bits) { return make_const(UInt(32, type.lanes()), bits); }

/// fp32 from the bits of fp16: the exponent is counted from 127 in place of 15.
Expr from_bits(const Expr &stored) {
    const Type type = Float(32, stored.type().lanes());
    const auto c = [&](uint32_t bits) { return constant(type, bits); };
    Expr bits = cast(UInt(32, type.lanes()), stored), magnitude = (bits & c(0x7fff)) << c(13);
    Expr denormal = reinterpret(type, magnitude + c(113 << 23)) - reinterpret(type, c(113 << 23));
    Expr number = select(magnitude < c(0x400 << 13), reinterpret(UInt(32, type.lanes()), denormal),
                         magnitude + select(magnitude < c(0x7c00 << 13), c(112 << 23), c(224u << 23)));
    return reinterpret(type, number | (bits & c(0x8000)) << c(16));
}

/// The bits of fp16 from fp32, to the nearest, ties to even.
Expr to_bits(const Expr &number) {
    const Type type = Float(32, number.type().lanes());
    const auto c = [&](uint32_t bits) { return constant(type, bits); };
    Expr bits = reinterpret(UInt(32, type.lanes()), number), magnitude = bits & c(0x7fffffff);
    // Added to 1/2, the last digit is that of the smallest fp16, 2^-24.
    Expr denormal = reinterpret(UInt(32, type.lanes()), reinterpret(type, magnitude) + make_const(type, 0.5)) - c(126 << 23);
    Expr rounded = (magnitude - c(112 << 23) + c(0xfff) + ((magnitude >> c(13)) & c(1))) >> c(13);
    Expr special = select(magnitude > c(0x7f800000), c(0x7e00), c(0x7c00));
    Expr result = select(magnitude < c(113 << 23), denormal, select(magnitude < c(143u << 23), rounded, special));
    return cast(UInt(16, type.lanes()), result | (bits & c(0x80000000)) >> c(16));
}

bool is_half(const Type &t) { return t.is_float() && t.bits() == 16; }
Type integer(const Type &t) { return is_half(t) ? UInt(16, t.lanes()) : t; }

class Float16AsIntegers : public IRMutator {
    using IRMutator::visit;

    Expr visit(const Cast *op) override {
        if (is_half(op->type) == is_half(op->value.type())) return IRMutator::visit(op);
        if (is_half(op->type)) return to_bits(cast(Float(32, op->type.lanes()), mutate(op->value)));
        return cast(op->type, from_bits(mutate(op->value)));
    }
    Expr visit(const Reinterpret *op) override {
        if (!is_half(op->type) && !is_half(op->value.type())) return IRMutator::visit(op);
        return reinterpret(integer(op->type), mutate(op->value));
    }
    Expr visit(const FloatImm *op) override {
        return is_half(op->type) ? make_const(UInt(16), float16_t(op->value).to_bits()) : Expr(op);
    }
    Expr visit(const Load *op) override {
        if (!is_half(op->type)) return IRMutator::visit(op);
        return Load::make(integer(op->type), op->name, mutate(op->index), Buffer<>(), Parameter(), mutate(op->predicate),
                          op->alignment);
    }
    Stmt visit(const Store *op) override {
        if (!is_half(op->value.type())) return IRMutator::visit(op);
        return Store::make(op->name, mutate(op->value), mutate(op->index), Parameter(), mutate(op->predicate), op->alignment);
    }
    Stmt visit(const Allocate *op) override {
        if (!is_half(op->type)) return IRMutator::visit(op);
        std::vector<Expr> extents;
        for (const Expr &extent : op->extents) extents.push_back(mutate(extent));
        return Allocate::make(op->name, integer(op->type), op->memory_type, extents, mutate(op->condition), mutate(op->body),
                              op->new_expr, op->free_function, op->padding);
    }
    Expr visit(const Variable *op) override {
        return is_half(op->type) ? Variable::make(integer(op->type), op->name) : Expr(op);
    }
    Expr visit(const Call *op) override {
        if (!is_half(op->type)) return IRMutator::visit(op);
        std::vector<Expr> args;
        for (const Expr &arg : op->args) args.push_back(mutate(arg));
        return Call::make(integer(op->type), op->name, args, op->call_type);
    }
    template<class T>
    Expr arithmetic(const T *op) {
        _halide_user_assert(!is_half(op->type))
            << "arithmetic in float16: " << Expr(op) << "; cast to float in the algorithm\n";
        return IRMutator::visit(op);
    }
    template<class T>
    Expr comparison(const T *op) {
        _halide_user_assert(!is_half(op->a.type()))
            << "comparison in float16: " << Expr(op) << "; cast to float in the algorithm\n";
        return IRMutator::visit(op);
    }
    Expr visit(const Add *op) override { return arithmetic(op); }
    Expr visit(const Sub *op) override { return arithmetic(op); }
    Expr visit(const Mul *op) override { return arithmetic(op); }
    Expr visit(const Div *op) override { return arithmetic(op); }
    Expr visit(const Mod *op) override { return arithmetic(op); }
    Expr visit(const Min *op) override { return arithmetic(op); }
    Expr visit(const Max *op) override { return arithmetic(op); }
    Expr visit(const EQ *op) override { return comparison(op); }
    Expr visit(const NE *op) override { return comparison(op); }
    Expr visit(const LT *op) override { return comparison(op); }
    Expr visit(const LE *op) override { return comparison(op); }
    Expr visit(const GT *op) override { return comparison(op); }
    Expr visit(const GE *op) override { return comparison(op); }
};

bool matches(const Target &t) {
    return (t.has_feature(Target::OpenCL) && !t.has_feature(Target::CLHalf)) ||
           (t.has_feature(Target::Vulkan) && !t.has_feature(Target::VulkanFloat16));
}

void add_passes(Pipeline pipeline, const Target &) { pipeline.add_custom_lowering_pass(float16_as_integers().release()); }

const bool added = Lowering::add({40, matches, add_passes});
}  // namespace

std::unique_ptr<IRMutator> float16_as_integers() { return std::make_unique<Float16AsIntegers>(); }

}  // namespace holdfast::gpu

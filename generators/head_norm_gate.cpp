// The stages of head_norm_gate.h.
#include "head_norm_gate.h"

using namespace Halide;

namespace holdfast {
HeadNormGateFuncs head_norm_gate(const Func &x, const Func &gate, const Func &weight, const Expr &value_extent,
                                 const Expr &layer_norm, const Expr &gated, const Expr &weighted, const Expr &eps) {
    Var e("e"), h("h"), t("t"), b("b");
    HeadNormGateFuncs f;
    f.x = x, f.gate = gate, f.weight = weight, f.value_extent = value_extent, f.layer_norm = layer_norm, f.gated = gated;
    f.over_value = RDom(0, value_extent, "over_value");
    const Expr V = cast<float>(value_extent);

    f.first = Func("first");
    f.first(h, t, b) = x(0, h, t, b);
    // Through an integer, because compilers would else make one subtraction of this and that of the mean, and round first + mean.
    f.distance = Func("distance");
    f.distance(e, h, t, b) = reinterpret<float>(reinterpret<int32_t>(x(e, h, t, b) - f.first(h, t, b)) & ~1);
    f.sum = Func("sum");
    f.sum(h, t, b) += f.distance(f.over_value, h, t, b);
    f.centered = Func("centered");
    f.centered(e, h, t, b) = select(layer_norm, f.distance(e, h, t, b) - f.sum(h, t, b) / V, x(e, h, t, b));
    f.squares = Func("squares");
    f.squares(h, t, b) += f.centered(f.over_value, h, t, b) * f.centered(f.over_value, h, t, b);
    f.factor = Func("factor");
    f.factor(h, t, b) = 1.0f / sqrt(f.squares(h, t, b) / V + eps);
    f.over_weight = RDom(0, 1, "over_weight");
    f.over_weight.where(weighted);
    f.weight_or_one = Func("weight_or_one");
    f.weight_or_one(e, h) = 1.0f;
    f.weight_or_one(e, h) = weight(e, h + f.over_weight);

    f.normed = Func("normed");
    f.normed(e, h, t, b) = f.centered(e, h, t, b) * f.factor(h, t, b) * f.weight_or_one(e, h);
    f.power = Func("power");
    f.sigmoid = Func("sigmoid");
    f.swish = Func("swish");
    Expr g = gate(e, h, t, b), normed = f.normed(e, h, t, b);
    f.power(e, h, t, b) = exp(-g);
    f.sigmoid(e, h, t, b) = 1.0f / (1.0f + f.power(e, h, t, b));
    f.swish(e, h, t, b) = g * f.sigmoid(e, h, t, b);
    f.out = Func("normed_and_gated");
    f.out(e, h, t, b) = select(gated, normed * f.swish(e, h, t, b), normed);
    return f;
}

Expr swish_slope(const Expr &gate, const Expr &power, const Expr &sigmoid) {
    return sigmoid * (1.0f + gate * select(gate < 0, 1.0f - sigmoid, power * sigmoid));  // 1 - sigmoid, to its last bit
}

}  // namespace holdfast

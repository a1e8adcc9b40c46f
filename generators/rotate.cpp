// The stages of rotate.h.
#include "rotate.h"

using namespace Halide;

namespace holdfast {
namespace {

Expr u32(uint32_t x) { return Expr(x); }

/// The upper 32 of the 64 bits of a product.
Expr upper(const Expr &a, const Expr &b) {
    Expr a0 = a & u32(0xffff), a1 = a >> 16, b0 = b & u32(0xffff), b1 = b >> 16;
    Expr middle = a1 * b0 + ((a0 * b0) >> 16), rest = a0 * b1 + (middle & u32(0xffff));
    return a1 * b1 + (middle >> 16) + (rest >> 16);
}

/// The same, less 2 at most.
Expr about_upper(const Expr &a, const Expr &b) {
    Expr a0 = a & u32(0xffff), a1 = a >> 16, b0 = b & u32(0xffff), b1 = b >> 16;
    return a1 * b1 + ((a1 * b0) >> 16) + ((a0 * b1) >> 16);
}

/// |theta| / 2 pi modulo 1. theta is a whole number m < 2^24 times a power of two. That power shifts the bits of 1 / 2 pi: those
/// above the point give whole turns, and 128 of those below are kept, of which m leaves 96 right.
Tuple turns(const Expr &theta) {
    Expr bits = reinterpret<uint32_t>(theta), exponent = (bits >> 23) & u32(0xff);
    Expr m = select(exponent > 0, (bits & u32(0x7fffff)) | u32(0x800000), bits & u32(0x7fffff));
    Expr first = max(exponent, u32(1)) + u32(10), word = cast<int32_t>(first >> 5), shift = first & u32(31);
    Expr inverse[5], f[4];  // bits of 1 / 2 pi after 160 zeros: the least power of two is 2^-149
    for (int n = 0; n < 5; n++)
        inverse[n] = mux(word + n, {u32(0), u32(0), u32(0), u32(0), u32(0), u32(0x28be60db), u32(0x9391054a), u32(0x7f09d5f4),
                                    u32(0x7d4d3770), u32(0x36d8a566), u32(0x4f10e410), u32(0x7f9458ea), u32(0xf7aef158)});
    for (int n = 0; n < 4; n++) f[n] = (inverse[n] << shift) | ((inverse[n + 1] >> (u32(31) - shift)) >> 1);
    Expr c = m * f[2] + upper(m, f[3]), carry = cast<uint32_t>(c < m * f[2]);
    Expr b = m * f[1] + upper(m, f[2]), carry_2 = cast<uint32_t>(b < m * f[1]);
    Expr b_c = b + carry, carry_3 = cast<uint32_t>(b_c < b);
    return Tuple(m * f[0] + upper(m, f[1]) + carry_2 + carry_3, b_c, c);
}

/// {cos, sin} of a fraction of a turn. The nearest quarter is taken off: what is left is at most pi / 4 either way, where the
/// series are good to 2e-9.
Tuple cos_and_sin(const Expr &phase) {
    Expr quarter = (phase + u32(1 << 29)) >> 30;
    Expr a = cast<float>(cast<int32_t>(phase - (quarter << 30))) * (float)(6.283185307179586 * 0x1p-32), z = a * a;
    Expr s = 1.0f / 362880, c = -1.0f / 3628800;  // a - a^3 / 3! + ... + a^9 / 9!, 1 - a^2 / 2! + ... - a^10 / 10!
    for (float coefficient : {-1.0f / 5040, 1.0f / 120, -1.0f / 6, 1.0f}) s = s * z + coefficient;
    for (float coefficient : {1.0f / 40320, -1.0f / 720, 1.0f / 24, -1.0f / 2, 1.0f}) c = c * z + coefficient;
    s = s * a;
    Expr odd = (quarter & u32(1)) != 0;
    Expr cos = select(odd, s, c), sin = select(odd, c, s);
    return Tuple(select(quarter == 1 || quarter == 2, -cos, cos), select(quarter >= 2, -sin, sin));
}

}  // namespace

RotateFuncs rotate(const Func &x, const Func &theta, const Func &position, const Expr &backward) {
    Var j("j"), p("p"), h("h"), t("t"), b("b");
    RotateFuncs f;
    f.x = x, f.theta = theta, f.position = position;

    f.turn = Func("turn");
    f.turn(j) = turns(theta(j));
    f.phase = Func("phase");
    Expr lower_half = position(t, b)[0], upper_half = position(t, b)[1];
    Expr first = f.turn(j)[0], second = f.turn(j)[1], third = f.turn(j)[2];
    Expr beyond = about_upper(upper_half, third) - select(upper_half >> 31 != 0, third, u32(0));  // the upper half has a sign
    f.phase(j, t, b) = lower_half * first + about_upper(lower_half, second) + upper_half * second + beyond;

    f.rotation = Func("rotation");
    Tuple rotation = cos_and_sin(f.phase(j, t, b));
    f.rotation(j, t, b) = Tuple(rotation[0], select((theta(j) < 0) != backward, -rotation[1], rotation[1]));
    f.out = Func("rotated");
    Expr cos = f.rotation(j, t, b)[0], sin = f.rotation(j, t, b)[1];
    Expr x_0 = x(j, 0, h, t, b), x_1 = x(j, 1, h, t, b);
    f.out(j, p, h, t, b) = select(p == 0, x_0 * cos - x_1 * sin, x_1 * cos + x_0 * sin);
    return f;
}

}  // namespace holdfast

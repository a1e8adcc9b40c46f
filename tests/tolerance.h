// How far a result may lie from the double reference. Every tolerance of the tests is made here, from the number of terms.
#pragma once
#include "dtype.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace tolerance {

/// Relative error of one rounding to fp32, at most.
constexpr double rounding = 0x1p-24;

/// Largest error of any element of out or state, as a share of its spread (reference/retention.h).
///
/// Products and sums: an element passes through three sums one after the other, over K (scores), over `chunk` tokens, and over
/// K again; before, the state has been multiplied and added to `decays` times. Together n = 2 K + chunk + 2 decays terms.
/// Each partial sum is rounded, by 0.4 roundings of what it is in the root mean square, and with terms of random sign it grows
/// as the square root of their number: together 0.4 sqrt(n / 2), about sqrt(n) / 4 roundings of the spread. Of millions of
/// elements some have partial sums of three or four times the usual size, and errors of five standard deviations: 4 sqrt(n).
/// Gates: exp() is good to two roundings, and so is what multiplies it; an element meets four of them. That of a chunk's decay
/// is not among those that add up, though the state meets it again and again: it is kept to more than fp32.
inline double of_spread(int64_t K, int64_t chunk, int64_t decays) {
    return rounding * (4 * std::sqrt(2.0 * K + chunk + 2.0 * decays) + 16);
}

/// The same for power retention (reference/power.h): sums over D features are made in blocks of about as many as there are of
/// them, and each feature and power is a product of a few roundings.
inline double of_power_spread(int64_t K, int64_t D, int64_t chunk, int64_t decays) {
    return of_spread(K + (int64_t)std::sqrt(D), chunk, decays);
}

/// The same for gradients (reference/backward.h). An element passes through a sum over features of values or keys, one over `rows`
/// of a chunk, all queries of a group, and one more over features: with those of states as many terms as an output, and for
/// decays products of such elements are summed over features and rows once more.
inline double of_gradient_spread(int64_t K, int64_t V, int64_t rows, int64_t decays) {
    return of_spread(K + V, 2 * rows, decays);
}

/// The same for power retention, whose state's gradient is a sum over features too (reference/power_backward.h).
inline double of_power_gradient_spread(int64_t K, int64_t V, int64_t D, int64_t rows, int64_t decays) {
    return of_power_spread(K + V, D, 2 * rows, 2 * decays);
}

/// The same of variants that round operands (holdfast_variant): every term is a product of which one factor is the nearest sum of
/// `parts` numbers of the type. Of many terms that takes 0.4 of their rounding in the root mean square, and five standard
/// deviations. But right after a reset an output has one term, one whole rounding of q k times v, and q k is a sum of K itself: of
/// millions some are four times its spread.
inline double of_rounded_operands(const test::Dtype &dtype, int parts) { return 4 * std::exp2(-parts * dtype.digits); }

/// The same of gradients: in each term of dq, dk and dv one factor is rounded, weights, their gradients, a state or its gradient. Gates
/// sum products of those, and have no other rounding.
inline double of_rounded_gradients(const test::Dtype &dtype) { return of_rounded_operands(dtype, 1); }

/// And beside any share: numbers of the type are no closer than this to one another, however small they are. Of `terms` terms
/// whose other factor is 1 at most, five standard deviations of what is spread evenly over that distance.
inline double between_operands(const test::Dtype &dtype, int64_t terms) {
    return 5 / std::sqrt(12.0) * std::exp2(dtype.least - dtype.digits + 1) * std::sqrt((double)terms);
}

/// What a call of degree 1 holds: the shares of out and of states, and what is beside any share. Where operands are rounded,
/// states have keys of two parts; out is a sum over states and one more over weights, of one part each.
struct OfCall {
    double out, state, absolute;
};
inline OfCall of_call(int64_t K, int64_t chunk, int64_t decays, const test::Dtype &dtype, bool rounded_operands) {
    const double share = of_spread(K, chunk, decays);
    if (!rounded_operands) return {share, share, 0};
    const double of_state = share + of_rounded_operands(dtype, 2);
    return {share + of_state + of_rounded_operands(dtype, 1), of_state, between_operands(dtype, 2 * K + chunk + decays)};
}

/// Largest error of an element that is rotated, as a share of the length of its pair. cos and sin are within 2.8 roundings
/// (generators/rotate.h), which moves the pair by no more in any direction; two products and their sum are rounded, by 1.2
/// roundings of its length together.
constexpr double of_rotation = 4 * rounding;

/// Largest error of a row of V elements that is normed and gated, as a share of its spread (reference/head_norm_gate.h). Sums of
/// V terms as above, 0.4 sqrt(V / 2) roundings in the root mean square and five times that at worst, of the mean and, halved by
/// the root, of the variance: 2.2 sqrt(V). Root, quotients and products are 10 roundings, exp() is good to 4, and the gate's
/// divisor to two more.
inline double of_norm(int64_t V) { return rounding * (2.2 * std::sqrt((double)V) + 16); }

/// The same of the gradient of such a row. Its largest part passes through the factor 1 / deviation three times, 1.1 sqrt(V) each, and
/// through one more sum over the row, 2.2 sqrt(V); all in all 40 roundings of single operations.
inline double of_norm_gradient(int64_t V) { return rounding * (5.5 * std::sqrt((double)V) + 40); }

/// Of what `rows` rows add to the gradient of a weight, as a share of it and of the root of the sum of the squares of their spreads:
/// a sum of so many terms more, of fp32 over `at_once` of them.
inline double of_norm_weight_gradient(int64_t V, int64_t at_once) {
    return of_norm_gradient(V) + rounding * 2.2 * std::sqrt((double)at_once);
}

/// Below this the spread does not matter: fp32 has no numbers to be accurate with.
constexpr double negligible = std::numeric_limits<float>::min();

/// What the project holds, in the root mean square relative to that of the values, over T = 4096, K = V = 64, 8 heads of RetNet
/// decay: of the state and of an out in fp32 against the reference, of an out of 16 bits against the reference for inputs
/// rounded to its type, and of the out of one call against that of a call for every token.
constexpr double relative_rms = 2e-6, relative_rms_f16 = 4e-4, relative_rms_bf16 = 2.5e-3;
inline double relative_rms_of_out(const test::Dtype &dtype) {
    return dtype == test::f32 ? relative_rms : dtype == test::f16 ? relative_rms_f16 : relative_rms_bf16;
}
/// Of the out of one token where operands are rounded: it has few weights, whose roundings all its values share.
inline double relative_rms_of_one_token(const test::Dtype &dtype) {
    return relative_rms_of_out(dtype) + std::exp2(-dtype.digits);
}
/// Of states where operands of products are rounded to the type: keys enter them in two parts, which leave out 2^-17 of a key in
/// bf16 at most, and 2^-23 in fp16.
inline double relative_rms_of_state(const test::Dtype &dtype) { return dtype == test::bf16 ? 4e-6 : relative_rms; }
constexpr double relative_rms_between_forms = 1e-6;
/// Of every gradient in fp32.
constexpr double relative_rms_of_gradient = 1e-5;
/// Of gradients that are stored in their type: what an out is allowed.
inline double relative_rms_of_gradient_of_rows(const test::Dtype &dtype) {
    return dtype == test::f32 ? relative_rms_of_gradient : relative_rms_of_out(dtype);
}
/// Of those of decays where operands of products are rounded: sums of what gradients of rows are made of, with as much for each
/// rounding. But a chunk's have most of their terms in common: of few tokens they are few independent sums, which may all be
/// small (in bf16, K = V = 64, 64 tokens: 1.9e-3, and 6.8e-3 in one of 40 sequences; 1024: 9e-4).
inline double relative_rms_of_rounded_gates(const test::Dtype &dtype, int64_t tokens) {
    return relative_rms_of_out(dtype) * std::sqrt(std::max(512.0 / (double)tokens, 1.0));
}
/// Of normalised out of degree 2, fp32, for gates of every strength.
constexpr double relative_rms_of_power = 5e-7;

}  // namespace tolerance

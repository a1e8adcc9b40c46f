// What holdfast_head_norm_gate_backward promises, for every target of the CPU that runs here and every type.
#include "../allocations.h"
#include "../tokens.h"

#include <array>

namespace {
using namespace test;

class HeadNormGateBackwardTest : public TokensTest {};

TEST_P(HeadNormGateBackwardTest, MatchesReference) {
    enum Weight { none, of_all, of_each };
    for (const Index &shape : {Index{2, 2, 2, 37}, {3, 1, 2, 16}})
        for (Layout layout : layouts)
            for (Weight kind : {none, of_all, of_each})
                for (bool gated : {false, true})
                    for (holdfast_norm norm : {HOLDFAST_NORM_RMS, HOLDFAST_NORM_LAYER}) {
                        const int64_t H = shape[2], V = shape[3];
                        SCOPED_TRACE(text(shape) + name(layout) + ", weight " + std::to_string(kind) +
                                     (gated ? ", gated" : "") + ", norm " + std::to_string(norm));
                        Array x = rows(shape, layout), gate = gates(shape, layout), dout = rows(shape, layout);
                        Array dx = Array(shape, layout).forget(), dgate = dx, weight = Array({H, V}, Layout::padded);
                        weight.fill(random, -2, 2);
                        Array dweight = kind == of_all ? Array({V}).forget() : Array({H, V}, Layout::padded).forget();
                        HeadNormGateBackward call{x, {}, {}, dout, dx, {}, {}, norm, 1e-3f};
                        if (kind == none) weight.fill(1);
                        if (kind == of_all) {
                            each(weight.shape, [&](const Index &i) { weight(i) = weight({0, i[1]}); });
                            call.weight = Tensor(weight.data(), {V}, {1});
                        }
                        if (kind == of_each) call.weight = weight;
                        if (kind != none) call.dweight = dweight;
                        if (gated) call.gate = gate, call.dgate = dgate;
                        const Array inputs[] = {x, gate, weight, dout};
                        run(call);
                        expect_gradients(x, gate, weight, dout, &dx, gated ? &dgate : nullptr,
                                         kind == none ? nullptr : &dweight, norm == HOLDFAST_NORM_LAYER, gated, 1e-3f, dtype);
                        EXPECT_TRUE(dx.gaps_intact() && dgate.gaps_intact() && dweight.gaps_intact());
                        EXPECT_TRUE(x.same_memory(inputs[0]) && gate.same_memory(inputs[1]) && weight.same_memory(inputs[2]) &&
                                    dout.same_memory(inputs[3]));

                        // Each alone: the same.
                        for (int one = 0; one < 3; one++) {
                            HeadNormGateBackward alone = call;
                            Array other_dx = Array(shape, layout).forget(), other_dgate = other_dx, other_dweight = dweight;
                            alone.dx = alone.dgate = alone.dweight = {};
                            if (one == 0) alone.dx = other_dx;
                            if (one == 1 && gated) alone.dgate = other_dgate;
                            if (one == 2 && kind != none) alone.dweight = other_dweight.forget();
                            run(alone);
                            EXPECT_TRUE(one != 0 || same_bits(dx, other_dx));
                            EXPECT_TRUE(one != 1 || !gated || same_bits(dgate, other_dgate));
                            EXPECT_TRUE(one != 2 || kind == none || same_bits(dweight, other_dweight));
                        }
                    }
}

// Where exp(-gate) is nearly infinite, and where it is. What has a sigmoid below the smallest normal number may be zero.
TEST_P(HeadNormGateBackwardTest, GatesWhereFp32Ends) {
    Array x = rows({1, 4, 2, 80}), gate = x, dout = rows(x.shape), weight = Array({2, 80}).fill(1.0f);
    Array out = Array(x.shape).forget(), dx = out, dgate = out;
    each(gate.shape, [&](const Index &i) { gate(i) = i[3] % 3 == 0 ? (float)random(-89, -87) : (float)random(-2, 2); });
    round_to(dtype, gate);
    run(HeadNormGate{x, gate, {}, out, HOLDFAST_NORM_RMS});
    run(HeadNormGateBackward{x, gate, {}, dout, dx, dgate, {}, HOLDFAST_NORM_RMS});
    for (const Array *a : {&out, &dx, &dgate})
        each(a->shape, [&](const Index &i) {
            EXPECT_TRUE(std::isfinite((*a)(i))) << gate(i);
            if (a != &dx && gate(i) < -80) EXPECT_LE(std::abs((*a)(i)), 1000 * std::numeric_limits<float>::min()) << gate(i);
        });
    expect_gradients(x, gate, weight, dout, &dx, nullptr, nullptr, false, true, 1e-6f, dtype);
}

// Far from 0 nothing is lost.
TEST_P(HeadNormGateBackwardTest, LayerNormOfRowsFarFromZero) {
    for (double offset : {100.0, 1000.0, 30000.0}) {
        if (!(dtype == f32) && offset > 1000) continue;
        SCOPED_TRACE(offset);
        Array x({1, 2, 3, 80}), dout = rows(x.shape), dx = Array(x.shape).forget(), weight = Array({3, 80}).fill(1.0f);
        Array dweight = Array({3, 80}).forget();
        each(x.shape, [&](const Index &i) { x(i) = (float)(offset + random(-3, 3)); });
        round_to(dtype, x);
        run(HeadNormGateBackward{x, {}, weight, dout, dx, {}, dweight, HOLDFAST_NORM_LAYER});
        expect_gradients(x, x, weight, dout, &dx, nullptr, &dweight, true, false, 1e-6f, dtype);
    }
}

TEST_P(HeadNormGateBackwardTest, OfLayerNormSumsToNothing) {
    Array x = rows({1, 3, 2, 64}), dout = rows(x.shape), dx = Array(x.shape).forget();
    run(HeadNormGateBackward{x, {}, {}, dout, dx, {}, {}, HOLDFAST_NORM_LAYER});
    each({1, 3, 2}, [&](const Index &i) {
        double sum = 0, along = 0, size = 0;  // x + c and c x have the same out, but for eps
        for (int64_t e = 0; e < 64; e++) {
            const double d = dx({i[0], i[1], i[2], e});
            sum += d, along += d * x({i[0], i[1], i[2], e}), size += std::abs(d);
        }
        EXPECT_NEAR(sum, 0, (tolerance::of_norm_gradient(64) + dtype.rounding_of(1)) * size);
        EXPECT_NEAR(along, 0, (tolerance::of_norm_gradient(64) + dtype.rounding_of(1) + 1e-5) * size);
    });
}

// Tokens and heads alone; more tokens than one call of the kernel takes.
TEST_P(HeadNormGateBackwardTest, SameBitsForAnyTokensAtOnce) {
    const int64_t T = 1100, H = 2, V = 19;
    for (const Index &shape : {Index{1, T, H, V}, {T, 1, H, V}}) {
        SCOPED_TRACE(text(shape));
        const int time = shape[1] == 1 ? 0 : 1;
        Array x = rows(shape), gate = gates(shape), dout = rows(shape), weight = Array({H, V}).fill(random);
        Array whole[] = {Array(shape).forget(), Array(shape).forget()}, parts[] = {whole[0], whole[1]};
        run(HeadNormGateBackward{x, gate, weight, dout, whole[0], whole[1], {}});
        for (int64_t h = 0; h < H; h++)
            for (const auto &[from, to] : {std::array<int64_t, 2>{0, 1}, {1, 700}, {700, T}}) {
                auto part = [&, from = from, to = to](Array &a) { return Tensor(a).part(time, from, to).part(2, h, h + 1); };
                run(HeadNormGateBackward{
                    part(x), part(gate), Tensor(weight).part(0, h, h + 1), part(dout), part(parts[0]), part(parts[1]), {}});
            }
        EXPECT_TRUE(same_bits(whole[0], parts[0]) && same_bits(whole[1], parts[1]));
    }
}

TEST_P(HeadNormGateBackwardTest, NotANumberStaysInItsRow) {
    for (holdfast_norm norm : {HOLDFAST_NORM_RMS, HOLDFAST_NORM_LAYER}) {
        Array x = rows({1, 2, 2, 33}), gate = Array(x.shape).fill(1.0f), dout = rows(x.shape);
        Array clean = Array(x.shape).forget(), clean_gate = clean, dx = clean, dgate = clean;
        run(HeadNormGateBackward{x, gate, {}, dout, clean, clean_gate, {}, norm});
        x({0, 1, 0, 3}) = std::numeric_limits<float>::quiet_NaN(), dout({0, 0, 1, 4}) = std::numeric_limits<float>::infinity();
        gate({0, 0, 0, 5}) = std::numeric_limits<float>::quiet_NaN();
        run(HeadNormGateBackward{x, gate, {}, dout, dx, dgate, {}, norm});
        each(x.shape, [&](const Index &i) {
            if (i[1] == 1 && i[2] == 1) {
                EXPECT_EQ(dx(i), clean(i)) << text(i);
                EXPECT_EQ(dgate(i), clean_gate(i)) << text(i);
            } else {
                EXPECT_FALSE(std::isfinite(dx(i))) << text(i);
            }
        });
        EXPECT_TRUE(std::isnan(dgate({0, 0, 0, 5})));
        EXPECT_EQ(dgate({0, 0, 0, 6}), clean_gate({0, 0, 0, 6}));
    }
}

TEST_P(HeadNormGateBackwardTest, NothingToDo) {
    for (const Index &shape : {Index{0, 3, 2, 10}, {2, 0, 2, 10}, {2, 3, 0, 10}, {0, 1, 2, 10}}) {
        Array x = rows(shape), gate = gates(shape), dx(shape), dgate(shape), weight = Array({10}).fill(random);
        Array dweight = Array({10}).forget();
        run(HeadNormGateBackward{x, gate, weight, x, dx, dgate, dweight});
        for (float value : dweight.values()) EXPECT_EQ(value, 0);
        Array weights = Array({shape[2], 10}).fill(random), dweights = Array(weights.shape).forget();
        run(HeadNormGateBackward{x, gate, weights, x, dx, dgate, dweights});
        for (float value : dweights.values()) EXPECT_EQ(value, 0);
    }
    Array x = rows({2, 3, 2, 10});
    run(HeadNormGateBackward{x, {}, {}, x, {}, {}, {}});  // nothing is wanted
}

TEST_P(HeadNormGateBackwardTest, ForcedTargetRunsAndAllocatesOnce) {
    Array x = rows({1, 20, 2, 10}), dx = x, dgate = x, weight = Array({2, 10}).fill(random), dweight = weight;
    RowsArgument rows(dtype, x), dxs(dtype, dx), dgates(dtype, dgate);
    Tensor weights(weight), dweights(dweight);
    DLTensor w = weights.dl(), dw = dweights.dl();
    const holdfast_head_norm_gate_backward_args args = {sizeof args, rows.dl(), rows.dl(),           &w,   rows.dl(), dxs.dl(),
                                                        dgates.dl(), &dw,       HOLDFAST_NORM_LAYER, 1e-6f};
    ASSERT_EQ(holdfast_head_norm_gate_backward(*context, &args), HOLDFAST_OK) << context->error();
    EXPECT_EQ(context->messages.back().find("head_norm_gate_backward: head_norm_gate_backward_" + std::string(dtype.name) +
                                            "_" + GetParam().target + " (target forced"),
              0u)
        << context->messages.back();
    ASSERT_EQ(holdfast_context_set_verbose(*context, nullptr, nullptr), HOLDFAST_OK);
    const int64_t before = allocations;
    for (int n = 0; n < 5; n++) holdfast_head_norm_gate_backward(*context, &args);
    EXPECT_EQ(allocations - before, 0);
    EXPECT_GT(before, 0) << "allocations are not counted";
}

class HeadNormGateBackwardF32Test : public HeadNormGateBackwardTest {};

// A weight's gradient loses nothing over many tokens: all of one sign, so that a sum in fp32 would.
TEST_P(HeadNormGateBackwardF32Test, SumsOfManyTokens) {
    const int64_t T = 300'000, V = 4;
    for (const Index &shape : {Index{1, T, 1, V}, {T, 1, 1, V}}) {
        Array x = rows(shape), dout(shape), weight = Array({V}).fill(1.0f), dweight = Array({V}).forget();
        each(shape, [&](const Index &i) { dout(i) = (float)dtype.round(x(i) * random(0.5, 1.5)); });
        run(HeadNormGateBackward{x, {}, weight, dout, {}, {}, dweight});
        NormedGradient want = normed_gradient(x, x, Array({1, V}).fill(1.0f), dout, false, false, 1e-6f);
        expect_close("dweight", dweight, want.dweight, want.dweight_spread, tolerance::of_norm_weight_gradient(V, 1024));
        for (int64_t e = 0; e < V; e++) EXPECT_NEAR(dweight({e}), want.dweight[e], 1e-6 * want.dweight[e]);
    }
}

// Differences of the forward call itself; of 16 bits they would drown in rounding.
TEST_P(HeadNormGateBackwardF32Test, IsTheSlopeOfTheForwardCall) {
    for (holdfast_norm norm : {HOLDFAST_NORM_RMS, HOLDFAST_NORM_LAYER}) {
        const Index shape = {2, 3, 2, 24};
        Array in[] = {rows(shape), rows(shape), Array({2, 24}).fill(random, -2, 2)}, dout = rows(shape);  // x, gate, weight
        Array gradient[] = {Array(shape).forget(), Array(shape).forget(), Array({2, 24}).forget()};
        run(HeadNormGateBackward{in[0], in[1], in[2], dout, gradient[0], gradient[1], gradient[2], norm, 1e-2f});
        for (int n = 0; n < 3; n++) {
            // Along a random direction, as far either way as cubes and roundings weigh the same.
            Array way = Array(in[n].shape).fill(random), middle = in[n];
            double slope = 0, size = 0, ahead[2];
            each(way.shape, [&](const Index &i) {
                slope += (double)way(i) * gradient[n](i), size += std::abs((double)way(i) * gradient[n](i));
            });
            for (int side : {0, 1}) {
                each(way.shape, [&](const Index &i) { in[n](i) = middle(i) + (side ? 0.01f : -0.01f) * way(i); });
                Array out(shape);
                HeadNormGate forward{in[0], in[1], in[2], out, norm, 1e-2f};
                ASSERT_EQ(forward.run(*context), HOLDFAST_OK) << context->error();
                ahead[side] = 0;
                each(shape, [&](const Index &i) { ahead[side] += (double)dout(i) * out(i); });
            }
            in[n] = middle;
            EXPECT_NEAR(slope, (ahead[1] - ahead[0]) / 0.02, 1e-3 * size) << "input " << n << ", norm " << norm;
        }
    }
}

TEST_P(HeadNormGateBackwardF32Test, SameBitsForAnyNumber) {
    for (const Index &shape : {Index{2, 600, 1, 80}, {1200, 1, 1, 80}}) {  // four pieces
        SCOPED_TRACE(text(shape));
        Array x = rows(shape), gate = gates(shape), dout = rows(shape), weight = Array({1, 80}).fill(random);
        Array whole[] = {Array(shape), Array(shape), Array({1, 80})};
        for (int threads : {1, 2, 3}) {
            ASSERT_EQ(holdfast_context_set_threads(*context, threads), HOLDFAST_OK);
            Array dx = Array(shape).forget(), dgate = dx, dweight = Array({1, 80}).forget();
            run(HeadNormGateBackward{x, gate, weight, dout, dx, dgate, dweight});
            EXPECT_NE(context->messages.back().find(std::to_string(threads) + " threads"), std::string::npos);
            if (threads == 1) whole[0] = dx, whole[1] = dgate, whole[2] = dweight;
            EXPECT_TRUE(same_bits(whole[0], dx) && same_bits(whole[1], dgate) && same_bits(whole[2], dweight))
                << threads << " threads";
        }
        expect_gradients(x, gate, weight, dout, &whole[0], &whole[1], &whole[2], false, true, 1e-6f, dtype);
    }
}

INSTANTIATE_TEST_SUITE_P(, HeadNormGateBackwardTest, testing::ValuesIn(tokens_instances("head_norm_gate_backward")),
                         [](const auto &info) { return name(info.param); });
INSTANTIATE_TEST_SUITE_P(, HeadNormGateBackwardF32Test, testing::ValuesIn(tokens_instances("head_norm_gate_backward", {f32})),
                         [](const auto &info) { return name(info.param); });

}  // namespace

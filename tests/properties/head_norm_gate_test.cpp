// What holdfast_head_norm_gate promises, for every target of the CPU that runs here and every type.
#include "../allocations.h"
#include "../tokens.h"

#include <array>

namespace {
using namespace test;

class HeadNormGateTest : public TokensTest {};

TEST_P(HeadNormGateTest, MatchesReference) {
    enum Weight { none, of_all, of_each };
    for (const Index &shape : {Index{2, 2, 2, 37}, {3, 1, 2, 16}})
        for (Layout layout : layouts)
            for (Weight kind : {none, of_all, of_each})
                for (bool gated : {false, true})
                    for (holdfast_norm norm : {HOLDFAST_NORM_RMS, HOLDFAST_NORM_LAYER}) {
                        const int64_t H = shape[2], V = shape[3];
                        SCOPED_TRACE(text(shape) + name(layout) + ", weight " + std::to_string(kind) +
                                     (gated ? ", gated" : "") + ", norm " + std::to_string(norm));
                        Array x = rows(shape, layout), gate = gates(shape, layout), out = Array(shape, layout).forget();
                        Array weight = Array({H, V}, Layout::padded).fill(random, -2, 2);
                        HeadNormGate call{x, {}, {}, out, norm, 1e-3f};
                        if (kind == none) weight.fill(1);
                        if (kind == of_all) {
                            each(weight.shape, [&](const Index &i) { weight(i) = weight({0, i[1]}); });
                            call.weight = Tensor(weight.data(), {V}, {1});
                        }
                        if (kind == of_each) call.weight = weight;
                        if (gated) call.gate = gate;
                        const Array inputs[] = {x, gate, weight};
                        const reference::NormedRow want = normed(x, gate, weight, norm == HOLDFAST_NORM_LAYER, gated, 1e-3f);
                        run(call);
                        expect_close("out", out, want.out, want.spread, tolerance::of_norm(V), dtype);
                        EXPECT_TRUE(out.gaps_intact() && x.same_memory(inputs[0]) && gate.same_memory(inputs[1]) &&
                                    weight.same_memory(inputs[2]));
                        if (gated) {
                            Array over = gate;
                            {
                                RowsArgument xs(dtype, x), gate_and_out(dtype, over);
                                DLTensor weights = call.weight.dl();
                                const holdfast_head_norm_gate_args args = {sizeof args,
                                                                           xs.dl(),
                                                                           gate_and_out.dl(),
                                                                           kind == none ? nullptr : &weights,
                                                                           gate_and_out.dl(),
                                                                           norm,
                                                                           1e-3f};
                                ASSERT_EQ(holdfast_head_norm_gate(*context, &args), HOLDFAST_OK) << context->error();
                            }
                            EXPECT_TRUE(same_bits(over, out)) << "in place of the gate";
                        }
                        call.out = {};
                        run(call);
                        EXPECT_TRUE(same_bits(x, out)) << "in place";
                    }
}

// Far from 0 nothing is lost: the same rows, but for what their own numbers are rounded by.
TEST_P(HeadNormGateTest, LayerNormOfRowsFarFromZero) {
    for (double offset : {100.0, 1000.0, 30000.0}) {
        if (!(dtype == f32) && offset > 1000) continue;
        SCOPED_TRACE(offset);
        Array x({1, 2, 3, 80}), out = Array(x.shape).forget(), weight = Array({3, 80}).fill(1.0f);
        each(x.shape, [&](const Index &i) { x(i) = (float)(offset + random(-3, 3)); });
        round_to(dtype, x);
        const reference::NormedRow want = normed(x, x, weight, true, false, 1e-6f);
        run(HeadNormGate{x, {}, {}, out, HOLDFAST_NORM_LAYER});
        expect_close("out", out, want.out, want.spread, tolerance::of_norm(80), dtype);
    }
}

TEST_P(HeadNormGateTest, RowsOfOneNumber) {
    Array x = Array({1, 1, 1, 48}).fill(1000.0f), out = Array(x.shape).forget();
    round_to(dtype, x);
    run(HeadNormGate{x, {}, {}, out, HOLDFAST_NORM_LAYER});
    for (float value : out.values()) EXPECT_EQ(value, 0);
    run(HeadNormGate{x, {}, {}, out, HOLDFAST_NORM_RMS, 0});
    for (float value : out.values()) EXPECT_NEAR(value, 1, 1e-6);
    x.fill(0.0f);
    run(HeadNormGate{x, {}, {}, out, HOLDFAST_NORM_RMS});
    for (float value : out.values()) EXPECT_EQ(value, 0);
}

// Tokens and heads alone; more tokens than one call of the kernel takes.
TEST_P(HeadNormGateTest, SameBitsForAnyTokensAtOnce) {
    const int64_t T = 1100, H = 2, V = 19;
    for (const Index &shape : {Index{1, T, H, V}, {T, 1, H, V}}) {
        SCOPED_TRACE(text(shape));
        const int time = shape[1] == 1 ? 0 : 1;
        Array x = rows(shape), gate = gates(shape), weight = Array({H, V}).fill(random), whole = Array(shape).forget(),
              parts = whole;
        run(HeadNormGate{x, gate, weight, whole});
        for (int64_t h = 0; h < H; h++)
            for (const auto &[from, to] : {std::array<int64_t, 2>{0, 1}, {1, 700}, {700, T}}) {
                auto part = [&, from = from, to = to](Array &a) { return Tensor(a).part(time, from, to).part(2, h, h + 1); };
                run(HeadNormGate{part(x), part(gate), Tensor(weight).part(0, h, h + 1), part(parts)});
            }
        EXPECT_TRUE(same_bits(whole, parts));
    }
}

TEST_P(HeadNormGateTest, NotANumberStaysInItsRow) {
    for (holdfast_norm norm : {HOLDFAST_NORM_RMS, HOLDFAST_NORM_LAYER}) {
        Array x = rows({1, 2, 2, 33}), gate = Array(x.shape).fill(1.0f), clean = Array(x.shape).forget(), out = clean;
        run(HeadNormGate{x, gate, {}, clean, norm});
        x({0, 1, 0, 3}) = std::numeric_limits<float>::quiet_NaN(), x({0, 0, 1, 4}) = std::numeric_limits<float>::infinity();
        gate({0, 0, 0, 5}) = std::numeric_limits<float>::quiet_NaN();
        run(HeadNormGate{x, gate, {}, out, norm});
        each(x.shape, [&](const Index &i) {
            if (i[1] != i[2]) {
                EXPECT_TRUE(i != Index({0, 1, 0, 3}) || std::isnan(out(i)));
                EXPECT_TRUE(i != Index({0, 0, 1, 4}) || !std::isfinite(out(i)));
            } else if (i == Index{0, 0, 0, 5}) {
                EXPECT_TRUE(std::isnan(out(i)));
            } else {
                EXPECT_EQ(out(i), clean(i)) << text(i);
            }
        });
    }
}

TEST_P(HeadNormGateTest, NothingToDo) {
    for (const Index &shape : {Index{0, 3, 2, 10}, {2, 0, 2, 10}, {2, 3, 0, 10}, {0, 1, 2, 10}}) {
        Array x = rows(shape), gate = gates(shape), out(shape);
        run(HeadNormGate{x, gate, {}, out});
    }
}

TEST_P(HeadNormGateTest, ForcedTargetRunsAndAllocatesOnce) {
    Array x = rows({1, 20, 2, 10});
    RowsArgument rows(dtype, x);
    const holdfast_head_norm_gate_args args = {sizeof args, rows.dl(), rows.dl(), nullptr, rows.dl(), HOLDFAST_NORM_RMS, 1e-6f};
    ASSERT_EQ(holdfast_head_norm_gate(*context, &args), HOLDFAST_OK) << context->error();
    EXPECT_EQ(context->messages.back().find("head_norm_gate: head_norm_gate_" + std::string(dtype.name) + "_" +
                                            GetParam().target + " (target forced"),
              0u)
        << context->messages.back();
    ASSERT_EQ(holdfast_context_set_verbose(*context, nullptr, nullptr), HOLDFAST_OK);
    const int64_t before = allocations;
    for (int n = 0; n < 5; n++) holdfast_head_norm_gate(*context, &args);
    EXPECT_EQ(allocations - before, 0);
    EXPECT_GT(before, 0) << "allocations are not counted";
}

class HeadNormGateThreadsTest : public HeadNormGateTest {};

TEST_P(HeadNormGateThreadsTest, SameBitsForAnyNumber) {
    for (const Index &shape : {Index{2, 600, 1, 80}, {1200, 1, 1, 80}}) {  // three pieces
        SCOPED_TRACE(text(shape));
        Array x = rows(shape), gate = gates(shape), weight = Array({1, 80}).fill(random), whole = Array(shape).forget();
        for (int threads : {1, 2, 3}) {
            ASSERT_EQ(holdfast_context_set_threads(*context, threads), HOLDFAST_OK);
            Array out = Array(shape).forget();
            run(HeadNormGate{x, gate, weight, out});
            EXPECT_NE(context->messages.back().find(std::to_string(threads) + " threads"), std::string::npos);
            if (threads == 1) whole = out;
            EXPECT_TRUE(same_bits(whole, out)) << threads << " threads";
        }
    }
}

INSTANTIATE_TEST_SUITE_P(, HeadNormGateTest, testing::ValuesIn(tokens_instances("head_norm_gate")),
                         [](const auto &info) { return name(info.param); });
INSTANTIATE_TEST_SUITE_P(, HeadNormGateThreadsTest, testing::ValuesIn(tokens_instances("head_norm_gate", {f32})),
                         [](const auto &info) { return name(info.param); });

}  // namespace

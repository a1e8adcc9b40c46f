// What holdfast_rotate and holdfast_rotate_backward promise, for every target of the CPU that runs here and every type.
#include "../allocations.h"
#include "../tokens.h"

#include <array>

namespace {
using namespace test;

class RotateTest : public TokensTest {
protected:
    /// `out` is x turned by theta position(b, t).
    template<class Position>
    void expect_rotated(const Array &x, const Array &theta, const Array &out, bool interleaved, const Position &position,
                        bool backward = false) {
        test::expect_rotated(x, theta, out, interleaved, position, dtype, backward);
    }
};

TEST_P(RotateTest, MatchesReference) {
    const Array theta = thetas(5, random);
    for (const Index &shape : {Index{2, 7, 2, 10}, {9, 1, 2, 10}, {1, 1, 1, 10}})
        for (Layout layout : layouts)
            for (bool interleaved : {false, true})
                for (int64_t offset : {(int64_t)0, (int64_t)1'000'000, (int64_t)-7, (int64_t)1 << 40}) {
                    SCOPED_TRACE(text(shape) + name(layout) + (interleaved ? ", interleaved" : "") + ", offset " +
                                 std::to_string(offset));
                    Array x = rows(shape, layout), out = Array(shape, layout).forget(), angles = theta;
                    const Array before = x;
                    run(Rotation{x, angles, out, offset, interleaved});
                    EXPECT_TRUE(x.same_memory(before));
                    expect_rotated(x, theta, out, interleaved, [&](int64_t, int64_t t) { return offset + t; });
                    run(Rotation{x, angles, {}, offset, interleaved});
                    EXPECT_TRUE(same_bits(x, out)) << "in place";
                }
}

TEST_P(RotateTest, PositionsAreThoseGiven) {
    for (int64_t T : {1, 9})
        for (bool shared : {false, true})
            for (int bits : {32, 64}) {
                SCOPED_TRACE("T " + std::to_string(T) + (shared ? ", shared, " : ", ") + std::to_string(bits) + " bits");
                const int64_t B = 3;
                Array theta = thetas(5, random), x = rows({B, T, 2, 10}), out = Array(x.shape).forget();
                // Along time from the end, with gaps.
                std::vector<int64_t> wide(4 * B * T);
                std::vector<int32_t> small(wide.size());
                for (size_t n = 0; n < wide.size(); n++) wide[n] = small[n] = (int32_t)random(-0x1p31, 0x1p31);
                Index shape = {B, T}, stride = {2 * T, -2};
                if (shared) shape = {T}, stride = {-2};
                const size_t first = 2 * (T - 1);
                void *data = bits == 64 ? (void *)&wide[first] : &small[first];
                DLTensor positions = {
                    data, {kDLCPU, 0}, (int32_t)shape.size(), {kDLInt, (uint8_t)bits, 1}, shape.data(), stride.data(), 0};
                run(Rotation{x, theta, out, 0, true, f32, &positions});
                expect_rotated(x, theta, out, true,
                               [&](int64_t b, int64_t t) { return wide[first + (shared ? 0 : b * 2 * T) - 2 * t]; });
            }
}

TEST_P(RotateTest, BackwardTurnsTheOtherWay) {
    const Array theta = thetas(5, random);
    constexpr int64_t least = std::numeric_limits<int64_t>::min();
    for (const Index &shape : {Index{2, 7, 2, 10}, {9, 1, 2, 10}})
        for (Layout layout : layouts)
            for (bool interleaved : {false, true})
                for (int64_t offset : {(int64_t)1'000'000, (int64_t)-7, least}) {
                    SCOPED_TRACE(text(shape) + name(layout) + (interleaved ? ", interleaved" : "") + ", offset " +
                                 std::to_string(offset));
                    Array dout = rows(shape, layout), dx = Array(shape, layout).forget(), angles = theta;
                    const Array before = dout;
                    run(Rotation{dout, angles, dx, offset, interleaved, f32, nullptr, true});
                    EXPECT_TRUE(dout.same_memory(before));
                    expect_rotated(dout, theta, dx, interleaved, [&](int64_t, int64_t t) { return offset + t; }, true);
                    run(Rotation{dout, angles, {}, offset, interleaved, f32, nullptr, true});
                    EXPECT_TRUE(same_bits(dx, dout)) << "in place";
                }
}

// <dout, rotate(x)> = <rotate_backward(dout), x>, at positions that are given.
TEST_P(RotateTest, BackwardIsTheGradient) {
    Array theta = thetas(20, random), x = rows({2, 6, 3, 40}), dout = rows(x.shape), out = Array(x.shape).forget(), dx = out;
    std::vector<int64_t> where = positions(12, random);
    int64_t shape[] = {2, 6};
    DLTensor given = {where.data(), {kDLCPU, 0}, 2, {kDLInt, 64, 1}, shape, nullptr, 0};
    run(Rotation{x, theta, out, 0, false, f32, &given});
    run(Rotation{dout, theta, dx, 0, false, f32, &given, true});
    expect_rotated(dout, theta, dx, false, [&](int64_t b, int64_t t) { return where[6 * b + t]; }, true);
    double forward = 0, backward = 0, size = 0;
    each(x.shape, [&](const Index &i) {
        forward += (double)dout(i) * out(i), backward += (double)dx(i) * x(i), size += std::abs((double)dx(i) * x(i));
    });
    EXPECT_NEAR(forward, backward, (2 * tolerance::of_rotation + 2 * dtype.rounding_of(1)) * size);
}

TEST_P(RotateTest, PositionZeroChangesNothing) {
    Array theta = thetas(20, random), x = rows({3, 1, 2, 40}), out = Array(x.shape).forget();
    run(Rotation{x, theta, out});
    EXPECT_TRUE(same_bits(x, out));
    run(Rotation{x, theta, out.forget(), 0, false, f32, nullptr, true});
    EXPECT_TRUE(same_bits(x, out));
}

// Tokens and heads alone; more tokens than one call of the kernel takes.
TEST_P(RotateTest, SameBitsForAnyTokensAtOnce) {
    const int64_t T = 1100, H = 2, K = 34, offset = 990'000;
    for (const Index &shape : {Index{1, T, H, K}, {T, 1, H, K}}) {
        SCOPED_TRACE(text(shape));
        const int time = shape[1] == 1 ? 0 : 1;
        Array theta = thetas(K / 2, random), x = rows(shape), whole = Array(shape).forget(), parts = whole;
        run(Rotation{x, theta, whole, offset});
        for (int64_t h = 0; h < H; h++)
            for (const auto &[from, to] : {std::array<int64_t, 2>{0, 1}, {1, 700}, {700, T}}) {
                auto part = [&, from = from, to = to](Array &a) { return Tensor(a).part(time, from, to).part(2, h, h + 1); };
                run(Rotation{part(x), theta, part(parts), offset + (time ? from : 0)});
            }
        EXPECT_TRUE(same_bits(whole, parts));
    }
}

TEST_P(RotateTest, NotANumberStaysInItsPair) {
    Array theta = thetas(5, random), x = rows({1, 2, 2, 10}), clean = Array(x.shape).forget(), out = clean;
    run(Rotation{x, theta, clean, 5});
    x({0, 1, 0, 3}) = std::numeric_limits<float>::quiet_NaN(), x({0, 0, 1, 4}) = std::numeric_limits<float>::infinity();
    run(Rotation{x, theta, out, 5});
    each(x.shape, [&](const Index &i) {
        const bool touched =
            (i == Index{0, 1, 0, 3} || i == Index{0, 1, 0, 8} || i == Index{0, 0, 1, 4} || i == Index{0, 0, 1, 9});
        EXPECT_EQ(std::isfinite(out(i)), !touched) << text(i);
        EXPECT_TRUE(touched || out(i) == clean(i)) << text(i);
    });
}

TEST_P(RotateTest, TokensFarApart) {
    const int64_t apart = (int64_t)1 << 29;  // elements: two tokens are beyond the 31 bits of a call's bytes
    Reserved memory((size_t)8 << 30);
    ASSERT_TRUE(memory) << "no address space of 8 GB";
    Array x = rows({1, 3, 1, 8}), theta = thetas(4, random), out = Array(x.shape).forget();
    Tensor theta_view(theta);
    DLTensor angles = theta_view.dl();
    int64_t shape[] = {1, 3, 1, 8}, stride[] = {0, apart, 8, 1};
    DLTensor far = {memory.floats(), {kDLCPU, 0}, 4, dl_type(dtype), shape, stride, 0};
    {
        RowsArgument rows(dtype, x);
        const int64_t row = 8 * (dtype == f32 ? 4 : 2);
        for (int64_t t = 0; t < 3; t++)
            std::memcpy((char *)far.data + t * apart * row / 8, (char *)rows.dl()->data + t * row, row);
        const holdfast_rotate_args args = {sizeof args, &far, &angles, nullptr, &far, 77, 0};
        ASSERT_EQ(holdfast_rotate(*context, &args), HOLDFAST_OK) << context->error();
        RowsArgument result(dtype, out);
        for (int64_t t = 0; t < 3; t++)
            std::memcpy((char *)result.dl()->data + t * row, (char *)far.data + t * apart * row / 8, row);
    }
    expect_rotated(x, theta, out, false, [](int64_t, int64_t t) { return 77 + t; });
}

TEST_P(RotateTest, NothingToDo) {
    Array theta = thetas(5, random);
    for (const Index &shape : {Index{0, 3, 2, 10}, {2, 0, 2, 10}, {2, 3, 0, 10}, {0, 1, 2, 10}}) {
        Array x = rows(shape), out(shape);
        run(Rotation{x, theta, out, std::numeric_limits<int64_t>::max() - 2});
    }
}

TEST_P(RotateTest, ForcedTargetRunsAndAllocatesOnce) {
    Array theta = thetas(5, random), x = rows({1, 20, 2, 10});
    RowsArgument rows(dtype, x);
    Tensor theta_view(theta);
    DLTensor angles = theta_view.dl();
    const holdfast_rotate_args args = {sizeof args, rows.dl(), &angles, nullptr, rows.dl(), 0, 0};
    ASSERT_EQ(holdfast_rotate(*context, &args), HOLDFAST_OK) << context->error();
    EXPECT_EQ(context->messages.back().find("rotate: rotate_" + std::string(dtype.name) + "_" + GetParam().target +
                                            " (target forced"),
              0u)
        << context->messages.back();
    ASSERT_EQ(holdfast_context_set_verbose(*context, nullptr, nullptr), HOLDFAST_OK);
    const int64_t before = allocations;
    for (int n = 0; n < 5; n++) holdfast_rotate(*context, &args);
    EXPECT_EQ(allocations - before, 0);
    EXPECT_GT(before, 0) << "allocations are not counted";
}

class RotateThreadsTest : public RotateTest {};

TEST_P(RotateThreadsTest, SameBitsForAnyNumber) {
    for (const Index &shape : {Index{2, 600, 2, 64}, {1200, 1, 2, 64}}) {  // three pieces
        SCOPED_TRACE(text(shape));
        Array theta = thetas(32, random), x = rows(shape), whole = Array(shape).forget();
        for (int threads : {1, 2, 3}) {
            ASSERT_EQ(holdfast_context_set_threads(*context, threads), HOLDFAST_OK);
            Array out = Array(shape).forget();
            run(Rotation{x, theta, out, 990'000});
            EXPECT_NE(context->messages.back().find(std::to_string(threads) + " threads"), std::string::npos);
            if (threads == 1) whole = out;
            EXPECT_TRUE(same_bits(whole, out)) << threads << " threads";
        }
    }
}

INSTANTIATE_TEST_SUITE_P(, RotateTest, testing::ValuesIn(tokens_instances("rotate")),
                         [](const auto &info) { return name(info.param); });
INSTANTIATE_TEST_SUITE_P(, RotateThreadsTest, testing::ValuesIn(tokens_instances("rotate", {f32})),
                         [](const auto &info) { return name(info.param); });

}  // namespace

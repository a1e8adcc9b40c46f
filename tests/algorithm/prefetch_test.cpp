// Rows asked for ahead (schedules/x86/prefetch.cpp), in a pipeline made up here: a chunk of rows is copied, then read by a loop
// that asks. Prefetches change no value, so that the test has them call a function instead.
#include "../../schedules/schedule.h"
#include "../../schedules/x86/prefetch.h"

#include <gtest/gtest.h>

#include <set>

namespace {
using namespace Halide;
using namespace Halide::Internal;

std::multiset<const char *> asked;
extern "C" int holdfast_test_asked(void *address) {
    asked.insert((const char *)address);
    return 0;
}

struct CallInstead : IRMutator {
    using IRMutator::visit;
    Expr visit(const Call *op) override {
        if (op->name != "llvm.prefetch.p0") return IRMutator::visit(op);
        return Call::make(Int(32), "holdfast_test_asked", {op->args[0]}, Call::Extern);
    }
};

/// Computes `out` and notes what is asked for.
void run(const Func &out, const Target &target, const std::vector<int> &extents) {
    Pipeline pipeline(out);
    holdfast::Lowering::apply(pipeline, target);
    pipeline.add_custom_lowering_pass(new CallInstead);
    pipeline.set_jit_externs({{"holdfast_test_asked", JITExtern(holdfast_test_asked)}});
    asked.clear();
    pipeline.realize(extents, target);
}

TEST(Prefetch, AsksForEachLineOfTheNextRowsOnce) {
    constexpr int elements = 48, rows = 8, chunks = 3, stride = 100;
    const Target target("x86-64-linux-sse41");
    if (get_host_target().arch != Target::X86) GTEST_SKIP() << "this CPU is no x86";
    ImageParam in(Float(32), 4);  // (d, t, h, b)
    in.dim(0).set_bounds(0, elements);
    Var d, i, c;
    Func copied, sums, out;
    copied(d, i, c) = in(d, c * rows + i, 0, 0);
    RDom over(0, rows);
    sums(d, c) += copied(d, over, c);
    out(d, c) = sums(d, c);
    out.bound(d, 0, elements);
    copied.compute_at(out, c).rename(i, Var(holdfast::x86::rows_ahead));
    RVar outer(holdfast::x86::ask_ahead), step;
    sums.compute_at(out, c).update().reorder(d, over).split(over, outer, step, 2);

    std::vector<float> memory((rows * chunks + 1) * stride, 1.0f);
    const halide_dimension_t shape[] = {{0, elements, 1}, {0, rows * chunks, stride}, {0, 1, 0}, {0, 1, 0}};
    in.set(Buffer<float>(memory.data(), 4, shape));
    run(out, target, {elements, chunks});

    std::multiset<const char *> expected;
    for (int row = rows; row < rows * (chunks + 1); row++)
        for (int d = 0; d < elements; d += 16) expected.insert((const char *)(memory.data() + row * stride + d));
    EXPECT_EQ(asked, expected);
}

// A stage of all chunks that asks for their rows, or for those of the next head.
TEST(Prefetch, AsksForEachLineOfAllRowsOnce) {
    constexpr int elements = 48, rows = 8, chunks = 3, stride = 100, of_heads = 1000;
    const Target target("x86-64-linux-sse41");
    if (get_host_target().arch != Target::X86) GTEST_SKIP() << "this CPU is no x86";
    std::vector<float> memory(rows * chunks * stride + of_heads, 1.0f);
    const halide_dimension_t shape[] = {{0, elements, 1}, {0, rows * chunks, stride}, {0, 1, of_heads}, {0, 1, 0}};
    for (const bool behind : {false, true}) {
        ImageParam in(Float(32), 4, "rows");  // (d, t, h, b)
        in.dim(0).set_bounds(0, elements);
        Var d("d"), i("i"), c("c"), tile("tile"), lane("lane");
        Func stage("stage"), out("out");
        stage(d, i, c) = cast<float>(d + i * c);
        out(d, i, c) = stage(d, i, c) + in(d, c * rows + i, 0, 0);
        out.bound(d, 0, elements).bound(i, 0, rows);
        const Var asking(holdfast::x86::ask_for({"rows"}, rows, behind));
        stage.compute_root().bound_extent(d, elements).bound_extent(i, rows).split(d, asking, lane, 16);
        in.set(Buffer<float>(memory.data(), 4, shape));
        run(out, target, {elements, rows, chunks});

        std::multiset<const char *> expected;
        for (int row = 0; row < rows * chunks; row++)
            for (int d = 0; d < elements; d += 16)
                expected.insert((const char *)(memory.data() + row * stride + d + (behind ? of_heads : 0)));
        EXPECT_EQ(asked, expected) << "behind " << behind;
    }
}

// A loop over vectors, two of them to a line, that asks for what is some tokens behind; but not for vectors beside its iterations.
TEST(Prefetch, AsksForEachLineOfLaterTokensOnce) {
    constexpr int elements = 80, in_loop = 64, tokens = 5, heads = 2, stride = 200, ahead = 3;
    const Target target("x86-64-linux-sse41");
    if (get_host_target().arch != Target::X86) GTEST_SKIP() << "this CPU is no x86";
    std::vector<float> memory(tokens * stride, 1.0f);
    const halide_dimension_t shape[] = {{0, elements, 1}, {0, heads, 100}, {0, tokens, stride}, {0, 1, 0}};
    ImageParam in(Float(32), 4, "rows");  // (e, h, t, b)
    Var e("e"), h("h"), t("t"), ask(holdfast::x86::ask_tokens_ahead(ahead)), middle("middle"), lane("lane");
    Func stage("stage"), out("out");
    stage(e, h, t) = in(e, h, t, 0) * in(e, h, t, 0);
    out(e, h, t) = stage(e, h, t) + 1;
    stage.compute_root().split(e, ask, lane, 8, TailStrategy::GuardWithIf).vectorize(lane);
    stage.split(ask, ask, middle, 4, TailStrategy::GuardWithIf).unroll(middle);
    in.set(Buffer<float>(memory.data(), 4, shape));
    run(out, target, {elements, heads, tokens});

    std::multiset<const char *> expected;
    for (int token = ahead; token < tokens + ahead; token++)
        for (int head = 0; head < heads; head++)
            for (int d = 0; d < in_loop; d += 16)
                expected.insert((const char *)(memory.data() + token * stride + head * 100 + d));
    EXPECT_EQ(asked, expected);
}

}  // namespace

// The choice among schedules (schedules/schedule.h): with schedules made up here, and with those of the kernels.
#include "../../generators/chunkwise.h"
#include "../../generators/head_norm_gate_backward.h"
#include "../../generators/recurrent.h"
#include "../../generators/rotate.h"
#include "../../schedules/schedule.h"

#include <gtest/gtest.h>

namespace {
using Halide::Target;

struct Funcs {
    std::string scheduled_by;
};
struct Sizes {
    int chunk;
};
using Schedule = holdfast::Schedule<Funcs, Sizes>;

const Target generic("x86-64-linux"), avx2("x86-64-linux-sse41-avx-avx2-f16c-fma"),
    avx512("x86-64-linux-sse41-avx-avx2-f16c-fma-avx512-avx512_skylake");

bool always(const Target &, const Sizes &) { return true; }
bool never(const Target &, const Sizes &) { return false; }
bool even_on_avx2(const Target &t, const Sizes &s) { return t.has_feature(Target::AVX2) && s.chunk % 2 == 0; }

/// Leaves its name, so that a test sees which one was applied.
template<char letter>
void leave(Funcs &f, const Sizes &, const Target &) {
    f.scheduled_by = letter;
}

class ScheduleChoice : public testing::Test {
protected:
    void SetUp() override { Schedule::all().clear(); }

    std::string chosen(const Target &target, int chunk, const std::string &forced = "") {
        Funcs f;
        Halide::Func zero;
        zero() = 0;
        holdfast::apply_schedule(f, Sizes{chunk}, Halide::Pipeline(zero), target, forced);
        return f.scheduled_by;
    }
    void expect_error(const char *expected, const Target &target, const std::string &forced = "") {
        try {
            chosen(target, 2, forced);
            FAIL() << "no error";
        } catch (const Halide::CompileError &e) {
            EXPECT_NE(std::string(e.what()).find(expected), std::string::npos) << e.what();
        }
    }
};

TEST_F(ScheduleChoice, HighestMatchingRankWins) {
    Schedule::add({"a", 1, always, leave<'a'>});
    Schedule::add({"b", 5, even_on_avx2, leave<'b'>});
    Schedule::add({"c", 9, never, leave<'c'>});
    Schedule::add({"d", 0, always, leave<'d'>});
    EXPECT_EQ(chosen(avx2, 2), "b");
    EXPECT_EQ(chosen(avx2, 3), "a");
    EXPECT_EQ(chosen(generic, 2), "a");
}

TEST_F(ScheduleChoice, ForcingIgnoresRankAndMatch) {
    Schedule::add({"a", 1, always, leave<'a'>});
    Schedule::add({"c", 9, never, leave<'c'>});
    EXPECT_EQ(chosen(generic, 2, "c"), "c");
    EXPECT_EQ(chosen(generic, 2, "a"), "a");
}

TEST_F(ScheduleChoice, NoneLeavesTheAlgorithmAsItIs) {
    Schedule::add({"a", 1, always, leave<'a'>});
    EXPECT_EQ(chosen(generic, 2, "none"), "");
}

TEST_F(ScheduleChoice, TieFails) {
    Schedule::add({"a", 5, always, leave<'a'>});
    Schedule::add({"b", 5, always, leave<'b'>});
    expect_error("two schedules of rank 5", generic);
}

TEST_F(ScheduleChoice, TieBelowTheBestIsNone) {
    Schedule::add({"a", 5, always, leave<'a'>});
    Schedule::add({"b", 5, always, leave<'b'>});
    Schedule::add({"c", 6, always, leave<'c'>});
    EXPECT_EQ(chosen(generic, 2), "c");
}

TEST_F(ScheduleChoice, NoMatchFails) {
    Schedule::add({"a", 5, never, leave<'a'>});
    expect_error("no schedule", generic);
}

TEST_F(ScheduleChoice, UnknownForcedNameFails) {
    Schedule::add({"a", 5, always, leave<'a'>});
    expect_error("no schedule 'x'", generic, "x");
}

std::string best(const Target &target, int chunk, int key, int value) {
    return holdfast::Schedule<holdfast::ChunkwiseFuncs, holdfast::ChunkwiseSizes>::best({chunk, key, value, 8}, target).name;
}

TEST(ChunkwiseSchedules, X86TakesAnySizes) {
    EXPECT_EQ(best(avx512, 64, 64, 64), "x86");
    EXPECT_EQ(best(avx512, 64, 128, 256), "x86");
    EXPECT_EQ(best(avx2, 64, 32, 32), "x86");
    EXPECT_EQ(best(avx512, 32, 0, 0), "x86");
    EXPECT_EQ(best(avx512, 64, 33, 64), "x86");
}

TEST(ChunkwiseSchedules, GenericTakesTheRest) {
    EXPECT_EQ(best(avx512, 48, 64, 64), "generic");
    EXPECT_EQ(best(avx2, 20, 64, 64), "generic");
    EXPECT_EQ(best(generic, 64, 64, 64), "generic");
    EXPECT_EQ(best(Target("arm-64-linux"), 64, 64, 64), "generic");
}

TEST(ChunkwiseSchedules, GpuTakesEveryApi) {
    for (const char *target : {"x86-64-linux-metal", "x86-64-linux-opencl", "x86-64-linux-vulkan"}) {
        EXPECT_EQ(best(Target(target), 32, 0, 0), "gpu");
        EXPECT_EQ(best(Target(target), 64, 16, 64), "gpu");
    }
    EXPECT_EQ(best(Target("x86-64-linux-opencl"), 64, 64, 64), "gpu");
    EXPECT_EQ(best(Target("arm-64-osx-metal"), 64, 64, 64), "metal");
    EXPECT_EQ(best(Target("arm-64-ios-metal"), 64, 128, 256), "metal");
}

std::string best_recurrent(const Target &target, int key, int value) {
    return holdfast::Schedule<holdfast::RecurrentFuncs, holdfast::RecurrentSizes>::best({key, value, 1}, target).name;
}

TEST(RecurrentSchedules, X86TakesWholeVectors) {
    EXPECT_EQ(best_recurrent(avx512, 64, 64), "x86");
    EXPECT_EQ(best_recurrent(avx512, 256, 512), "x86");
    EXPECT_EQ(best_recurrent(avx2, 32, 8), "x86");
    EXPECT_EQ(best_recurrent(avx512, 32, 8), "generic");
    EXPECT_EQ(best_recurrent(avx2, 33, 64), "generic");
    EXPECT_EQ(best_recurrent(avx2, 0, 0), "generic");
    EXPECT_EQ(best_recurrent(generic, 64, 64), "generic");
    EXPECT_EQ(best_recurrent(Target("arm-64-linux"), 64, 64), "generic");
}

template<class Funcs, class Sizes>
std::string best_of_any_size(const Target &target) {
    return holdfast::Schedule<Funcs, Sizes>::best({}, target).name;
}

TEST(SchedulesAroundRetention, X86TakesWhatHasVectors) {
    for (const auto best : {best_of_any_size<holdfast::RotateFuncs, holdfast::RotateSizes>,
                            best_of_any_size<holdfast::HeadNormGateFuncs, holdfast::HeadNormGateSizes>,
                            best_of_any_size<holdfast::HeadNormGateBackwardFuncs, holdfast::HeadNormGateBackwardSizes>}) {
        EXPECT_EQ(best(avx512), "x86");
        EXPECT_EQ(best(avx2), "x86");
        EXPECT_EQ(best(generic), "generic");
        EXPECT_EQ(best(Target("arm-64-linux")), "generic");
        EXPECT_EQ(best(Target("x86-64-linux-opencl")), "gpu");
    }
}

}  // namespace

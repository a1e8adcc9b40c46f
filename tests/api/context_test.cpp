// The rest of the API: options with bad values, the listing of variants, names and versions.
#include "../forward.h"

namespace {
using namespace test;

int parallel_for(void *, int, void (*)(void *, int), void *) { return 0; }
void *allocate(void *, size_t, size_t) { return nullptr; }
void deallocate(void *, void *, size_t) {}
void listen(void *, const char *) {}

TEST(ContextOptions, NeedAContext) {
    const holdfast_status statuses[] = {
        holdfast_context_set_target(nullptr, "generic"),
        holdfast_context_set_target(nullptr, nullptr),
        holdfast_context_set_threads(nullptr, 1),
        holdfast_context_set_thread_pool(nullptr, parallel_for, nullptr),
        holdfast_context_set_allocator(nullptr, allocate, deallocate, nullptr),
        holdfast_context_set_verbose(nullptr, listen, nullptr),
    };
    for (holdfast_status status : statuses) EXPECT_EQ(status, HOLDFAST_INVALID_ARGUMENT);
    EXPECT_STREQ(holdfast_last_error(nullptr), "context is NULL; expected one made by holdfast_context_create");
    holdfast_context_destroy(nullptr);
}

TEST(ContextOptions, Threads) {
    Context context;
    for (int threads : {-1, 257, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()}) {
        EXPECT_EQ(holdfast_context_set_threads(context, threads), HOLDFAST_INVALID_ARGUMENT);
        EXPECT_EQ(context.error(), "threads is " + std::to_string(threads) + "; expected 0 to 256");
    }
    for (int threads : {0, 1, 256}) EXPECT_EQ(holdfast_context_set_threads(context, threads), HOLDFAST_OK);
}

TEST(ContextOptions, AllocatorIsBothFunctionsOrNeither) {
    Context context;
    EXPECT_EQ(holdfast_context_set_allocator(context, nullptr, deallocate, nullptr), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "allocate is NULL; expected both functions or neither");
    EXPECT_EQ(holdfast_context_set_allocator(context, allocate, nullptr, nullptr), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "deallocate is NULL; expected both functions or neither");

    // Neither of them took effect.
    Problem p{1, 70, 1, 64, 64};
    EXPECT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
}

TEST(ContextOptions, VerboseMayBeTakenAway) {
    Context context;
    Problem p{1, 70, 1, 64, 64};
    ASSERT_EQ(p.forward().run(context), HOLDFAST_OK);
    ASSERT_EQ(holdfast_context_set_verbose(context, nullptr, nullptr), HOLDFAST_OK);
    ASSERT_EQ(p.forward().run(context), HOLDFAST_OK);
    EXPECT_EQ(context.messages.size(), 1u);
}

TEST(LastError, IsOfTheLastCallThatFailed) {
    Context context, other;
    EXPECT_EQ(context.error(), "");
    EXPECT_EQ(holdfast_context_set_threads(context, -1), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(holdfast_context_set_threads(context, 1), HOLDFAST_OK);
    EXPECT_EQ(context.error(), "threads is -1; expected 0 to 256");
    EXPECT_EQ(holdfast_context_set_threads(context, 999), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "threads is 999; expected 0 to 256");
    EXPECT_EQ(other.error(), "");
}

TEST(Variants, AreDescribed) {
    ASSERT_GT(holdfast_variant_count(), 0);
    for (int n = 0; n < holdfast_variant_count(); n++) {
        holdfast_variant v = {};
        ASSERT_EQ(holdfast_variant_at(nullptr, n, &v), HOLDFAST_OK);
        const std::string name = v.name;
        for (const std::string part : {v.kernel, v.dtype, v.target})
            EXPECT_NE(name.find(part), std::string::npos) << name << " " << part;
        const std::string kernel = v.kernel, of = kernel.substr(0, kernel.find("_backward"));
        const bool chunks = of == "chunkwise" || of == "parallel" || of == "power";
        EXPECT_TRUE((v.chunk > 0) == chunks || kernel == "recurrent") << name;  // which has kernels of one token, and of blocks
        const int element = v.dtype == std::string("f32") ? 4 : 2;
        EXPECT_TRUE(v.row_alignment >= element && v.row_alignment % element == 0) << name;
        EXPECT_TRUE(v.round_operands == 0 || (v.round_operands == 1 && element == 2)) << name;
        EXPECT_TRUE(v.runs_here == 0 || v.runs_here == 1);
        EXPECT_TRUE(v.selected == 0 || v.runs_here) << name;
        EXPECT_EQ(v.runs_here == 1, std::string(v.missing).empty()) << name;
    }
}

TEST(Variants, OfAnyCpuComeLast) {
    const holdfast_variant last = variants().back();
    EXPECT_STREQ(last.missing, "");
    EXPECT_EQ(last.runs_here, 1);
}

TEST(Variants, IndexAndPointerAreChecked) {
    Context context;
    const int count = holdfast_variant_count();
    holdfast_variant v = {}, untouched = {};
    for (int index : {-1, count, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()}) {
        EXPECT_EQ(holdfast_variant_at(context, index, &v), HOLDFAST_INVALID_ARGUMENT);
        EXPECT_EQ(context.error(), "index is " + std::to_string(index) + "; expected 0 to " + std::to_string(count - 1));
    }
    EXPECT_FALSE(std::memcmp(&v, &untouched, sizeof v));
    EXPECT_EQ(holdfast_variant_at(context, 0, nullptr), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "variant is NULL; expected a holdfast_variant to fill in");
}

TEST(Names, Statuses) {
    EXPECT_STREQ(holdfast_status_name(HOLDFAST_OK), "HOLDFAST_OK");
    EXPECT_STREQ(holdfast_status_name(HOLDFAST_INVALID_ARGUMENT), "HOLDFAST_INVALID_ARGUMENT");
    EXPECT_STREQ(holdfast_status_name(HOLDFAST_UNSUPPORTED), "HOLDFAST_UNSUPPORTED");
    EXPECT_STREQ(holdfast_status_name(HOLDFAST_TARGET_UNAVAILABLE), "HOLDFAST_TARGET_UNAVAILABLE");
    EXPECT_STREQ(holdfast_status_name(HOLDFAST_OUT_OF_MEMORY), "HOLDFAST_OUT_OF_MEMORY");
    EXPECT_STREQ(holdfast_status_name(HOLDFAST_INTERNAL_ERROR), "HOLDFAST_INTERNAL_ERROR");
    EXPECT_STREQ(holdfast_status_name(HOLDFAST_DEVICE_ERROR), "HOLDFAST_DEVICE_ERROR");
    EXPECT_STREQ(holdfast_status_name((holdfast_status)7), "unknown status");
}

TEST(Names, VersionIsThatOfTheHeader) {
    std::ostringstream version;
    version << HOLDFAST_VERSION_MAJOR << "." << HOLDFAST_VERSION_MINOR << "." << HOLDFAST_VERSION_PATCH;
    EXPECT_EQ(holdfast_version(), version.str());
    EXPECT_STREQ(holdfast_version(), HOLDFAST_TEST_PROJECT_VERSION);
}

TEST(Names, CpuFeaturesDoNotChange) { EXPECT_EQ(holdfast_cpu_features(), holdfast_cpu_features()); }

}  // namespace

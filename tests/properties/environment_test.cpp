// HOLDFAST_TARGET. It is read once in a process, so CTest runs this file once for each value (CMakeLists.txt).
#include "../forward.h"

#include <cstdlib>

namespace {
using namespace test;

Problem problem() { return {1, 70, 1, 64, 64}; }

/// What the environment asks for.
std::string asked() { return std::getenv("HOLDFAST_TARGET"); }

TEST(GoodTarget, Runs) {
    Context context;
    Problem p = problem();
    ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
    EXPECT_NE(context.messages.at(0).find(variant_for(asked(), {64, 64})->name), std::string::npos) << context.messages[0];
    EXPECT_NE(context.messages[0].find("HOLDFAST_TARGET"), std::string::npos) << context.messages[0];
    p.expect_reference(64, 2);
    for (const holdfast_variant &v : variants(context)) EXPECT_TRUE(!v.selected || v.target == asked()) << v.name;
}

TEST(GoodTarget, ContextComesFirst) {
    const std::string best = targets(true).front();
    Context context(best);
    Problem p = problem();
    ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
    EXPECT_NE(context.messages.at(0).find("forced by the context"), std::string::npos) << context.messages[0];
    EXPECT_NE(context.messages[0].find(best), std::string::npos) << context.messages[0];
}

TEST(GoodTarget, IsReadOnce) {
    Context context;
    Problem p = problem();
    ASSERT_EQ(p.forward().run(context), HOLDFAST_OK);
    ASSERT_EQ(setenv("HOLDFAST_TARGET", "nonsense", 1), 0);
    EXPECT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(p.forward().run(nullptr), HOLDFAST_OK);
}

TEST(BadTarget, FailsTheCallsThatWouldUseIt) {
    Context context;
    Problem p = problem();
    const Array before = p.out;
    for (holdfast_context *c : {(holdfast_context *)context, (holdfast_context *)nullptr}) {
        EXPECT_EQ(p.forward().run(c), HOLDFAST_TARGET_UNAVAILABLE);
        const std::string text = holdfast_last_error(c);
        EXPECT_NE(text.find("HOLDFAST_TARGET"), std::string::npos) << text;
        EXPECT_NE(text.find("'" + asked() + "'"), std::string::npos) << text;
    }
    EXPECT_TRUE(p.out.same_memory(before));

    // A context with a target of its own does not use it.
    Context forced(targets().back());
    EXPECT_EQ(p.forward().run(forced), HOLDFAST_OK) << forced.error();
}

TEST(BadTarget, VariantsAreListedWithNoneSelected) {
    Context context;
    for (int n = 0; n < holdfast_variant_count(); n++) {
        holdfast_variant v = {};
        EXPECT_EQ(holdfast_variant_at(context, n, &v), HOLDFAST_TARGET_UNAVAILABLE);
        ASSERT_NE(v.name, nullptr);
        EXPECT_NE(v.missing, nullptr);
        EXPECT_EQ(v.selected, 0);
    }
}

}  // namespace

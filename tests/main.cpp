// Runs the tests, and prints the seed under each failure. A filter that lets no test through is a failure; where all tests were skipped
// the exit status says so.
#include "array.h"

#include <gtest/gtest.h>

#include <cstdio>

namespace {

class SeedPrinter : public testing::EmptyTestEventListener {
    void OnTestPartResult(const testing::TestPartResult &result) override {
        if (result.failed()) std::printf("HOLDFAST_TEST_SEED=%u\n", test::seed());
    }
};

}  // namespace

int main(int argc, char **argv) {
    constexpr int all_skipped = 77;  // SKIP_RETURN_CODE in CMakeLists.txt
    testing::InitGoogleTest(&argc, argv);
    testing::UnitTest &tests = *testing::UnitTest::GetInstance();
    tests.listeners().Append(new SeedPrinter);
    if (const int failed = RUN_ALL_TESTS()) return failed;
    if (GTEST_FLAG_GET(list_tests)) return 0;
    if (tests.test_to_run_count() == 0) {
        std::printf("No test is let through by the filter.\n");
        return 1;
    }
    return tests.skipped_test_count() == tests.test_to_run_count() ? all_skipped : 0;
}

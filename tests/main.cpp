// Runs the tests, and prints the seed under each failure.
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
    testing::InitGoogleTest(&argc, argv);
    testing::UnitTest::GetInstance()->listeners().Append(new SeedPrinter);
    return RUN_ALL_TESTS();
}

// The conversions of generators/dtypes.h, on every target of cmake/targets.cmake that this machine runs, against arithmetic;
// those of fp16 also with the integers that stand for it in kernels of OpenCL and Vulkan.
#include "../../generators/dtypes.h"
#include "../../schedules/gpu/float16.h"
#include "../check.h"
#include "../dtype.h"
#include "targets.h"

#include <HalideBuffer.h>

namespace {
using namespace Halide;
using namespace test;

struct Instance {
    Dtype dtype;
    NamedTarget target;
    int lanes;
    bool as_integers = false;
};
std::string name(const Instance &i) {
    return std::string(i.dtype.name) + "_" + i.target.name + "_" + std::to_string(i.lanes) +
           (i.as_integers ? "_as_integers" : "");
}
void PrintTo(const Instance &i, std::ostream *stream) { *stream << name(i); }

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

class Dtypes : public testing::TestWithParam<Instance> {
protected:
    const Dtype dtype = GetParam().dtype;
    const holdfast::Dtype type = holdfast::dtype_names().at(dtype.name);
    Var n{"n"};

    void SetUp() override {
        const std::string lacking = missing(GetParam().target.target);
        if (!lacking.empty()) GTEST_SKIP() << "this CPU lacks" << lacking;
    }
    /// Memory of 16 bits an element, in Halide's type for it.
    Buffer<> stored(std::vector<uint16_t> &bits) const { return Buffer<>(stored_type(type), bits.data(), (int)bits.size()); }
    void realize(Func f, Buffer<> result) const {
        f.vectorize(n, GetParam().lanes, TailStrategy::GuardWithIf);
        Pipeline pipeline(f);
        if (GetParam().as_integers) pipeline.add_custom_lowering_pass(holdfast::gpu::float16_as_integers().release());
        pipeline.realize(Pipeline::RealizationArg(result), GetParam().target.target.with_feature(Target::JIT));
    }
    std::vector<uint16_t> narrowed(std::vector<float> &numbers) const {
        Buffer<float> in(numbers.data(), (int)numbers.size());
        std::vector<uint16_t> result(numbers.size());
        Param<float> one;
        one.set(1);
        Func f;  // of a product, as in kernels: what is computed counts as a number for Halide's compiler, NaN or not
        f(n) = narrow(type, in(n) * one);
        realize(f, stored(result));
        return result;
    }
};

TEST_P(Dtypes, WidenIsExactForAllNumbers) {
    std::vector<uint16_t> all(1 << 16);
    for (size_t i = 0; i < all.size(); i++) all[i] = (uint16_t)i;
    std::vector<float> result(all.size());
    Buffer<> in = stored(all);
    Func f;
    f(n) = widen(type, Func(in)(n));
    realize(f, Buffer<float>(result.data(), (int)result.size()));
    for (size_t i = 0; i < all.size(); i++) {
        const float expected = (float)dtype.decode(all[i]);
        if (std::isnan(expected))
            ASSERT_TRUE(std::isnan(result[i])) << i << " is " << result[i] << "; expected NaN";
        else
            ASSERT_EQ(bits_of(result[i]), bits_of(expected)) << i << " is " << result[i] << "; expected " << expected;
    }
}

TEST_P(Dtypes, NarrowRoundsToTheNearestEven) {
    // Every number of the type, infinity among them, the middle between it and the next one, and the fp32 numbers beside it.
    std::vector<float> numbers;
    const float infinity = std::numeric_limits<float>::infinity();
    for (int bits = 0; dtype.decode((uint16_t)bits) <= infinity; bits++)
        for (float sign : {1.0f, -1.0f}) {
            const double number = dtype.decode((uint16_t)bits), next = dtype.decode((uint16_t)(bits + 1));
            const float middle = (float)(std::isinf(next) ? dtype.overflow() : (number + next) / 2);
            for (float x : {(float)number, middle, std::nextafter(middle, 0.0f), std::nextafter(middle, infinity)})
                numbers.push_back(sign * x);
        }
    // NaN of every kind, and anything.
    for (uint32_t bits : {0x7f800001u, 0x7f80ffffu, 0x7fbfffffu, 0x7fc00000u, 0x7fff8000u, 0x7fffffffu})
        for (uint32_t sign : {0u, 0x80000000u}) numbers.push_back(float_of(bits | sign));
    std::mt19937 random(seed());
    for (int i = 0; i < 1 << 19; i++) numbers.push_back(float_of((uint32_t)random()));

    const std::vector<uint16_t> result = narrowed(numbers);
    for (size_t i = 0; i < numbers.size(); i++)
        if (std::isnan(numbers[i]))
            ASSERT_TRUE(std::isnan(dtype.decode(result[i])))
                << "of NaN " << bits_of(numbers[i]) << ": " << dtype.decode(result[i]);
        else
            ASSERT_EQ(result[i], dtype.encode(numbers[i]))
                << numbers[i] << " is rounded to " << dtype.decode(result[i]) << "; expected " << dtype.round(numbers[i]);
}

std::vector<Instance> instances() {
    std::vector<Instance> list;
    for (const Dtype &dtype : {f16, bf16})
        for (const NamedTarget &target : targets())
            for (int lanes :
                 std::set<int>{1, target.target.natural_vector_size<float>(), target.target.natural_vector_size<uint16_t>()})
                list.push_back({dtype, target, lanes});
    for (int lanes : {1, 4}) list.push_back({f16, targets().back(), lanes, true});
    return list;
}

INSTANTIATE_TEST_SUITE_P(, Dtypes, testing::ValuesIn(instances()), [](const auto &info) { return name(info.param); });

// What all the rest goes by.
TEST(DtypeOfTests, KnownNumbers) {
    struct Known {
        Dtype dtype;
        double number;
        uint16_t bits;
    };
    for (const Known &k : {Known{f16, 1, 0x3c00},
                           {f16, -2, 0xc000},
                           {f16, 65504, 0x7bff},
                           {f16, 0x1p-24, 0x0001},
                           {f16, 0x1p-14, 0x0400},
                           {bf16, 1, 0x3f80},
                           {bf16, -2, 0xc000},
                           {bf16, 0x1.fep127, 0x7f7f},
                           {bf16, 0x1p-133, 0x0001},
                           {bf16, 0x1p-126, 0x0080}}) {
        EXPECT_EQ(k.dtype.encode(k.number), k.bits) << k.number;
        EXPECT_EQ(k.dtype.decode(k.bits), k.number) << k.bits;
    }
    EXPECT_EQ(f16.round(2049), 2048);
    EXPECT_EQ(f16.round(2051), 2052);
    EXPECT_EQ(f16.round(65519.9), 65504);
    EXPECT_EQ(f16.round(65520), std::numeric_limits<double>::infinity());
    for (const Dtype &dtype : {f16, bf16})
        for (int bits = 0; bits < 1 << 16; bits++) {
            const double number = dtype.decode((uint16_t)bits);
            ASSERT_TRUE(std::isnan(number) || dtype.encode(number) == bits) << bits;
        }
}

}  // namespace

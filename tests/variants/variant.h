// The compiled variants of a kernel, what they are called with, and what this machine lacks for that.
#pragma once
#include "../array.h"
#include "../dtype.h"
#include "../required.h"
#include "../shapes.h"
#include "instructions.h"

#include <HalideRuntime.h>
#include <gtest/gtest.h>
#include <holdfast/holdfast.h>
#include <kernels.h>

#include <sstream>
#include <string>
#include <string_view>

namespace test {

/// The backend of a target of cmake/targets.cmake.
constexpr const char *backend_of(std::string_view target) {
#define HOLDFAST_TARGET(name, backend, needs, ...) \
    if (target == #name) return #backend;
#include <targets.inc>
#undef HOLDFAST_TARGET
    return "";
}

/// CPU features that a variant needs and a test on this machine lacks, or why its backend cannot run; "" if it can be tested.
inline std::string missing_here(const std::string &variant) {
    holdfast_variant row;
    for (int n = 0; holdfast_variant_at(nullptr, n, &row) == HOLDFAST_OK; n++) {
        if (variant != row.name) continue;
        std::istringstream words(row.missing);
        bool testable = true;
        for (std::string word; testable && words >> word;) testable = can_be_tested(word);
        return testable ? "" : row.missing;
    }
    return "(not listed by holdfast_variant_at)";
}

using NoKernel = void();  // of a kernel that a build has no variants of

/// A row of cmake/kernels.cmake. All of a kernel's are rows({..}) of `#include <variants/KERNEL.inc>`.
template<class Kernel>
struct Variant {
    const char *name;
    Dtype dtype;
    int chunk;  // or block
    Size size;  // 0: any
    const char *backend;
    int row_alignment;
    bool rounds_operands;
    int degree;  // 0: any
    Kernel *kernel;

    bool on_cpu() const { return backend == std::string_view("cpu"); }
    /// Calls it with everything but a context.
    auto run() const {
        return [kernel = kernel](auto &&...arguments) {
            if constexpr (std::is_same_v<Kernel, NoKernel>)
                return -1;
            else
                return kernel(nullptr, arguments...);
        };
    }
};
#define HOLDFAST_VARIANT(of, name, dtype, chunk, key_size, value_size, target, row_alignment, round_operands, degree) \
    Variant<decltype(name)>{#name,          dtype,  chunk, {key_size, value_size}, backend_of(#target), row_alignment, \
                            round_operands, degree, name},

template<class Kernel>
std::vector<Variant<Kernel>> rows(std::initializer_list<Variant<Kernel>> list) {
    return list;
}
inline std::vector<Variant<NoKernel>> rows(std::initializer_list<Variant<NoKernel>>) { return {}; }

template<class Kernel>
std::string name(const Variant<Kernel> &v) {
    return v.name;
}
template<class Kernel>
void PrintTo(const Variant<Kernel> &v, std::ostream *stream) {
    *stream << v.name;
}

/// A variant, the size that it is called with, and the case; `AllCases`: of all of them.
struct AllCases {};
template<class Variant, class Case = AllCases>
struct Called {
    Variant variant;
    Size size;
    Case with = {};
};
template<class Variant, class Case>
std::string name(const Called<Variant, Case> &i) {
    std::string name = i.variant.name;
    if (!i.variant.size.K) name += "_K" + std::to_string(i.size.K) + "_V" + std::to_string(i.size.V);
    if constexpr (!std::is_same_v<Case, AllCases>) name += "_" + i.with.name;
    return name;
}
template<class Variant, class Case>
void PrintTo(const Called<Variant, Case> &i, std::ostream *stream) {
    *stream << name(i);
}

/// Why a case cannot be run by calling a kernel of that backend directly; "" if it can. (The library never asks for either.)
inline std::string not_on(const std::string &backend, Layout layout) {
    const bool reversed = backend != "cpu" && layout == Layout::reversed;
    return reversed ? "Halide's runtime does not copy negative strides to a GPU" : "";
}

/// A test of each of those, or of the variants alone. It is skipped where this machine lacks something, with the reason, unless
/// HOLDFAST_REQUIRED_BACKENDS has the backend: then it fails.
template<class Param>
class OfVariants : public testing::TestWithParam<Param> {
    template<class Kernel>
    void set_up(const Variant<Kernel> &variant) {
        halide_set_error_handler([](void *, const char *text) { ADD_FAILURE() << text; });
        const std::string missing = missing_here(variant.name);
        if (missing.empty()) return;
        if (required(variant.backend)) FAIL() << "HOLDFAST_REQUIRED_BACKENDS has " << variant.backend << ": " << missing;
        GTEST_SKIP() << "this machine lacks " << missing;
    }
    template<class Variant, class Case>
    void set_up(const Called<Variant, Case> &called) {
        set_up(called.variant);
        if constexpr (!std::is_same_v<Case, AllCases>)
            if (const std::string reason = not_on(called.variant.backend, called.with.layout); !reason.empty())
                GTEST_SKIP() << reason;
    }
    void SetUp() override { set_up(this->GetParam()); }
};

}  // namespace test

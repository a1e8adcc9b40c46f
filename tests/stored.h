// Floats of tests as a kernel of another type reads and writes them.
#pragma once
#include "array.h"
#include "dtype.h"

#include <gtest/gtest.h>

namespace test {

/// Elements that lie in memory of their own, 16 bits each, with the strides of the floats that they are made from. For fp32:
/// the floats themselves.
class Stored {
public:
    Stored(const Dtype &dtype, float *floats, const Index &shape, const Index &stride)
        : dtype(dtype), floats(floats), shape(shape), stride(stride) {
        if (dtype == f32) return;
        int64_t high = 0;
        bool empty = false;
        for (size_t axis = 0; axis < shape.size(); axis++) {
            const int64_t reach = (shape[axis] - 1) * stride[axis];
            (reach < 0 ? origin : high) += reach < 0 ? -reach : reach;
            empty |= shape[axis] == 0;
        }
        if (empty) origin = high = 0;
        memory.assign(origin + high + 1, filler);
        each_offset([&](int64_t n) {
            const float x = floats[n];
            memory[origin + n] = dtype.encode(x);
            if (!std::isnan(x) && dtype.decode(memory[origin + n]) != x) inexact++;
        });
        EXPECT_EQ(inexact, 0) << "elements are not numbers of the type " << dtype.name;
        before = memory;
    }
    Stored(const Dtype &dtype, Array &a) : Stored(dtype, a.data(), a.shape, a.stride) {}

    void *data() { return dtype == f32 ? (void *)floats : memory.data() + origin; }

    /// Put what has been written back into the floats.
    void load() {
        if (!(dtype == f32)) each_offset([&](int64_t n) { floats[n] = (float)dtype.decode(memory[origin + n]); });
    }
    /// The same bits in all of the memory as at the beginning. That of fp32 is looked at by Array.
    bool unchanged() const { return memory == before; }
    /// The same between the elements.
    bool gaps_intact() const {
        std::vector<uint16_t> expected = before;
        if (!(dtype == f32)) each_offset([&](int64_t n) { expected[origin + n] = memory[origin + n]; });
        return memory == expected;
    }

private:
    static constexpr uint16_t filler = 0x7fef;  // a NaN in either type
    const Dtype dtype;
    float *floats;
    const Index shape, stride;
    int64_t origin = 0, inexact = 0;
    std::vector<uint16_t> memory, before;

    template<class F>
    void each_offset(const F &f) const {
        each(shape, [&](const Index &i) {
            int64_t n = 0;
            for (size_t axis = 0; axis < i.size(); axis++) n += i[axis] * stride[axis];
            f(n);
        });
    }
};

/// Every element rounded to the type.
inline void round_to(const Dtype &dtype, Array &a) {
    if (!(dtype == f32)) each(a.shape, [&](const Index &i) { a(i) = (float)dtype.round(a(i)); });
}

}  // namespace test

// Strided arrays of floats for tests: random contents, any layout, and a watch over the memory between the elements.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <sys/mman.h>

namespace test {

using Index = std::vector<int64_t>;

/// Seed of all random contents. HOLDFAST_TEST_SEED replaces it; failures print it (check.h).
inline unsigned seed() {
    const char *text = std::getenv("HOLDFAST_TEST_SEED");
    return text ? (unsigned)std::strtoul(text, nullptr, 10) : 1;
}

/// The same numbers with every standard library, which std::uniform_real_distribution does not promise.
class Random {
public:
    double operator()(double low, double high) { return low + (high - low) * (engine() * 0x1p-32); }

private:
    std::mt19937 engine{seed()};
};

/// How the axes of an array lie in memory.
enum class Layout {
    compact,   // row-major
    swapped,   // axes 1 and 2 change places: [B, H, T, D]
    padded,    // gaps after every row and after every other axis, of 3 elements or another number
    reversed,  // the same with negative strides
};
constexpr Layout layouts[] = {Layout::compact, Layout::swapped, Layout::padded, Layout::reversed};
inline const char *name(Layout layout) {
    const char *names[] = {"compact", "swapped", "padded", "reversed"};
    return names[(int)layout];
}

/// Strides of an array in that layout. Rows stay contiguous, if they have to.
inline Index strides(const Index &shape, Layout layout, bool contiguous_rows = true, int64_t gap = 3) {
    const int rank = (int)shape.size();
    const bool gaps = layout == Layout::padded || layout == Layout::reversed;
    Index order(rank), stride(rank);
    for (int axis = 0; axis < rank; axis++) order[axis] = axis;
    if (layout == Layout::swapped && rank > 2) std::swap(order[1], order[2]);
    int64_t step = gaps && !contiguous_rows ? 2 : 1;
    for (int n = rank - 1; n >= 0; n--) {
        const int axis = (int)order[n];
        const bool row = contiguous_rows && axis == rank - 1;
        stride[axis] = layout == Layout::reversed && !row ? -step : step;
        step = step * std::max<int64_t>(shape[axis], 1) + (gaps ? gap : 0);
    }
    return stride;
}

/// f(index) for every index below `shape`, row-major.
template<class F>
void each(const Index &shape, const F &f) {
    for (int64_t extent : shape)
        if (extent == 0) return;
    Index index(shape.size());
    for (;;) {
        f(index);
        int axis = (int)shape.size() - 1;
        while (axis >= 0 && ++index[axis] == shape[axis]) index[axis--] = 0;
        if (axis < 0) return;
    }
}

class Array {
public:
    Index shape, stride;

    /// All memory, elements included, holds a NaN that no computation makes.
    Array(const Index &shape, const Index &stride) : shape(shape), stride(stride) {
        int64_t high = 0;
        bool empty = false;
        for (size_t axis = 0; axis < shape.size(); axis++) {
            const int64_t reach = (shape[axis] - 1) * stride[axis];
            (reach < 0 ? origin : high) += reach < 0 ? -reach : reach;
            empty |= shape[axis] == 0;
        }
        if (empty) origin = high = 0;
        memory.assign(origin + high + 1, filler());
    }
    Array(const Index &shape, Layout layout, int64_t gap = 3) : Array(shape, strides(shape, layout, true, gap)) {}
    explicit Array(const Index &shape = {0}) : Array(shape, Layout::compact) {}

    float *data() { return memory.data() + origin; }
    const float *data() const { return memory.data() + origin; }
    float &operator()(const Index &index) { return memory[offset(index)]; }
    float operator()(const Index &index) const { return memory[offset(index)]; }

    /// Elements, row-major.
    std::vector<float> values() const {
        std::vector<float> list;
        each(shape, [&](const Index &i) { list.push_back((*this)(i)); });
        return list;
    }
    Array &fill(Random &random, double low = -1, double high = 1) {
        each(shape, [&](const Index &i) { (*this)(i) = (float)random(low, high); });
        return *this;
    }
    Array &fill(float value) {
        each(shape, [&](const Index &i) { (*this)(i) = value; });
        return *this;
    }
    /// Make every element a NaN that no computation makes: how outputs wait to be written.
    Array &forget() { return fill(filler()); }

    /// The same bits in all of the memory, between the elements too.
    bool same_memory(const Array &other) const {
        return memory.size() == other.memory.size() &&
               !std::memcmp(memory.data(), other.memory.data(), memory.size() * sizeof(float));
    }
    /// The memory between the elements has never been written.
    bool gaps_intact() const {
        Array expected(shape, stride);
        each(shape, [&](const Index &i) { expected(i) = (*this)(i); });
        return same_memory(expected);
    }

private:
    int64_t origin = 0;
    std::vector<float> memory;

    int64_t offset(const Index &index) const {
        int64_t n = origin;
        for (size_t axis = 0; axis < index.size(); axis++) n += index[axis] * stride[axis];
        return n;
    }
    static float filler() {
        const uint32_t bits = 0x7fc0beef;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
};

/// Of axis `axis` only from .. from + length - 1.
inline Array slice(const Array &a, int axis, int64_t from, int64_t length) {
    Index shape = a.shape;
    shape[axis] = length;
    Array b(shape);
    Index there = shape;  // not one for each element: allocations take longer than copies
    each(shape, [&](const Index &i) {
        there = i, there[axis] += from;
        b(i) = a(there);
    });
    return b;
}

/// The same bits in every element.
inline bool same_bits(const Array &a, const Array &b) {
    const std::vector<float> x = a.values(), y = b.values();
    return x.size() == y.size() && (x.empty() || !std::memcmp(x.data(), y.data(), x.size() * sizeof(float)));
}

/// Address space without memory behind it, until a page is written.
class Reserved {
public:
    explicit Reserved(size_t bytes) : bytes(bytes) {
        memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    Reserved(const Reserved &) = delete;
    ~Reserved() {
        if (*this) munmap(memory, bytes);
    }
    explicit operator bool() const { return memory != MAP_FAILED; }
    float *floats() const { return (float *)memory; }

private:
    size_t bytes;
    void *memory;
};

}  // namespace test

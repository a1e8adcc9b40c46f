// Orders of the features of an expanded key: how states come in and go out. Kernels know the tight one alone.
#pragma once
#include "holdfast/holdfast.h"

#include <cstdint>

namespace holdfast {

/// D; more than `most` where it is larger than that.
int64_t expanded_size(int64_t K, int degree, holdfast_expansion expansion, int64_t most);

/// A head's state, or its sum of keys with one column: element (f, e) is data[f * row + e * column].
struct Features {
    float *data;
    int64_t row, column;
    float &operator()(int64_t f, int64_t e) const { return data[f * row + e * column]; }
};

/// What is converted: states and sums of keys, or gradients by them, by the transpose of the way back.
enum class Of { states, gradients };

/// Copy `columns` columns from the one order to the other; K is looked at where they differ, and the degree is then 2. No memory is
/// shared.
void convert(const Features &from, holdfast_expansion order, const Features &to, holdfast_expansion wanted, int64_t D,
             int64_t K, int64_t columns, Of of = Of::states);

}  // namespace holdfast

// What every public function does with a bad argument.
#pragma once
#include "../forward.h"

#include <vector>

namespace test {

/// run() of the call on the context, spoilt, gives the status and text of `bad`, says what was expected, and has written and announced nothing.
template<class Case, class Call, class Run>
void expect_refused(const Case &bad, const Context &context, Call &call, const Run &run) {
    bad.spoil(call);
    std::vector<Array> before;
    for (const Array *array : call.arrays()) before.push_back(*array);
    EXPECT_EQ(run(), bad.status) << context.error();
    EXPECT_NE(context.error().find(bad.text), std::string::npos) << context.error() << "\nexpected: ..." << bad.text << "...";
    EXPECT_NE(context.error().find("; expected "), std::string::npos) << context.error();
    for (size_t n = 0; n < before.size(); n++)
        EXPECT_TRUE(call.arrays()[n]->same_memory(before[n])) << "array " << n << " was written";
    EXPECT_TRUE(context.messages.empty()) << context.messages[0];
}

}  // namespace test

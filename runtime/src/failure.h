// How the library's own code reports a failure: thrown inside, turned into a status and a text at the C boundary.
#pragma once
#include "holdfast/holdfast.h"

#include <sstream>
#include <string>

namespace holdfast {

struct Failure {
    holdfast_status status;
    std::string text;
};

/// Throw a Failure whose text is `parts` one after the other.
template<class... Parts>
[[noreturn]] void fail(holdfast_status status, const Parts &...parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw Failure{status, text.str()};
}

}  // namespace holdfast

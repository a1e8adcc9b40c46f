// Backends whose tests may not be skipped.
#pragma once
#include <cstdlib>
#include <sstream>
#include <string>

namespace test {

/// HOLDFAST_REQUIRED_BACKENDS, names separated by spaces, has that one.
inline bool required(const std::string &backend) {
    const char *list = std::getenv("HOLDFAST_REQUIRED_BACKENDS");
    std::istringstream names(list ? list : "");
    for (std::string name; names >> name;)
        if (name == backend) return true;
    return false;
}

}  // namespace test

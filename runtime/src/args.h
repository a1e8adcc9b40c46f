// Structs of arguments that grow at their ends.
#pragma once
#include "failure.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace holdfast {

/// The caller's struct in this version's layout, whatever version it was compiled against.
template<class Args>
Args checked_args(const Args *args, const char *type, size_t first_version) {
    if (!args) fail(HOLDFAST_INVALID_ARGUMENT, "args is NULL; expected a ", type);
    const size_t size = args->struct_size;
    if (size < first_version)
        fail(HOLDFAST_INVALID_ARGUMENT, "args.struct_size is ", size, "; expected sizeof(", type, "), at least ",
             first_version);
    for (size_t n = sizeof *args; n < size; n++)
        if (((const unsigned char *)args)[n])
            fail(HOLDFAST_UNSUPPORTED, "args.struct_size is ", size, " and byte ", n, " is not zero; expected zeros past byte ",
                 sizeof *args, ": this version does not know that option");
    Args copy{};
    std::memcpy(&copy, args, std::min(size, sizeof copy));
    return copy;
}

}  // namespace holdfast

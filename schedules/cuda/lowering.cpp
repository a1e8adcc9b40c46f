// How a pass gives up.
#include "lowering.h"

namespace holdfast::cuda {

void fail(const std::string &where, const std::string &why) {
    _halide_user_error << "holdfast: CUDA: " << where << ": " << why << "\n";
    std::abort();
}

}  // namespace holdfast::cuda

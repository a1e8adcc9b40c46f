// Every GPU API.
#include "../../generators/clear.h"
#include "../schedule.h"
#include "elements.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(ClearFuncs &f, const ClearSizes &, const Target &) { gpu::thread_per_element(f.cleared); }

bool matches(const Target &t, const ClearSizes &) { return t.has_gpu_feature(); }

const bool added = Schedule<ClearFuncs, ClearSizes>::add({"gpu", 0, matches, apply});
}  // namespace

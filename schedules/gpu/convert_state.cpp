// Every GPU API.
#include "../../generators/expansion.h"
#include "../schedule.h"
#include "elements.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(ConvertStateFuncs &f, const ConvertStateSizes &, const Target &) { gpu::thread_per_element(f.converted); }

bool matches(const Target &t, const ConvertStateSizes &) { return t.has_gpu_feature(); }

const bool added = Schedule<ConvertStateFuncs, ConvertStateSizes>::add({"gpu", 0, matches, apply});
}  // namespace

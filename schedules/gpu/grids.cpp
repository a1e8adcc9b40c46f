// Grids that a device may not take. Vulkan promises 2^16 - 1 blocks along each axis, and kernels have more along the first, where
// pieces of states and of rows lie: here a pass over the final IR of a pipeline launches such a kernel several times, for some of
// its blocks each. Along the other axes lie heads, batch entries and tokens, of which the runtime gives a call no more than CUDA
// takes too (most_blocks of runtime/src/gpu.h).
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace Halide::Internal;

constexpr int most = (1 << 16) - 1;

/// In one kernel: its first axis goes on from block `begin`.
class From : public IRMutator {
    using IRMutator::visit;
    const Expr begin;

    Stmt visit(const For *op) override {
        if (op->for_type != ForType::GPUBlock || !ends_with(op->name, "block_id_x")) return IRMutator::visit(op);
        blocks = op->extent;
        return For::make(op->name, op->min, min(blocks - begin, most), op->for_type, op->partition_policy, op->device_api,
                         substitute(op->name, Variable::make(Int(32), op->name) + begin, op->body));
    }

public:
    explicit From(const Expr &begin) : begin(begin) {}
    Expr blocks;  // all of them
};

class SeveralLaunches : public IRMutator {
    using IRMutator::visit;

    Stmt visit(const For *op) override {
        if (op->for_type != ForType::GPUBlock) return IRMutator::visit(op);
        const std::string launch = unique_name("launch");
        From from(Variable::make(Int(32), launch) * most);
        const Stmt kernel = from.mutate(op);
        _halide_user_assert(from.blocks.defined()) << op->name << " has no first axis\n";
        const Expr launches = simplify((from.blocks + (most - 1)) / most);
        if (is_const_one(launches)) return op;
        return For::make(launch, 0, launches, ForType::Serial, Partition::Auto, DeviceAPI::None, kernel);
    }
};

bool matches(const Target &t) { return t.has_feature(Target::Vulkan); }

void add_passes(Pipeline pipeline, const Target &) { pipeline.add_custom_lowering_pass(new SeveralLaunches); }

const bool added = holdfast::Lowering::add({60, matches, add_passes});
}  // namespace

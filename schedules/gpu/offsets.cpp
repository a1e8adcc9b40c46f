// Buffers that begin anywhere in memory that has no addresses. OpenCL, Metal and Vulkan name a part of a buffer by an offset that is
// a multiple of up to 512 bytes, and a caller's tensor, or a token of it, need not begin there. Here a pass over the final IR of a
// pipeline adds an offset in elements to every index into a buffer of the caller; the host asks for it just before it
// launches the kernel (runtime/src/buffer_offset.cpp). The bounds of a buffer cannot say it: where they begin, so does the memory.
#include "../schedule.h"

#include <set>
#include <string>

namespace {
using namespace Halide;
using namespace Halide::Internal;

class Offsets : public IRMutator {
    using IRMutator::visit;
    Scope<> allocated;  // buffers of the pipeline itself
    bool in_kernel = false;
    std::set<std::string> found;  // the others, in this kernel

    bool has_offset(const std::string &buffer) const { return in_kernel && !allocated.contains(buffer); }
    Expr shifted(const std::string &buffer, const Expr &index) {
        found.insert(buffer);
        Expr offset = Variable::make(Int(32), buffer + ".offset");
        if (index.type().is_vector()) offset = Broadcast::make(offset, index.type().lanes());
        return simplify(mutate(index) + offset);  // of a ramp, to its base: it stays one
    }
    Expr visit(const Load *op) override {
        if (!has_offset(op->name) || op->image.defined()) return IRMutator::visit(op);
        return Load::make(op->type, op->name, shifted(op->name, op->index), op->image, op->param, mutate(op->predicate),
                          ModulusRemainder());
    }
    Stmt visit(const Store *op) override {
        if (!has_offset(op->name)) return IRMutator::visit(op);
        return Store::make(op->name, mutate(op->value), shifted(op->name, op->index), op->param, mutate(op->predicate),
                           ModulusRemainder());
    }
    Stmt visit(const Allocate *op) override {
        ScopedBinding<> bind(allocated, op->name);
        return IRMutator::visit(op);
    }
    Stmt visit(const For *op) override {
        if (in_kernel || op->for_type != ForType::GPUBlock) return IRMutator::visit(op);
        in_kernel = true, found.clear();
        Stmt kernel = IRMutator::visit(op);
        in_kernel = false;
        for (const std::string &buffer : found) {
            const Expr pointer = Variable::make(type_of<halide_buffer_t *>(), buffer + ".buffer");
            kernel = LetStmt::make(buffer + ".offset", Call::make(Int(32), "holdfast_buffer_offset", {pointer}, Call::Extern),
                                   kernel);
        }
        return kernel;
    }
};

bool matches(const Target &t) {
    return t.has_feature(Target::OpenCL) || t.has_feature(Target::Metal) || t.has_feature(Target::Vulkan);
}

void add_passes(Pipeline pipeline, const Target &) { pipeline.add_custom_lowering_pass(new Offsets); }

const bool added = holdfast::Lowering::add({50, matches, add_passes});
}  // namespace

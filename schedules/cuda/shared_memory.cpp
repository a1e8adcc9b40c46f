// Shared memory: where it begins, and copies into it.
#include "lowering.h"

namespace holdfast::cuda {
namespace {

// Halide addresses shared memory from absolute address zero, but a block's own begins behind what the driver keeps for itself:
// 1 KB from sm_90 on. Everything moves up by so much; allocations of one lifetime share a name, whatever their types.
class ShiftShared : public KernelMutator {
    using KernelMutator::visit;
    static constexpr int reserved = 1024;

    Stmt visit(const Allocate *op) override {
        if (!in_kernel || op->memory_type != MemoryType::GPUShared) return KernelMutator::visit(op);
        if (op->extents.size() != 1) fail(op->name, "shared allocation of more than one extent");
        memory[op->name] = op->memory_type;
        Stmt body = mutate(op->body);
        memory.erase(op->name);
        const Expr extent = simplify(op->extents[0] + reserved / op->type.bytes());
        return Allocate::make(op->name, op->type, op->memory_type, {extent}, op->condition, body);
    }
    static Expr shift(const Expr &index, const Type &type) {
        const int by = reserved / type.bytes();
        if (const Ramp *r = index.as<Ramp>()) return Ramp::make(simplify(r->base + by), r->stride, r->lanes);
        return simplify(index + make_const(index.type(), by));
    }
    Stmt visit(const Store *op) override {
        if (!is_shared(op->name)) return IRMutator::visit(op);
        const Type type = op->value.type().element_of();
        return Store::make(op->name, mutate(op->value), shift(mutate(op->index), type), op->param, mutate(op->predicate),
                           op->alignment + reserved / type.bytes());
    }
    Expr visit(const Load *op) override {
        if (!is_shared(op->name)) return IRMutator::visit(op);
        const Type type = op->type.element_of();
        return Load::make(op->type, op->name, shift(mutate(op->index), type), op->image, op->param, mutate(op->predicate),
                          op->alignment + reserved / type.bytes());
    }
};

// Halide ends each stage in shared memory with a barrier, and each barrier will wait for its stage's copies. One is too many
// where nothing touches shared memory up to the next one; and where nothing reads it since the last one nor up to the next:
// what is only written, to places that are all read later, does not meet. Several operands are then on their way at once.
class MergeBarriers : public KernelMutator {
    using KernelMutator::visit;

    // What happens in a kernel, in order. Loops begin and end with a read, so that theirs stay apart from the rest.
    enum Event { read, write, barrier, barrier_of_device_memory };
    struct Events : IRVisitor {
        const MergeBarriers &self;
        std::vector<Event> list;
        explicit Events(const MergeBarriers &self) : self(self) {}
        using IRVisitor::visit;
        void visit(const Load *op) override {
            IRVisitor::visit(op);
            if (self.shared.count(op->name)) list.push_back(read);
        }
        void visit(const Store *op) override {
            IRVisitor::visit(op);
            if (self.shared.count(op->name)) list.push_back(write);
        }
        void visit(const Call *op) override {
            IRVisitor::visit(op);
            if (starts_with(op->name, "holdfast_ldmatrix")) list.push_back(read);
            if (!op->is_intrinsic(Call::gpu_thread_barrier)) return;
            const auto fences = as_const_int(op->args[0]);
            list.push_back(fences && !(*fences & CodeGen_GPU_Dev::MemoryFenceType::Device) ? barrier
                                                                                           : barrier_of_device_memory);
        }
        void visit(const For *op) override {
            list.push_back(read);
            IRVisitor::visit(op);
            list.push_back(read);
        }
    };
    struct SharedNames : IRVisitor {
        std::set<std::string> names;
        using IRVisitor::visit;
        void visit(const Allocate *op) override {
            if (op->memory_type == MemoryType::GPUShared) names.insert(op->name);
            IRVisitor::visit(op);
        }
    };
    std::set<std::string> shared;
    std::vector<bool> needed;  // of each barrier, in order
    size_t next = 0;

    Stmt leave_kernel(Stmt s) override {
        SharedNames names;
        s.accept(&names);
        shared = names.names;
        // The loops over threads around all stages are no loops in this sense.
        Events events(*this);
        struct Enter : IRVisitor {
            Events &events;
            bool entered = false;
            explicit Enter(Events &events) : events(events) {}
            using IRVisitor::visit;
            void visit(const For *op) override {
                if (is_thread(op) && ends_with(op->name, "thread_id_x") && !entered) {
                    entered = true;
                    op->body.accept(&events);
                } else if (!entered) {
                    IRVisitor::visit(op);
                }
            }
        } enter(events);
        s.accept(&enter);
        needed.clear(), next = 0;
        bool reads = false;  // since the last barrier that stays
        for (size_t i = 0; i < events.list.size(); i++) {
            if (events.list[i] == read) reads = true;
            if (events.list[i] < barrier) continue;
            bool reads_after = false, writes_after = false;
            size_t after = i + 1;
            for (; after < events.list.size() && events.list[after] < barrier; after++)
                (events.list[after] == read ? reads_after : writes_after) = true;
            const bool idle = !reads_after && !writes_after, written = !reads && !reads_after && after < events.list.size();
            needed.push_back(events.list[i] == barrier_of_device_memory || !(idle || written));
            if (needed.back()) reads = false;
        }
        return Drop(*this).mutate(s);
    }
    struct Drop : IRMutator {
        MergeBarriers &self;
        explicit Drop(MergeBarriers &self) : self(self) {}
        using IRMutator::visit;
        Stmt visit(const Evaluate *op) override {
            if (!is_barrier(op)) return IRMutator::visit(op);
            return self.next < self.needed.size() && !self.needed[self.next++] ? Evaluate::make(0) : Stmt(op);
        }
    };
};

// 16-byte copies from global to shared memory become cp.async, which the barrier after them waits for.
class AsyncCopy : public KernelMutator {
    using KernelMutator::visit;
    std::set<std::string> devptrs;
    bool pending = false;
    Scope<ModulusRemainder> multiples;  // what the kernel's caller has been asked for: strides that are multiples of n

    Stmt visit(const AssertStmt *op) override {
        const EQ *eq = op->condition.as<EQ>();
        const Mod *mod = eq && is_const_zero(eq->b) ? eq->a.as<Mod>() : nullptr;
        const Variable *v = mod ? mod->a.as<Variable>() : nullptr;
        auto n = mod ? as_const_int(mod->b) : std::nullopt;
        if (v && n) multiples.push(v->name, ModulusRemainder(*n, 0));
        return IRMutator::visit(op);
    }

    static Expr ext_call(const std::string &n, std::vector<Expr> a = {}) { return Call::make(Int(32), n, a, Call::Extern); }
    static Stmt ev(Expr e) { return Evaluate::make(e); }

    Stmt visit(const Store *op) override {
        const Load *l = op->value.as<Load>();
        const Ramp *rs = op->index.as<Ramp>(), *rl = l ? l->index.as<Ramp>() : nullptr;
        int bytes = op->value.type().bytes() * op->value.type().lanes();
        if (in_kernel && l && rs && rl && is_shared(op->name) && !memory.count(l->name) && bytes == 16 &&
            is_const_one(rs->stride) && is_const_one(rl->stride) && is_const_one(op->predicate) && is_const_one(l->predicate)) {
            int b = op->value.type().bytes();
            auto aligned = [&](const Expr &first) {
                const ModulusRemainder start = modulus_remainder(simplify(inline_lets(first) * b), multiples);
                return start.modulus % 16 == 0 && start.remainder % 16 == 0;
            };
            if (!aligned(rs->base) || !aligned(rl->base)) {
                // Schedules for all GPUs have vectors of 4 at most, and no such promise.
                if (rs->lanes <= 4) return IRMutator::visit(op);
                fail(l->name, text("rows do not start at 16-byte boundaries for sure: element ", rl->base,
                                   "\n  Ask for strides that are multiples of 16 bytes (row_alignment)."));
            }
            devptrs.insert(l->name);
            pending = true;
            Expr src = Variable::make(UInt(64), l->name + ".device") + cast<uint64_t>(cast<int64_t>(rl->base) * b);
            return ev(ext_call("holdfast_cp_async_16", {simplify(rs->base * b), src}));
        }
        return IRMutator::visit(op);
    }
    Stmt visit(const Evaluate *op) override {
        if (pending && is_barrier(op)) {
            pending = false;
            return Block::make({ev(ext_call("holdfast_cp_async_commit")), ev(ext_call("holdfast_cp_async_wait_0")), op});
        }
        return IRMutator::visit(op);
    }
    Stmt leave_kernel(Stmt s) override {
        for (auto &n : devptrs) {
            Expr buf = Variable::make(type_of<halide_buffer_t *>(), n + ".buffer");
            s = LetStmt::make(n + ".device", Call::make(UInt(64), "_halide_buffer_get_device", {buf}, Call::Extern), s);
        }
        devptrs.clear();
        return s;
    }
};

}  // namespace

Pass shift_shared() { return std::make_unique<ShiftShared>(); }
Pass merge_barriers() { return std::make_unique<MergeBarriers>(); }
Pass copy_async() { return std::make_unique<AsyncCopy>(); }

}  // namespace holdfast::cuda

// Shared memory: where it begins, how it is addressed, and copies into it that run ahead.
#include "lowering.h"

namespace holdfast::cuda {
namespace {

// (32 z + e) % 96 with 0 <= e < 32 is 32 (z % 3) + e: indices into folded storage become linear in a tile.
class FoldModulo : public KernelMutator {
    using KernelMutator::visit;
    Scope<Interval> scope;
    Stmt visit_loop(const For *op) override {
        auto e = as_const_int(op->extent);
        if (!e || !is_const_zero(op->min)) return IRMutator::visit(op);
        ScopedBinding<Interval> b(scope, op->name, Interval(0, (int)*e - 1));
        return IRMutator::visit(op);
    }
    Expr visit(const Mod *op) override {
        auto c = as_const_int(op->b);
        if (!in_kernel || op->type != Int(32) || !c) return IRMutator::visit(op);
        Linear l(simplify(inline_lets(op->a)));
        for (int64_t g = *c; g > 1; g--) {  // the largest tile that works
            if (*c % g) continue;
            Expr big = 0, small = 0;
            for (auto &x : l.terms) {
                int64_t whole = x.second % g == 0 ? x.second : is_const_one(x.first) ? x.second - mod_imp(x.second, g) : 0;
                if (whole) big += x.first * (int)(whole / g);
                if (x.second - whole) small += x.first * (int)(x.second - whole);
            }
            Interval i = bounds_of_expr_in_scope(simplify(small), scope);
            if (!i.is_bounded() || !can_prove(i.min >= 0) || !can_prove(i.max < (int)g)) continue;
            return simplify((g == *c ? Expr(0) : (big % (int)(*c / g)) * (int)g) + small);
        }
        return IRMutator::visit(op);
    }
};

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

// 16-byte copies from global to shared memory become cp.async. A serial loop of such copies and a consumer is software-
// pipelined over as many buffers as the schedule folded the storage into (Func::fold_storage).
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
    struct Item {
        std::string let;
        Expr value;
        Stmt stmt;
    };
    static void flatten(const Stmt &s, std::vector<Item> &out) {
        if (const LetStmt *l = s.as<LetStmt>()) {
            out.push_back({l->name, l->value, Stmt()});
            flatten(l->body, out);
        } else if (const Block *b = s.as<Block>()) {
            flatten(b->first, out);
            flatten(b->rest, out);
        } else if (const ProducerConsumer *p = s.as<ProducerConsumer>())
            flatten(p->body, out);
        else
            out.push_back({"", Expr(), s});
    }
    static Stmt nest(const std::vector<Item> &v, const std::function<bool(const Item &)> &keep) {
        Stmt r;
        for (size_t i = v.size(); i-- > 0;) {
            if (!v[i].let.empty()) {
                if (r.defined()) r = LetStmt::make(v[i].let, v[i].value, r);
            } else if (keep(v[i]))
                r = r.defined() ? Block::make(v[i].stmt, r) : v[i].stmt;
        }
        return r;
    }
    static bool is_copy(const Stmt &s) {
        const Evaluate *e = s.as<Evaluate>();
        const Call *c = e ? e->value.as<Call>() : nullptr;
        return c && c->name == "holdfast_cp_async_16";
    }
    static bool is_async(const Stmt &s) {
        const Evaluate *e = s.as<Evaluate>();
        const Call *c = e ? e->value.as<Call>() : nullptr;
        return c && starts_with(c->name, "holdfast_cp_async");
    }
    Stmt visit_loop(const For *op) override {
        Stmt s = IRMutator::visit(op);
        const For *f = s.as<For>();
        if (!f || f->for_type != ForType::Serial || threads.empty()) return s;
        std::vector<Item> items;
        flatten(f->body, items);
        int ncopy = 0;
        size_t last = 0, lastb = 0;
        for (size_t i = 0; i < items.size(); i++) {
            if (items[i].stmt.defined() && is_copy(items[i].stmt)) {
                ncopy++;
                last = i;
            }
            if (items[i].stmt.defined() && is_barrier(items[i].stmt)) lastb = i;
        }
        if (!ncopy) return s;
        // as many buffers as the schedule folded the storage into
        struct Buffers : IRGraphVisitor {
            std::string loop;
            int n = 0;
            using IRGraphVisitor::visit;
            void visit(const Mod *op) override {
                auto c = as_const_int(op->b);
                const Variable *v = op->a.as<Variable>();
                if (c && v && v->name == loop) {
                    if (n && n != *c) fail(loop, "operands staged with different numbers of buffers");
                    n = (int)*c;
                }
                IRGraphVisitor::visit(op);
            }
        } buffers;
        buffers.loop = f->name;
        f->body.accept(&buffers);
        int stages = buffers.n;
        if (stages < 2) return s;
        // drop commit/wait/barrier up to the first barrier after the last copy, and the trailing barrier
        size_t first_consume = last + 1;
        while (first_consume < items.size() && !(items[first_consume].stmt.defined() && is_barrier(items[first_consume].stmt)))
            first_consume++;
        for (size_t i = 0; i <= last; i++)
            if (items[i].stmt.defined() && !is_copy(items[i].stmt) && !is_barrier(items[i].stmt) && !is_async(items[i].stmt))
                fail(f->name, text("cannot pipeline past ", items[i].stmt));
        std::vector<Item> cons = items;
        for (size_t i = 0; i <= first_consume && i < cons.size(); i++)
            if (cons[i].stmt.defined()) cons[i].stmt = Stmt();
        if (lastb + 1 == items.size()) cons[lastb].stmt = Stmt();
        Stmt copies = nest(items, [](const Item &i) { return is_copy(i.stmt); });
        Stmt consume = nest(cons, [](const Item &i) { return i.stmt.defined(); });
        Expr z = Variable::make(Int(32), f->name);
        Expr end = f->min + f->extent;
        auto issue = [&](Expr zz) {
            Stmt c = substitute(f->name, zz, copies);
            return Block::make(IfThenElse::make(zz < end, c), ev(ext_call("holdfast_cp_async_commit")));
        };
        Stmt pro;
        for (int i = stages - 2; i >= 0; i--) pro = pro.defined() ? Block::make(issue(f->min + i), pro) : issue(f->min + i);
        Stmt bar = ev(Call::make(Int(32), Call::gpu_thread_barrier, {IntImm::make(Int(32), 2)}, Call::Intrinsic));
        Stmt body = Block::make(
            {ev(ext_call("holdfast_cp_async_wait_" + std::to_string(stages - 2))), bar, issue(z + (stages - 1)), consume});
        Stmt loop = For::make(f->name, f->min, f->extent, f->for_type, f->partition_policy, f->device_api, body);
        return Block::make(pro, loop);
    }
};

}  // namespace

Pass fold_modulo() { return std::make_unique<FoldModulo>(); }
Pass shift_shared() { return std::make_unique<ShiftShared>(); }
Pass merge_barriers() { return std::make_unique<MergeBarriers>(); }
Pass copy_async() { return std::make_unique<AsyncCopy>(); }

}  // namespace holdfast::cuda

// Barriers in kernels. Halide puts one between all stages that the threads of a block make together, and at the end of each serial
// loop over such. Many order nothing: between two stages that know nothing of one another, or before another barrier. Here those
// are taken out, in every kernel of a GPU but CUDA's, which has passes of its own (schedules/cuda), one after the other, as long as
// of all accesses to a place in memory that some barrier kept apart, one of which writes, a barrier still does. So tests can ask of
// each that is left that it be needed (tests/fakemetal/barriers.py).
//
// Places are ranges of indices of a buffer: stages that are there at the same time share one allocation. Only buffers that the
// kernel itself writes, and that are not a thread's own, count. What is not seen through, calls that do more than compute, is
// taken for an access to everything.
#include "../schedule.h"

#include <functional>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace {
using namespace Halide;
using namespace Halide::Internal;

enum Kind : int64_t { device = 1, shared = 2 };  // bits of a barrier's mask: whose stores it makes seen

struct Access {
    std::string buffer;  // "": any
    int64_t first, last;
    Kind kind;
    bool writes;

    bool conflicts(const Access &with) const {
        if (!writes && !with.writes) return false;
        if (buffer.empty() || with.buffer.empty()) return true;
        return buffer == with.buffer && first <= with.last && with.first <= last;
    }
    bool operator<(const Access &a) const {
        return std::tie(buffer, first, last, kind, writes) < std::tie(a.buffer, a.first, a.last, a.kind, a.writes);
    }
};

/// What a kernel does, as far as it matters here.
struct Step {
    enum { access, barrier, loop, choice } what;
    Access accessed = {};
    int64_t mask = 0;
    bool kept = true;                   // a barrier
    std::vector<Step> body, otherwise;  // of a loop, of a choice
};

/// The buffers that a kernel writes, without those of a thread.
class Written : public IRVisitor {
    using IRVisitor::visit;
    void visit(const Store *op) override {
        names.insert(op->name);
        IRVisitor::visit(op);
    }
    void visit(const Allocate *op) override {
        IRVisitor::visit(op);
        if (op->memory_type == MemoryType::GPUShared)
            in_shared.insert(op->name);
        else
            names.erase(op->name);
    }

public:
    std::set<std::string> names, in_shared;
};

class Steps : public IRVisitor {
    using IRVisitor::visit;
    const Written &written;
    Scope<Interval> bounds;            // of threads and loops
    std::map<std::string, Expr> lets;  // in terms of those

    void add(const std::string &name, const Expr &index, bool writes) {
        if (!written.names.count(name)) return;
        const Interval range = within(index);
        const auto first = as_const_int(range.min), last = as_const_int(range.max);
        using limits = std::numeric_limits<int64_t>;
        list->push_back({Step::access,
                         {name, first ? *first : limits::min(), last ? *last : limits::max(),
                          written.in_shared.count(name) ? shared : device, writes}});
    }
    /// Constants, or infinities.
    Interval within(const Expr &e) const {
        if (e.type().element_of() != Int(32)) return Interval::everything();
        const Expr whole = simplify(substitute(lets, e));
        const Interval range = bounds_of_expr_in_scope(whole, bounds, FuncValueBounds(), true);
        return {simplify(range.min), simplify(range.max)};
    }
    void add_anything() {
        for (Kind kind : {device, shared}) list->push_back({Step::access, {"", 0, 0, kind, true}});
    }
    std::vector<Step> steps_of(const Stmt &stmt) {
        std::vector<Step> steps, *const outer = list;
        list = &steps;
        if (stmt.defined()) stmt.accept(this);
        list = outer;
        return steps;
    }

    void visit(const Load *op) override {
        IRVisitor::visit(op);
        add(op->name, op->index, false);
    }
    void visit(const Store *op) override {
        IRVisitor::visit(op);
        add(op->name, op->index, true);
    }
    void visit(const Call *op) override {
        if (op->is_intrinsic(Call::gpu_thread_barrier)) {
            const auto mask = as_const_int(op->args[0]);
            list->push_back({Step::barrier, {}, mask ? *mask : 0});
            return;
        }
        IRVisitor::visit(op);
        if (!op->is_pure()) add_anything();
    }
    void visit(const Let *op) override { let(op); }
    void visit(const LetStmt *op) override { let(op); }
    template<class T>
    void let(const T *op) {
        op->value.accept(this);
        if (op->value.type() == Int(32) || op->value.type() == Bool()) lets[op->name] = substitute(lets, op->value);
        op->body.accept(this);
        lets.erase(op->name);
    }
    void visit(const For *op) override {
        op->min.accept(this), op->extent.accept(this);
        ScopedBinding<Interval> bind(bounds, op->name, {within(op->min).min, within(op->min + op->extent - 1).max});
        std::vector<Step> body = steps_of(op->body);
        if (op->for_type == ForType::Serial)
            list->push_back({Step::loop, {}, 0, true, std::move(body)});
        else
            list->insert(list->end(), body.begin(), body.end());
    }
    void visit(const IfThenElse *op) override {
        op->condition.accept(this);
        const std::vector<Step> otherwise = steps_of(op->else_case);
        Step choice{Step::choice, {}, 0, true, {}, otherwise};
        where(substitute(lets, op->condition), [&] { choice.body = steps_of(op->then_case); });
        list->push_back(std::move(choice));
    }
    /// Visit what is done where a condition holds: threads have numbers below something there.
    void where(const Expr &condition, const std::function<void()> &visit) {
        if (const And *both = condition.as<And>()) return where(both->a, [&] { where(both->b, visit); });
        const LT *less = condition.as<LT>();
        const Variable *thread = less ? less->a.as<Variable>() : nullptr;
        if (!thread || !bounds.contains(thread->name)) return visit();
        const Interval range = bounds.get(thread->name);
        const auto end = as_const_int(within(less->b - 1).max), last = as_const_int(range.max);
        if (!end || (last && *last < *end)) return visit();
        ScopedBinding<Interval> bind(bounds, thread->name, {range.min, within(less->b - 1).max});
        visit();
    }
    void visit(const Atomic *op) override {
        add_anything();
        IRVisitor::visit(op);
    }

public:
    std::vector<Step> *list;
    explicit Steps(const Written &written) : written(written) {}
};

/// Follows the steps, along all ways at once.
class Order {
    struct Accesses {
        std::set<Access> here;    // since the last barrier, kept or not
        std::set<Access> before;  // before that, with none kept in between
        void join(const Accesses &a) {
            here.insert(a.here.begin(), a.here.end());
            before.insert(a.before.begin(), a.before.end());
        }
        size_t size() const { return here.size() + before.size(); }
    } state;

    void follow(const Step &step) {
        switch (step.what) {
        case Step::access:
            for (const Access &a : state.before) good &= !a.conflicts(step.accessed);
            state.here.insert(step.accessed);
            return;
        case Step::barrier:
            state.before.insert(state.here.begin(), state.here.end());
            state.here.clear();
            for (auto a = state.before.begin(); step.kept && a != state.before.end();)
                a = !a->writes || (a->kind & step.mask) ? state.before.erase(a) : std::next(a);
            return;
        case Step::loop:
            for (bool more = true; more && good;) {
                const Accesses start = state;
                follow(step.body);
                state.join(start);
                more = state.size() > start.size();
            }
            return;
        case Step::choice:
            const Accesses start = state;
            follow(step.body);
            Accesses end = state;
            state = start;
            follow(step.otherwise);
            state.join(end);
        }
    }

public:
    bool good = true;
    void follow(const std::vector<Step> &steps) {
        for (const Step &step : steps)
            if (good) follow(step);
    }
};

void find_barriers(std::vector<Step> &steps, std::vector<Step *> &barriers) {
    for (Step &step : steps) {
        if (step.what == Step::barrier) barriers.push_back(&step);
        find_barriers(step.body, barriers), find_barriers(step.otherwise, barriers);
    }
}

class IdleBarriers : public IRMutator {
    using IRMutator::visit;
    std::vector<Step *> barriers;
    size_t next = 0;
    bool in_kernel = false;

    Stmt visit(const For *op) override {
        if (in_kernel || op->for_type != ForType::GPUBlock) return IRMutator::visit(op);
        Written written;
        op->accept(&written);
        std::vector<Step> all;
        Steps steps(written);
        steps.list = &all;
        op->accept(&steps);
        find_barriers(all, barriers);
        // A kernel that does not pass with all of them does what is not seen through here: it is left as it is.
        auto right = [&] {
            Order order;
            order.follow(all);
            return order.good;
        };
        if (right())
            for (Step *barrier : barriers) {
                barrier->kept = false;
                barrier->kept = !right();
            }
        in_kernel = true, next = 0;
        Stmt kernel = IRMutator::visit(op);
        in_kernel = false, barriers.clear();
        return kernel;
    }
    Stmt visit(const Evaluate *op) override {
        const Call *call = op->value.as<Call>();
        if (!in_kernel || !call || !call->is_intrinsic(Call::gpu_thread_barrier)) return IRMutator::visit(op);
        return barriers[next++]->kept ? Stmt(op) : Evaluate::make(0);
    }
};

bool matches(const Target &t) { return t.has_gpu_feature() && !t.has_feature(Target::CUDA); }

void add_passes(Pipeline pipeline, const Target &) { pipeline.add_custom_lowering_pass(new IdleBarriers); }

const bool added = holdfast::Lowering::add({20, matches, add_passes});
}  // namespace

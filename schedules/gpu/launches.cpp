// Kernels with nothing to do: of a result that is not wanted, of no heads of queries. Halide launches them, which some APIs refuse, and
// asks for memory of no bytes between them, which others do. Here the host looks at the extents of a kernel's loops, and at
// conditions around all that it does, as far as they are numbers that the host has, before it launches one; and memory between
// kernels has an element at least. An axis of a caller's buffer without elements is not asked to hold the first one, which Halide finds
// to be looked at where a loop over it is part of a larger one.
#include "../schedule.h"

#include <set>
#include <string>
#include <vector>

namespace {
using namespace Halide;
using namespace Halide::Internal;

class Launches : public IRMutator {
    using IRMutator::visit;

    /// What has to hold for a kernel to do anything.
    struct Needed : IRVisitor {
        std::vector<Expr> conditions;
        using IRVisitor::visit;
        void visit(const For *op) override {
            add(op->extent > 0);
            inside.insert(op->name);
            op->body.accept(this);
        }
        void visit(const LetStmt *op) override {
            inside.insert(op->name);
            op->body.accept(this);
        }
        void visit(const IfThenElse *op) override {
            if (op->else_case.defined()) return;
            add(op->condition);
            op->then_case.accept(this);
        }
        void visit(const ProducerConsumer *op) override { op->body.accept(this); }
        void visit(const Allocate *op) override { op->body.accept(this); }
        void visit(const Block *) override {}

    private:
        std::set<std::string> inside;

        /// Whether the host has it: no variable of the kernel, and nothing in memory, which is a device's.
        bool known(const Expr &e) const {
            struct Visitor : IRVisitor {
                const std::set<std::string> &inside;
                bool known = true;
                explicit Visitor(const std::set<std::string> &inside) : inside(inside) {}
                using IRVisitor::visit;
                void visit(const Variable *op) override { known &= !inside.count(op->name); }
                void visit(const Load *) override { known = false; }
                void visit(const Call *op) override {
                    known &= op->is_pure();
                    IRVisitor::visit(op);
                }
            } visitor(inside);
            e.accept(&visitor);
            return visitor.known;
        }
        void add(const Expr &condition) {
            if (const And *both = condition.as<And>()) return add(both->a), add(both->b);
            const Expr needed = simplify(condition);
            if (!is_const_one(needed) && known(needed)) conditions.push_back(needed);
        }
    };

    Stmt visit(const For *op) override {
        if (op->for_type != ForType::GPUBlock) return IRMutator::visit(op);
        Needed needed;
        op->accept(&needed);
        Expr all = const_true();
        for (const Expr &condition : needed.conditions) all = all && condition;
        all = simplify(common_subexpression_elimination(all));
        return is_const_one(all) ? Stmt(op) : IfThenElse::make(all, op);
    }
    Stmt visit(const AssertStmt *op) override {
        const Expr whole = substitute_in_all_lets(op->message);
        const Call *message = whole.as<Call>();
        if (!message || message->name != "halide_error_access_out_of_bounds") return IRMutator::visit(op);
        const size_t count = message->args.size();  // the last are the first and the last element that there are
        return AssertStmt::make(op->condition || message->args[count - 1] < message->args[count - 2], op->message);
    }
    /// Of memory between kernels: minimum, extent, stride and flags of each axis.
    Expr visit(const Call *op) override {
        if (!op->is_intrinsic(Call::make_struct) || op->type != type_of<halide_dimension_t *>()) return IRMutator::visit(op);
        std::vector<Expr> axes = op->args;
        for (size_t extent = 1; extent < axes.size(); extent += 4) axes[extent] = simplify(max(axes[extent], 1));
        return Call::make(op->type, op->name, axes, op->call_type);
    }
};

bool matches(const Target &t) { return t.has_gpu_feature(); }

void add_passes(Pipeline pipeline, const Target &) { pipeline.add_custom_lowering_pass(new Launches); }

const bool added = holdfast::Lowering::add({5, matches, add_passes});
}  // namespace

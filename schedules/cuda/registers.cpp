// Funcs of a whole block in registers.
#include "lowering.h"

namespace holdfast::cuda {
namespace {

// Integer expressions over known variables.
struct Evaluator {
    std::map<std::string, int64_t> v;
    std::string problem;
    int64_t operator()(const Expr &e) {
        if (auto c = as_const_int(e)) return *c;
        if (const Variable *x = e.as<Variable>()) {
            auto it = v.find(x->name);
            if (it == v.end()) {
                problem = x->name;
                return 0;
            }
            return it->second;
        }
        auto two = [&](auto *op, auto f) { return f((*this)(op->a), (*this)(op->b)); };
        if (auto *op = e.as<Add>()) return two(op, [](int64_t a, int64_t b) { return a + b; });
        if (auto *op = e.as<Sub>()) return two(op, [](int64_t a, int64_t b) { return a - b; });
        if (auto *op = e.as<Mul>()) return two(op, [](int64_t a, int64_t b) { return a * b; });
        if (auto *op = e.as<Div>()) return two(op, [](int64_t a, int64_t b) { return div_imp(a, b); });
        if (auto *op = e.as<Mod>()) return two(op, [](int64_t a, int64_t b) { return mod_imp(a, b); });
        if (auto *op = e.as<Min>()) return two(op, [](int64_t a, int64_t b) { return std::min(a, b); });
        if (auto *op = e.as<Max>()) return two(op, [](int64_t a, int64_t b) { return std::max(a, b); });
        if (auto *op = e.as<Call>()) {
            if (op->is_intrinsic(Call::shift_left)) return (*this)(op->args[0]) << (*this)(op->args[1]);
            if (op->is_intrinsic(Call::shift_right)) return (*this)(op->args[0]) >> (*this)(op->args[1]);
            if (op->is_intrinsic(Call::bitwise_and)) return (*this)(op->args[0]) & (*this)(op->args[1]);
        }
        problem = text(e);
        return 0;
    }
};

// Func storage of a whole block in MemoryType::Register, addressed by plain coordinates, becomes registers of the lane
// that owns each element. Who owns what is read off the stores; every load must be by the owner.
class Privatize : public KernelMutator {
    using KernelMutator::visit;
    struct Ownership {
        std::map<int64_t, std::pair<int, int>> owner;
        int registers = 0;
    };  // address -> thread, register
    std::map<std::string, Ownership> owned;
    std::set<std::string> of_block;  // allocated outside the thread loops

    bool candidate(const std::string &n) const { return of_block.count(n) && !threads.empty(); }
    std::vector<int64_t> addresses(const std::string &name, const Expr &index) {
        Expr e = linear(inline_lets(index));
        Evaluator eval;
        std::vector<int64_t> r;
        int total = 1;
        for (auto &t : threads) total *= t.second;
        for (int t = 0; t < total; t++) {
            int rest = t;
            for (size_t d = threads.size(); d-- > 0;) {
                eval.v[threads[d].first] = rest % threads[d].second;
                rest /= threads[d].second;
            }
            r.push_back(eval(e));
            if (!eval.problem.empty())
                fail(name, text("the index into registers depends on ", eval.problem, ": ", e,
                                "\n  Every loop over registers must be unrolled and every extent constant (bound_extent)."));
        }
        return r;
    }
    int slot(const std::string &name, const Expr &index, bool store) {
        Ownership &o = owned[name];
        std::vector<int64_t> a = addresses(name, index);
        auto first = o.owner.find(a[0]);
        bool known = first != o.owner.end();
        if (!store && !known) fail(name, text("a register is read that no lane has written, at ", index));
        int reg = known ? first->second.second : o.registers++;
        for (int t = 0; t < (int)a.size(); t++) {
            auto it = o.owner.find(a[t]);
            if (it == o.owner.end() && store && !known) {
                o.owner[a[t]] = {t, reg};
                continue;
            }
            if (it == o.owner.end())
                fail(name, text("thread ", t, " touches element ", a[t], ", which no lane has written, at ", index));
            if (it->second.first != t)
                fail(name, text("element ", a[t], " is owned by thread ", it->second.first, " and ", store ? "written" : "read",
                                " by thread ", t, " (warp ", t / 32, ", lane ", t % 32, "), at ", index,
                                "\n  The stages that use this Func must have the same Fragments and orientation; otherwise "
                                "store it in shared memory."));
            if (it->second.second != reg) fail(name, text("lanes keep one element in different registers, at ", index));
        }
        return reg;
    }
    std::vector<int> slots(const std::string &name, const Expr &index, bool store) {
        const Ramp *r = index.as<Ramp>();
        int lanes = index.type().lanes();
        if (lanes > 1 && !r) fail(name, text("vector index into registers: ", index));
        std::vector<int> s;
        for (int i = 0; i < lanes; i++) s.push_back(slot(name, r ? r->base + r->stride * i : index, store));
        return s;
    }
    Stmt visit(const Allocate *op) override {
        if (in_kernel && threads.empty() && op->memory_type == MemoryType::Register) of_block.insert(op->name);
        Stmt s = KernelMutator::visit(op);
        of_block.erase(op->name);
        op = s.as<Allocate>();
        auto it = op ? owned.find(op->name) : owned.end();
        if (it == owned.end()) return s;
        s = Allocate::make(op->name, op->type, op->memory_type, {std::max(it->second.registers, 1)}, op->condition, op->body);
        owned.erase(it);
        return s;
    }
    Stmt visit(const Store *op) override {
        if (!candidate(op->name)) return IRMutator::visit(op);
        Expr value = mutate(op->value);
        std::vector<int> s = slots(op->name, op->index, true);
        if (s.size() == 1) return scalar_store(op->name, value, s[0]);
        std::string v = unique_name("register_values");
        std::vector<Stmt> stores;
        for (size_t i = 0; i < s.size(); i++)
            stores.push_back(scalar_store(op->name, element(Variable::make(value.type(), v), (int)i), s[i]));
        return LetStmt::make(v, value, block_of(stores));
    }
    Expr visit(const Load *op) override {
        if (!candidate(op->name)) return IRMutator::visit(op);
        std::vector<Expr> v;
        for (int s : slots(op->name, op->index, false)) v.push_back(scalar_load(op->type.element_of(), op->name, s));
        return v.size() == 1 ? v[0] : Shuffle::make_concat(v);
    }
};

}  // namespace

Pass privatize() { return std::make_unique<Privatize>(); }

}  // namespace holdfast::cuda

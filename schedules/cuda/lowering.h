// What the lowering passes for CUDA share. A pass rewrites the final IR of a pipeline, just before Halide hands its kernels to
// the PTX back end; it proves what it replaces, or stops the build with the name of the Func and the reason.
#pragma once
#include "Halide.h"
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace holdfast::cuda {
using namespace Halide;
using namespace Halide::Internal;

using Pass = std::unique_ptr<IRMutator>;
Pass shift_shared();                // shared_memory.cpp: keeps clear of the bytes that the driver reserves
Pass merge_barriers();              // shared_memory.cpp: several copies to shared memory under way at once
Pass copy_async();                  // shared_memory.cpp: copies become cp.async
Pass widen_bfloat16();              // bfloat16.cpp: shifts of 16-bit integers that mean bfloat16 become casts
Pass lower_bfloat16();              // bfloat16.cpp: casts that Halide's PTX back end cannot compile
Pass match_products();              // products.cpp: tagged loops become mma.sync and ldmatrix
Pass pair_loads();                  // products.cpp: two ldmatrix.x2 become one .x4
Pass check_products();              // products.cpp: none was left
Pass privatize();                   // registers.cpp: a block's registers become each lane's
Pass machine_code(const Target &);  // machine_code.cpp: compiles the kernels

/// Stops the build: what a pass cannot prove it does not replace.
[[noreturn]] void fail(const std::string &where, const std::string &why);
template<typename... T>
std::string text(const T &...t) {
    std::ostringstream s;
    (s << ... << t);
    return s.str();
}

// Names of the loops over one fragment; Fragments (fragments.h) gives them, MatchProducts looks for them.
inline constexpr const char *tag_k = "mma_k", *tag_row = "mma_row", *tag_col = "mma_col";
inline bool tagged(const std::string &loop, const char *tag) { return loop.find(std::string(".") + tag) != std::string::npos; }

inline Expr scalar_load(Type t, const std::string &n, const Expr &i) {
    return Load::make(t, n, i, Buffer<>(), Parameter(), const_true(t.lanes()), ModulusRemainder());
}
inline Stmt scalar_store(const std::string &n, const Expr &v, const Expr &i) {
    return Store::make(n, v, i, Parameter(), const_true(v.type().lanes()), ModulusRemainder());
}
inline Expr element(const Expr &v, int i) { return v.type().is_scalar() ? v : Shuffle::make_extract_element(v, i); }
inline Stmt block_of(const std::vector<Stmt> &v) {
    Stmt r;
    for (size_t i = v.size(); i-- > 0;) r = r.defined() ? Block::make(v[i], r) : v[i];
    return r;
}
inline bool is_thread(const For *op) { return op->for_type == ForType::GPUThread || op->for_type == ForType::GPULane; }
inline bool is_barrier(const Stmt &s) {
    const Evaluate *e = s.as<Evaluate>();
    const Call *c = e ? e->value.as<Call>() : nullptr;
    return c && c->is_intrinsic(Call::gpu_thread_barrier);
}
inline bool is_half(const Type &t) { return t.is_bfloat() || (t.is_float() && t.bits() == 16); }

struct Names : IRGraphVisitor {
    std::set<std::string> vars, buffers;
    using IRGraphVisitor::visit;
    void visit(const Variable *v) override { vars.insert(v->name); }
    void visit(const Load *l) override {
        buffers.insert(l->name);
        IRGraphVisitor::visit(l);
    }
};
template<typename E>
Names names_in(const E &e) {
    Names n;
    e.accept(&n);
    return n;
}

// Follows lets, allocations and thread loops inside kernels.
struct KernelMutator : public IRMutator {
    using IRMutator::visit;
    std::vector<std::pair<std::string, Expr>> lets;
    std::map<std::string, MemoryType> memory;
    std::vector<std::pair<std::string, int>> threads;
    bool in_kernel = false;

    Expr inline_lets(Expr e) const {
        for (size_t i = lets.size(); i-- > 0;) e = substitute(lets[i].first, lets[i].second, e);
        return e;
    }
    bool is_shared(const std::string &n) const {
        auto it = memory.find(n);
        return it != memory.end() && it->second == MemoryType::GPUShared;
    }
    template<typename L>
    auto visit_let(const L *op) {
        Expr v = mutate(op->value);
        if (in_kernel) lets.emplace_back(op->name, op->value);  // what is known before the kernel stays an argument
        auto b = mutate(op->body);
        if (in_kernel) lets.pop_back();
        return L::make(op->name, v, b);
    }
    Stmt visit(const LetStmt *op) override { return visit_let(op); }
    Expr visit(const Let *op) override { return visit_let(op); }
    Stmt visit(const Allocate *op) override {
        if (!in_kernel) return IRMutator::visit(op);
        memory[op->name] = op->memory_type;
        Stmt s = IRMutator::visit(op);
        memory.erase(op->name);
        return s;
    }
    Stmt visit(const For *op) override {
        bool thread = is_thread(op), outermost = !in_kernel && (op->for_type == ForType::GPUBlock || thread);
        if (outermost) in_kernel = true;
        if (thread) {
            auto e = as_const_int(op->extent);
            if (!e) fail(op->name, text("thread loop of unknown extent ", op->extent));
            threads.emplace_back(op->name, (int)*e);
        }
        Stmt s = visit_loop(op);
        if (thread) threads.pop_back();
        if (outermost) {
            in_kernel = false;
            s = leave_kernel(s);
        }
        return s;
    }
    virtual Stmt visit_loop(const For *op) { return IRMutator::visit(op); }
    virtual Stmt leave_kernel(Stmt s) { return s; }
};

// Sums of constant multiples, like terms combined: what the simplifier leaves nested cancels here.
struct Linear {
    std::vector<std::pair<Expr, int64_t>> terms;  // the constant has term 1
    explicit Linear(const Expr &e) { add(e, 1); }
    void add(const Expr &e, int64_t scale) {
        if (const Add *a = e.as<Add>()) {
            add(a->a, scale);
            add(a->b, scale);
            return;
        }
        if (const Sub *s = e.as<Sub>()) {
            add(s->a, scale);
            add(s->b, -scale);
            return;
        }
        if (const Mul *m = e.as<Mul>()) {
            if (auto c = as_const_int(m->b)) {
                add(m->a, scale * *c);
                return;
            }
        }
        auto c = as_const_int(e);
        Expr t = c ? Expr(1) : e;
        if (c) scale *= *c;
        for (auto &x : terms)
            if (equal(x.first, t)) {
                x.second += scale;
                return;
            }
        terms.emplace_back(t, scale);
    }
    Expr expr() const {
        Expr r = 0;
        for (auto &x : terms)
            if (x.second) r += x.first * (int)x.second;
        return simplify(r);
    }
};
inline Expr linear(const Expr &e) { return Linear(simplify(e)).expr(); }

}  // namespace holdfast::cuda

// Prefetches rows of the caller's tensors for the next iteration of a loop, or for a later stage or call, spread evenly over what
// computes in this one: the loops that prefetch.h names, in the final IR. Rows of a head lie far apart, so that no hardware
// prefetcher follows them, and a burst of requests waits for the 16 or so lines that a core can have on their way. Past the last
// iteration it asks for the rows after it, which a later call reads, or nobody: a prefetch of any address is harmless.
//
// Halide's own prefetch() does not serve: it asks for a whole region at once, where that is read, and only for L1 past L2
// (prefetchnta). Left out: sizes known at run time only, but of rows that are gone through vector by vector.
#include "prefetch.h"
#include "../schedule.h"

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {
using namespace Halide;
using namespace Halide::Internal;
using namespace holdfast;

constexpr int line_bytes = 64;
constexpr int into_l2 = 2;  // locality of llvm.prefetch: prefetcht1. Rows far apart meet in a few sets of L1

using Values = std::vector<std::pair<std::string, Expr>>;

bool is_named(const For *loop, const char *tag) { return loop->name.find(std::string(".") + tag) != std::string::npos; }

/// Puts in the values of variables from number `from` on, innermost last.
Expr substituted(Expr e, const Values &values, size_t from) {
    for (size_t n = values.size(); n-- > from;) e = substitute(values[n].first, values[n].second, e);
    return e;
}

/// What a loop reads or writes of a tensor [.., rows, elements]: the index of its first element, and how many there are.
class FindRows : public IRVisitor {
    using IRVisitor::visit;
    Expr times = 1;

    void visit(const LetStmt *op) override {
        inside.emplace_back(op->name, op->value);
        IRVisitor::visit(op);
    }
    void visit(const For *op) override {
        const Expr around = times;
        times = times * op->extent;
        inside.emplace_back(op->name, op->min);
        IRVisitor::visit(op);
        times = around;
    }
    void found(const Parameter &p, const Expr &index) {
        if (!p.defined() || p.dimensions() < 4) return;  // decays, chunk table
        if (!tensor.defined()) tensor = p, first = index;
        if (p.name() == tensor.name()) elements += times * index.type().lanes();
    }
    void visit(const Load *op) override { found(op->param, op->index); }
    void visit(const Store *op) override {
        op->value.accept(this);
        found(op->param, op->index);
    }

public:
    Parameter tensor;
    Expr first, elements = 0;
    Values inside;  // variables defined inside, at their first iteration
};

/// The tensors that a kernel reads or writes, by name.
class FindTensors : public IRVisitor {
    using IRVisitor::visit;
    void found(const Parameter &p) {
        if (p.defined()) tensors.emplace(p.name(), p);
    }
    void visit(const Load *op) override {
        found(op->param);
        IRVisitor::visit(op);
    }
    void visit(const Store *op) override {
        found(op->param);
        IRVisitor::visit(op);
    }

public:
    std::map<std::string, Parameter> tensors;
};

Expr stride(const Parameter &tensor, int axis = 1) {
    return Variable::make(Int(32), tensor.name() + ".stride." + std::to_string(axis));
}

Stmt prefetched(const Parameter &tensor, const Expr &index) {
    const Expr address = reinterpret(UInt(64), Variable::make(type_of<void *>(), tensor.name())) +
                         cast(UInt(64), cast(Int(64), simplify(index)) * tensor.type().bytes());
    // LLVM's intrinsic by name: Halide's runtime, which is linked first, has declared it.
    const Expr read = 0, data = 1;
    return Evaluate::make(
        Call::make(Int(32), "llvm.prefetch.p0", {reinterpret(type_of<void *>(), address), read, into_l2, data}, Call::Extern));
}

/// Puts before each store prefetches of the lines that are `tokens` behind what it reads and writes, each once.
class AskForVectors : public IRMutator {
    using IRMutator::visit;
    const int tokens;
    std::vector<std::pair<Parameter, Expr>> asked;
    std::vector<Stmt> statements;
    Scope<> inside;  // variables that a statement defines for itself

    void found(const Parameter &p, const Expr &index, const Expr &predicate) {
        const Ramp *ramp = index.as<Ramp>();
        if (!p.defined() || p.dimensions() != 4 || !ramp || !is_const_one(ramp->stride) || !is_const_one(predicate)) return;
        if (expr_uses_vars(ramp->base, inside)) return;
        for (const auto &[tensor, other] : asked) {
            const auto apart = as_const_int(simplify(ramp->base - other));
            if (tensor.name() == p.name() && apart && std::abs(*apart) * p.type().bytes() < line_bytes) return;
        }
        asked.emplace_back(p, ramp->base);
        statements.push_back(prefetched(p, ramp->base + tokens * stride(p, 2)));
    }
    Expr visit(const Let *op) override {
        const Expr value = mutate(op->value);
        ScopedBinding<> bound(inside, op->name);
        return Let::make(op->name, value, mutate(op->body));
    }
    Expr visit(const Load *op) override {
        found(op->param, op->index, op->predicate);
        return op;
    }
    Stmt visit(const Store *op) override {
        mutate(op->value);
        found(op->param, op->index, op->predicate);
        statements.push_back(op);
        const Stmt all = Block::make(statements);
        statements.clear();
        return all;
    }

public:
    explicit AskForVectors(int tokens) : tokens(tokens) {}
};

class PrefetchRows : public IRMutator {
    using IRMutator::visit;

    struct Rows {
        Parameter tensor;
        int64_t lines, lines_in_row;
        std::string next;  // name of the index of the next iteration's first row
        Expr next_index;
        size_t depth;  // loops around
    };
    struct Loop {
        const For *loop;
        size_t lets;  // around it
    };
    std::vector<Loop> loops;  // around what is visited, outermost first
    Values lets;
    std::vector<Rows> found;  // by the loops around, so far
    std::map<std::string, Parameter> tensors;

    void find(const For *op) {
        FindRows rows;
        op->accept(&rows);
        if (!rows.tensor.defined() || loops.empty()) return;
        const auto all = as_const_int(simplify(rows.elements)),
                   in_row = as_const_int(simplify(rows.tensor.extent_constraint(0)));
        if (!all || !in_row) return;
        Expr first = rows.first;
        if (const Ramp *ramp = first.as<Ramp>()) first = ramp->base;
        first = substituted(substituted(first, rows.inside, 0), lets, loops.back().lets);
        const int64_t count = *all / *in_row, in_line = line_bytes / rows.tensor.type().bytes();
        const int64_t lines_in_row = (*in_row + in_line - 1) / in_line;
        found.push_back({rows.tensor, count * lines_in_row, lines_in_row, unique_name(rows.tensor.name() + ".next"),
                         first + (int)count * stride(rows.tensor), loops.size()});
    }

    /// Lines of so many, at those rows of a tensor, that this iteration of the loops from `depth` on asks for.
    void ask(const Parameter &tensor, const Expr &first, int64_t lines, int64_t lines_in_row, size_t depth,
             std::vector<Stmt> &statements) {
        Expr iteration = 0;
        int64_t iterations = 1;
        for (size_t n = depth; n < loops.size(); n++) {
            const For *loop = loops[n].loop;
            const auto extent = as_const_int(loop->extent);
            if (!extent) continue;
            iteration = iteration * loop->extent + Variable::make(Int(32), loop->name) - loop->min;
            iterations *= *extent;
        }
        const int each = (int)((lines + iterations - 1) / iterations), fewer = (int)std::max<int64_t>(iterations / lines, 1);
        const int bytes = tensor.type().bytes(), in_row = (int)lines_in_row;
        for (int n = 0; n < each; n++) {
            const Expr line = iteration / fewer * each + n;
            statements.push_back(
                prefetched(tensor, first + line / in_row * stride(tensor) + line % in_row * (line_bytes / bytes)));
        }
    }

    /// What a loop of that name, x86::ask_for, asks for.
    void ask_for(const std::string &name, std::vector<Stmt> &statements) {
        size_t depth = loops.size();  // inside the loop over chunks, whose extent is not known
        while (depth > 0 && as_const_int(loops[depth - 1].loop->extent)) depth--;
        if (depth == 0) return;
        const For *chunks = loops[depth - 1].loop;
        const std::vector<std::string> words = split_string(name, "-");
        const int chunk = std::stoi(words[1]);
        for (size_t n = 2; n < words.size(); n++) {
            const auto named = tensors.find(words[n]);
            if (named == tensors.end()) continue;  // a pipeline that has made its inputs itself
            const Parameter &tensor = named->second;
            const auto in_row = as_const_int(simplify(tensor.extent_constraint(0)));
            if (!in_row) continue;
            const int64_t in_line = line_bytes / tensor.type().bytes(), lines_in_row = (*in_row + in_line - 1) / in_line;
            const Expr row = (Variable::make(Int(32), chunks->name) - chunks->min) * chunk;
            const Expr behind = starts_with(name, x86::ask_behind) ? stride(tensor, tensor.dimensions() - 2) : 0;
            ask(tensor, row * stride(tensor) + behind, chunk * lines_in_row, lines_in_row, depth, statements);
        }
    }

    Stmt visit(const LetStmt *op) override {
        lets.emplace_back(op->name, op->value);
        Stmt stmt = IRMutator::visit(op);
        lets.pop_back();
        return stmt;
    }
    Stmt visit(const For *op) override {
        if (is_named(op, x86::rows_ahead)) find(op);
        const size_t found_around = found.size();
        loops.push_back({op, lets.size()});
        Stmt body = mutate(op->body);
        std::vector<Stmt> statements;
        if (is_named(op, x86::ask_ahead))
            for (const Rows &rows : found)
                ask(rows.tensor, Variable::make(Int(32), rows.next), rows.lines, rows.lines_in_row, rows.depth, statements);
        const std::string name = op->name.substr(op->name.rfind('.') + 1);
        if (starts_with(name, x86::ask_tokens)) body = AskForVectors(std::stoi(name.substr(name.find('-') + 1))).mutate(body);
        if (starts_with(name, x86::ask_this) || starts_with(name, x86::ask_behind)) ask_for(name, statements);
        if (!statements.empty()) {
            statements.push_back(body);
            body = Block::make(statements);
        }
        loops.pop_back();
        for (; found.size() > found_around; found.pop_back())
            body = LetStmt::make(found.back().next, found.back().next_index, body);
        return For::make(op->name, op->min, op->extent, op->for_type, op->partition_policy, op->device_api, body);
    }

public:
    using IRMutator::mutate;
    Stmt mutate(const Stmt &stmt) override {
        if (loops.empty() && tensors.empty()) {  // all of it
            FindTensors all;
            stmt.accept(&all);
            tensors = all.tensors;
        }
        return IRMutator::mutate(stmt);
    }
};

bool matches(const Target &t) { return t.arch == Target::X86 && t.bits == 64 && !t.has_gpu_feature(); }

void add_passes(Pipeline pipeline, const Target &) { pipeline.add_custom_lowering_pass(new PrefetchRows); }

const bool added = holdfast::Lowering::add({10, matches, add_passes});
}  // namespace

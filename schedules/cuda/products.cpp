// Products on tensor cores: finds the loops that Fragments tagged, proves what they compute, replaces them.
#include "lowering.h"
#include <array>
#include <functional>

namespace holdfast::cuda {
namespace {

// for k 16 { for row 2 { for col 2 { c[...] += float(a) * float(b) }}} over tagged loops, a and b 16-bit, becomes one
// mma.sync.m16n8k16 per warp. Proved before: a depends on the lane only through lane / 4 and not on col, b only through
// lane % 4 and not on row, c not on k, and every ldmatrix row is 8 consecutive elements at a 16-byte boundary.
class MatchProducts : public KernelMutator {
    using KernelMutator::visit;
    std::string lane_name;
    int uid = 0;
    struct Cached {
        std::string fragment;
        std::set<std::string> reads;
    };
    std::map<std::string, Cached> cache;
    std::vector<std::pair<std::string, int>> fragments;

    struct Product {
        std::string name, k, row, col;  // the accumulator; the loops
        Expr index, acc, a, b;          // a, b of 16-bit type
    } m;
    using Where = std::array<Expr, 4>;  // row, col, lane, k

    Expr at(const Expr &e, const Where &w) {
        return simplify(
            substitute(std::map<std::string, Expr>{{m.row, w[0]}, {m.col, w[1]}, {lane_name, w[2]}, {m.k, w[3]}}, e));
    }

    // The 16-bit value that is widened to make this float factor.
    Expr narrow_factor(const Expr &e) {
        const Cast *c = e.as<Cast>();
        if (!c || c->type != Float(32) || !is_half(c->value.type()))
            fail(m.name, text("a factor of the product is ", e.type(), ", not a 16-bit float: ", e,
                              "\n  Round it in the algorithm (round_operand() in generators/operands.h), or give this stage a "
                              "schedule without "
                              "tensor cores."));
        Expr r = c->value;
        while (true) {  // bf16(float(bf16 x)) is x
            const Cast *n = r.as<Cast>(), *w = n ? n->value.as<Cast>() : nullptr;
            if (!w || w->type != Float(32) || w->value.type() != r.type()) return r;
            r = w->value;
        }
    }
    // True when a operand depends only on (row, lane / 4, k) or, as b, on (col, lane % 4, k).
    bool is_fragment(const Expr &e, bool as_a) {
        Names n = names_in(e);
        if (n.vars.count(as_a ? m.col : m.row)) return false;
        Expr g = Variable::make(Int(32), "lane.row"), q = Variable::make(Int(32), "lane.col");
        auto lane_is = [&](const Expr &l) { return simplify(substitute(lane_name, l, e)); };
        Expr base = lane_is(as_a ? 4 * g : q);
        for (int i = 1; i < (as_a ? 4 : 8); i++)
            if (!equal(base, lane_is(as_a ? 4 * g + i : q + 4 * i))) return false;
        return true;
    }

    Stmt match(const For *op) {
        m = Product();
        std::vector<std::pair<std::string, Expr>> inner;
        Stmt s = op;
        std::string where = op->name, extent_problem;
        while (true) {
            if (const LetStmt *l = s.as<LetStmt>()) {
                inner.emplace_back(l->name, l->value);
                s = l->body;
                continue;
            }
            const For *f = s.as<For>();
            if (!f) break;
            std::string *slot = tagged(f->name, tag_k)     ? &m.k
                                : tagged(f->name, tag_row) ? &m.row
                                : tagged(f->name, tag_col) ? &m.col
                                                           : nullptr;
            if (!slot || !slot->empty() || f->for_type != ForType::Serial)
                fail(where, text("loop ", f->name,
                                 " does not belong inside a fragment's three loops (mma_k 16, mma_row 2, mma_col 2)"));
            auto e = as_const_int(f->extent);
            if (!e || *e != (slot == &m.k ? 16 : 2) || !is_const_zero(f->min))
                extent_problem = text("loop ", f->name, " runs from ", f->min, " over ", f->extent,
                                      "; a fragment needs 0 over ", slot == &m.k ? 16 : 2,
                                      " (sizes that are not multiples of the tile, or a loop that Halide has trimmed)");
            *slot = f->name;
            s = f->body;
        }
        if (m.k.empty() || m.row.empty() || m.col.empty())
            fail(where, text("one of a fragment's three loops (mma_k 16, mma_row 2, mma_col 2) is missing:\n", Stmt(op)));
        const Store *st = s.as<Store>();
        if (!st) fail(where, text("expected one store; sizes that are not multiples of the tile leave a guard here:\n", s));
        m.name = st->name;
        auto it = memory.find(m.name);
        if (it == memory.end() || it->second != MemoryType::Register)
            fail(m.name, "the sums of a product must be stored in registers (store_in(MemoryType::Register))");
        Expr v = st->value;
        while (const Let *l = v.as<Let>()) {
            inner.emplace_back(l->name, l->value);
            v = l->body;
        }
        auto full = [&](Expr e) {
            for (size_t i = inner.size(); i-- > 0;) e = substitute(inner[i].first, inner[i].second, e);
            return e;
        };
        v = full(v);
        m.index = full(st->index);
        // A let from outside the nest may hide a lane; one that loads must stay where it is.
        auto outer = [&](Expr e) {
            for (size_t i = lets.size(); i-- > 0;) {
                if (!names_in(e).vars.count(lets[i].first)) continue;
                Names n = names_in(lets[i].second);
                if (n.buffers.empty())
                    e = substitute(lets[i].first, lets[i].second, e);
                else if (names_in(inline_lets(lets[i].second)).vars.count(lane_name))
                    fail(m.name, text("operand uses a value loaded outside the fragment: ", lets[i].second));
            }
            return e;
        };
        v = outer(v);
        m.index = outer(m.index);
        std::vector<Expr> terms;
        std::function<void(const Expr &)> flatten = [&](const Expr &e) {
            const Mul *mul = e.as<Mul>();
            const Add *sum = e.as<Add>(), *left = mul ? mul->a.as<Add>() : nullptr, *right = mul ? mul->b.as<Add>() : nullptr;
            if (sum) {
                flatten(sum->a), flatten(sum->b);
            } else if (left) {  // an operand in parts
                flatten(left->a * mul->b), flatten(left->b * mul->b);
            } else if (right) {
                flatten(mul->a * right->a), flatten(mul->a * right->b);
            } else {
                terms.push_back(e);
            }
        };
        flatten(v);
        for (const Expr &t : terms)
            if (const Mul *mul = t.as<Mul>()) {
                narrow_factor(mul->a);
                narrow_factor(mul->b);
            }
        if (!extent_problem.empty()) fail(where, extent_problem);
        if (names_in(m.index).vars.count(m.k)) fail(m.name, text("the result depends on the reduction: ", m.index));
        for (const Expr &t : terms) {
            const Load *l = t.as<Load>();
            if (!l || l->name != m.name) continue;
            if (m.acc.defined() || !equal(simplify(l->index), simplify(m.index)))
                fail(m.name, text("the sum must start from the element it stores, not from ", t));
            m.acc = t;
        }
        if (!m.acc.defined()) fail(m.name, text("not a sum onto the element it stores: ", v));
        std::vector<Stmt> out;
        for (const Expr &t : terms) {  // several products over one reduction, as autodiff writes them: one mma each
            if (t.same_as(m.acc)) continue;
            const Mul *mul = t.as<Mul>();
            if (!mul) fail(m.name, text("not a product: ", t, "\n  in ", v));
            Expr x = narrow_factor(mul->a), y = narrow_factor(mul->b);
            if (x.type() != y.type()) fail(m.name, text("factors of different types ", x.type(), " and ", y.type()));
            if (names_in(t).buffers.count(m.name)) fail(m.name, text("a factor reads the sums themselves: ", t));
            if (is_fragment(x, true) && is_fragment(y, false)) {
                m.a = x;
                m.b = y;
            } else if (is_fragment(y, true) && is_fragment(x, false)) {
                m.a = y;
                m.b = x;
            } else
                fail(m.name, text("the factors are not (row, k) and (col, k) fragments of one warp:\n  ", x, "\n  ", y));
            out.push_back(emit());
        }
        return block_of(out);
    }

    std::vector<Expr> fragment(const std::string &kind, const std::vector<Expr> &words,
                               const std::function<Stmt(const std::string &)> &fill, std::vector<Stmt> &before, int n) {
        std::string key = kind;
        Cached c;
        for (auto &w : words) {
            key += text("|", w);
            for (auto &b : names_in(w).buffers) c.reads.insert(b);
        }
        auto it = cache.find(key);
        if (it == cache.end()) {
            c.fragment = "mma_fragment_" + std::to_string(uid++);
            fragments.emplace_back(c.fragment, n);
            before.push_back(fill(c.fragment));
            it = cache.emplace(key, c).first;
        }
        std::vector<Expr> r;
        for (int i = 0; i < n; i++) r.push_back(scalar_load(UInt(32), it->second.fragment, i));
        return r;
    }
    static Expr pack(const Expr &lo, const Expr &hi) {
        auto rounded = [](const Expr &e) {
            const Cast *c = e.as<Cast>();
            return c && c->value.type() == Float(32) ? c->value : Expr();
        };
        Expr l = rounded(lo), h = rounded(hi);
        if (l.defined() && h.defined())
            return Call::make(UInt(32), lo.type().is_bfloat() ? "holdfast_cvt_bf16x2" : "holdfast_cvt_f16x2", {h, l},
                              Call::PureExtern);
        return cast<uint32_t>(reinterpret(UInt(16), lo)) | (cast<uint32_t>(reinterpret(UInt(16), hi)) << 16);
    }
    std::vector<Expr> evaluate(const Expr &e, const std::vector<Where> &where, std::vector<Stmt> &before,
                               const char *kind = "evaluate") {
        std::vector<Expr> words;
        for (size_t i = 0; i < where.size(); i += 2) words.push_back(pack(at(e, where[i]), at(e, where[i + 1])));
        return fragment(
            kind, words,
            [&](const std::string &f) {
                std::vector<Stmt> s;
                for (size_t i = 0; i < words.size(); i++) s.push_back(scalar_store(f, words[i], (int)i));
                return block_of(s);
            },
            before, (int)words.size());
    }
    std::vector<Expr> ldmatrix(const std::string &fn, const Load *l, const Expr &index, int n, std::vector<Stmt> &before) {
        Expr address = linear(index * l->type.bytes());
        ModulusRemainder mr = modulus_remainder(inline_lets(address));
        if (mr.modulus % 16 || mr.remainder % 16)
            fail(m.name, text("rows of ", l->name, " do not start at 16-byte boundaries (align_storage): ", address));
        return fragment(
            fn, {address, scalar_load(l->type, l->name, 0)},
            [&](const std::string &f) {
                std::vector<Stmt> s;
                for (int i = 0; i < n; i++) s.push_back(scalar_store(f, element(Variable::make(UInt(32, n), f + "_v"), i), i));
                return LetStmt::make(f + "_v", reinterpret(UInt(32, n), Call::make(UInt(32 * n), fn, {address}, Call::Extern)),
                                     block_of(s));
            },
            before, n);
    }
    // One operand as registers: 4 for a, 2 for b.
    std::vector<Expr> operand(const Expr &e, bool is_a, std::vector<Stmt> &before) {
        Expr lane = Variable::make(Int(32), lane_name);
        // the element that a lane's register r, half h holds, and the element (outer, k) of the tile
        std::vector<Where> own;
        for (int i = 0; i < (is_a ? 8 : 4); i++) {
            if (is_a)
                own.push_back({(i / 2) % 2, 0, lane, 2 * (lane % 4) + i % 2 + 8 * (i / 4)});
            else
                own.push_back({0, (lane / 4) % 2, (lane / 4) / 2, 2 * (lane % 4) + i % 2 + 8 * (i / 2)});
        }
        auto tile = [&](const Expr &x, const Expr &outer, const Expr &k) {
            return is_a ? at(x, {outer / 8, 0, 4 * (outer % 8), k}) : at(x, {0, outer % 2, outer / 2, k});
        };

        struct HalfLoads : IRVisitor {
            std::vector<const Load *> l;
            using IRVisitor::visit;
            void visit(const Load *op) override {
                if (op->type.bits() == 16) l.push_back(op);
                IRVisitor::visit(op);
            }
        } loads;
        e.accept(&loads);
        const Load *l = nullptr;
        for (const Load *x : loads.l) {
            if (!is_shared(x->name)) continue;
            if (l && !equal(Expr(l), Expr(x))) fail(m.name, text("an operand reads two 16-bit values of shared memory: ", e));
            l = x;
        }
        if (!l) return evaluate(e, own, before);  // registers (whose owner Privatize checks) or global memory

        // 8 consecutive elements along one axis, from every start that ldmatrix is given
        auto consecutive = [&](bool along_k) {
            Expr s = Variable::make(Int(32), "tile.other");
            for (int half = 0; half < (is_a || along_k ? 2 : 1); half++) {
                Expr first = along_k ? tile(l->index, s, 8 * half) : tile(l->index, 8 * half, s);
                for (int i = 1; i < 8; i++) {
                    Expr next = along_k ? tile(l->index, s, 8 * half + i) : tile(l->index, 8 * half + i, s);
                    auto d = as_const_int(linear(next - first));
                    if (!d || *d != i) return false;
                }
            }
            return true;
        };
        std::vector<Expr> words;
        if (consecutive(true))
            words = is_a ? ldmatrix("holdfast_ldmatrix_x4", l, tile(l->index, lane % 16, 8 * (lane / 16)), 4, before)
                         : ldmatrix("holdfast_ldmatrix_x2", l, tile(l->index, lane % 8, 8 * ((lane / 8) % 2)), 2, before);
        else if (consecutive(false))
            words = is_a ? ldmatrix("holdfast_ldmatrix_x4_trans", l,
                                    tile(l->index, 8 * ((lane / 8) % 2), lane % 8 + 8 * (lane / 16)), 4, before)
                         : ldmatrix("holdfast_ldmatrix_x2_trans", l, tile(l->index, 0, lane % 16), 2, before);
        else
            fail(m.name, text("operand ", l->name, " in shared memory is dense along neither axis of the tile: ", l->index));
        const Reinterpret *bits = e.as<Reinterpret>();  // a bfloat16 in an integer
        if (equal(bits ? bits->value : e, Expr(l))) return words;

        // a function of the loaded element: apply it to what ldmatrix brought
        struct ReplaceLoad : IRMutator {
            Expr what, with;
            using IRMutator::visit;
            Expr visit(const Load *op) override { return equal(Expr(op), what) ? with : IRMutator::visit(op); }
        };
        std::vector<Expr> out;
        for (size_t i = 0; i < own.size(); i += 2) {
            Expr v[2];
            for (int h = 0; h < 2; h++) {
                ReplaceLoad r;
                r.what = Expr(l);
                r.with = reinterpret(l->type, h ? cast<uint16_t>(words[i / 2] >> 16) : cast<uint16_t>(words[i / 2] & 0xffff));
                v[h] = at(r.mutate(e), own[i + h]);
            }
            out.push_back(pack(v[0], v[1]));
        }
        return fragment(
            "apply", out,
            [&](const std::string &f) {
                std::vector<Stmt> s;
                for (size_t i = 0; i < out.size(); i++) s.push_back(scalar_store(f, out[i], (int)i));
                return block_of(s);
            },
            before, (int)out.size());
    }
    Stmt emit() {
        Expr lane = Variable::make(Int(32), lane_name);
        std::vector<Stmt> out;
        std::vector<Expr> a = operand(m.a, true, out), b = operand(m.b, false, out), args;
        for (int i = 0; i < 4; i++) args.push_back(at(m.acc, {i / 2, i % 2, lane, 0}));
        args.insert(args.end(), a.begin(), a.end());
        args.insert(args.end(), b.begin(), b.end());
        std::string d = "mma_sum_" + std::to_string(uid++);
        std::vector<Stmt> stores;
        for (int i = 0; i < 4; i++)
            stores.push_back(
                scalar_store(m.name, element(Variable::make(Float(32, 4), d), i), at(m.index, {i / 2, i % 2, lane, 0})));
        out.push_back(LetStmt::make(d,
                                    reinterpret(Float(32, 4), Call::make(UInt(128),
                                                                         m.a.type().is_bfloat() ? "holdfast_mma_m16n8k16_bf16"
                                                                                                : "holdfast_mma_m16n8k16_f16",
                                                                         args, Call::Extern)),
                                    block_of(stores)));
        for (auto it = cache.begin(); it != cache.end();) it = it->second.reads.count(m.name) ? cache.erase(it) : std::next(it);
        return block_of(out);
    }

    Stmt visit_loop(const For *op) override {
        bool is_lane = is_thread(op) && ends_with(op->name, "thread_id_x");
        if (tagged(op->name, tag_k) || tagged(op->name, tag_row) || tagged(op->name, tag_col)) {
            if (lane_name.empty()) fail(op->name, "not inside gpu_threads");
            if (lane_extent != 32)
                fail(op->name, text("the first thread dimension must be one warp of 32 lanes, not ", lane_extent));
            for (auto &c : conditions)
                if (names_in(inline_lets(c)).vars.count(lane_name))
                    fail(op->name, text("only some lanes of a warp reach it: if ", c));
            return match(op);
        }
        if (is_lane) {
            lane_name = op->name;
            lane_extent = threads.back().second;
        }
        cache.clear();
        Stmt s = IRMutator::visit(op);
        cache.clear();
        if (is_lane) {
            const For *f = s.as<For>();
            Stmt body = f->body;
            for (auto &x : fragments)
                body = Allocate::make(x.first, UInt(32), MemoryType::Register, {x.second}, const_true(), body);
            fragments.clear();
            s = For::make(f->name, f->min, f->extent, f->for_type, f->partition_policy, f->device_api, body);
            lane_name.clear();
        }
        return s;
    }
    int lane_extent = 0;
    std::vector<Expr> conditions;
    Stmt visit(const LetStmt *op) override {  // what only the replaced loops used is dead
        Stmt s = KernelMutator::visit(op);
        const LetStmt *l = s.as<LetStmt>();
        return in_kernel && !stmt_uses_var(l->body, l->name) ? l->body : s;
    }
    Stmt visit(const IfThenElse *op) override {
        cache.clear();
        conditions.push_back(op->condition);
        Stmt s = IRMutator::visit(op);
        conditions.pop_back();
        cache.clear();
        return s;
    }
    Stmt visit(const Evaluate *op) override {
        if (is_barrier(op)) cache.clear();
        return IRMutator::visit(op);
    }
    Stmt visit(const Store *op) override {
        cache.clear();
        return IRMutator::visit(op);
    }
};

// Two ldmatrix.x2 a fixed distance apart, with no write to shared memory between them, are one ldmatrix.x4.
class PairLoads : public KernelMutator {
    using KernelMutator::visit;
    struct Pair {
        std::string fn, fragment;
        Expr address;
    };
    static bool is_x2(const Stmt &s, Pair &p) {
        const LetStmt *l = s.as<LetStmt>();
        const Reinterpret *r = l ? l->value.as<Reinterpret>() : nullptr;
        const Call *c = r ? r->value.as<Call>() : nullptr;
        if (!c || !starts_with(c->name, "holdfast_ldmatrix_x2")) return false;
        p = {c->name, l->name.substr(0, l->name.size() - 2), c->args[0]};
        return true;
    }
    static void flatten(const Stmt &s, std::vector<Stmt> &out) {
        if (const Block *b = s.as<Block>()) {
            flatten(b->first, out);
            flatten(b->rest, out);
        } else
            out.push_back(s);
    }
    static bool plain(const Stmt &s, const PairLoads &self) {  // touches no shared memory and does not branch
        struct V : IRVisitor {
            const PairLoads &self;
            bool ok = true;
            explicit V(const PairLoads &s) : self(s) {}
            using IRVisitor::visit;
            void visit(const Store *op) override {
                ok &= !self.is_shared(op->name);
                IRVisitor::visit(op);
            }
            void visit(const For *) override { ok = false; }
            void visit(const IfThenElse *) override { ok = false; }
            void visit(const Evaluate *) override { ok = false; }
        } v(self);
        s.accept(&v);
        return v.ok;
    }
    Stmt visit(const Block *op) override {
        std::vector<Stmt> all, out;
        flatten(op, all);
        struct Open {
            int at;
            Pair pair;
        };
        std::map<std::string, Open> open;  // by instruction
        Pair p;
        for (const Stmt &s : all) {
            if (is_x2(s, p)) {
                auto it = open.find(p.fn);
                auto d = it != open.end() ? as_const_int(linear(p.address - it->second.pair.address)) : std::nullopt;
                if (d && *d % 16 == 0) {
                    const Pair &first = it->second.pair;
                    Expr lane = Variable::make(Int(32), threads.back().first);
                    std::string v = first.fragment + "_v",
                                fn = p.fn == "holdfast_ldmatrix_x2" ? "holdfast_ldmatrix_x4" : "holdfast_ldmatrix_x4_trans";
                    std::vector<Stmt> stores;
                    for (int i = 0; i < 4; i++)
                        stores.push_back(scalar_store(i < 2 ? first.fragment : p.fragment,
                                                      element(Variable::make(UInt(32, 4), v), i), i % 2));
                    out[it->second.at] = LetStmt::make(
                        v,
                        reinterpret(UInt(32, 4),
                                    Call::make(UInt(128), fn, {simplify(first.address + (lane / 16) * (int)*d)}, Call::Extern)),
                        block_of(stores));
                    open.erase(it);
                    continue;
                }
                open[p.fn] = {(int)out.size(), p};
                out.push_back(s);
                continue;
            }
            if (!plain(s, *this)) open.clear();
            out.push_back(mutate(s));
        }
        return block_of(out);
    }
};

// Nothing that was asked for may be left undone.
class CheckProducts : public KernelMutator {
    using KernelMutator::visit;
    Stmt visit_loop(const For *op) override {
        for (const char *t : {tag_k, tag_row, tag_col})
            if (tagged(op->name, t)) fail(op->name, "asked for tensor cores and not lowered to them");
        return IRMutator::visit(op);
    }
};

}  // namespace

Pass match_products() { return std::make_unique<MatchProducts>(); }
Pass pair_loads() { return std::make_unique<PairLoads>(); }
Pass check_products() { return std::make_unique<CheckProducts>(); }

}  // namespace holdfast::cuda

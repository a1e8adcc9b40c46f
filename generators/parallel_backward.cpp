// The stages of parallel_backward.h.
#include "parallel_backward.h"

#include "adjoint.h"

#include <map>

using namespace Halide;

namespace holdfast {
namespace {

const Var b("b"), h("h"), g("g"), c("c"), n("n"), i("i"), j("j"), d("d"), e("e");

/// A Func of zeros that autodiff does not look behind.
Func hole(const char *name, const std::vector<Var> &args) {
    Func f(name);
    f(args) = 0.0f;
    return f;
}

/// What is put where a hole, or any other Func, is called, in terms of its arguments.
struct Filling {
    Func hole;
    Expr value;
};

/// A variable between 0 and `last`.
struct Inside {
    Var variable;
    Expr last;
};

/// Puts `fillings` into all that `roots` depend on. Autodiff guards whatever it reads, by clamps and selects that Halide could not
/// see through: they are left out for variables that stay inside.
void fill(const std::vector<Func> &roots, const std::vector<Filling> &fillings, const std::vector<Inside> &inside) {
    using namespace Internal;
    struct WithoutBounds : IRGraphMutator {
        const std::vector<Inside> &inside;
        explicit WithoutBounds(const std::vector<Inside> &inside) : inside(inside) {}
        using IRGraphMutator::visit;
        bool never(const Expr &x, const Expr &bound, bool above) const {
            const auto *variable = x.as<Variable>();
            for (const Inside &in : inside)
                if (variable && variable->name == in.variable.name() && can_prove(bound == (above ? in.last : Expr(0))))
                    return true;
            return false;
        }
        Expr visit(const Min *op) override {
            Expr a = mutate(op->a), b = mutate(op->b);
            return never(a, b, true) ? a : never(b, a, true) ? b : min(a, b);
        }
        Expr visit(const Max *op) override {
            Expr a = mutate(op->a), b = mutate(op->b);
            return never(a, b, false) ? a : never(b, a, false) ? b : max(a, b);
        }
        Expr visit(const LE *op) override {
            for (const Inside &in : inside)
                if (op->a.type().is_int() &&
                    (can_prove(op->b - op->a == in.variable) || can_prove(op->b - op->a == in.last - in.variable)))
                    return const_true();
            return op;
        }
    };
    struct Fill : IRGraphMutator {
        const std::vector<Filling> &fillings;
        const std::vector<Inside> &inside;
        Fill(const std::vector<Filling> &fillings, const std::vector<Inside> &inside) : fillings(fillings), inside(inside) {}
        using IRGraphMutator::visit;
        Expr mutate(const Expr &x) override {
            if (inner) return IRGraphMutator::mutate(x);
            inner = true;
            const Expr filled = IRGraphMutator::mutate(x);
            inner = false;
            return common_subexpression_elimination(
                simplify(WithoutBounds(inside).mutate(substitute_in_all_lets(remove_likelies(filled)))));
        }
        Expr visit(const Call *op) override {
            for (const Filling &f : fillings) {
                if (op->call_type != Call::Halide || op->name != f.hole.name()) continue;
                std::map<std::string, Expr> args;
                for (size_t m = 0; m < op->args.size(); m++) args[f.hole.args()[m].name()] = op->args[m];
                return mutate(substitute(args, f.value));
            }
            return IRGraphMutator::visit(op);
        }

    private:
        bool inner = false;
    } filler(fillings, inside);
    std::map<std::string, Function> all;
    for (const Func &root : roots)
        for (const auto &named : find_transitive_calls(root.function())) all.insert(named);
    for (auto &named : all) named.second.mutate(&filler);
}

}  // namespace

ParallelBackwardFuncs parallel_backward(const Func &q, const Func &k, const Func &v, const Func &log_decay, const Func &out,
                                        const Func &dout, const Expr &value_extent, const Expr &group, const ParallelCall &call,
                                        const ParallelWanted &wanted, const ParallelSizes &sizes) {
    const int C = sizes.block;
    const Expr blocks = (call.tokens + C - 1) / C;
    ParallelBackwardFuncs x;
    x.out = out, x.dout = dout;
    const Func nothing_in = hole("no_state", {e, d, Var("s"), h, b}), no_keys = hole("no_keys", {d, Var("s"), h, b});
    x.f = parallel(q, k, v, log_decay, nothing_in, no_keys, call, sizes);
    const ParallelWeights &w = x.f.weights;

    // One pair, with holes for what it is made of.
    const Func queries = hole("queries_of_pair", {d, i, n, c, g, h, b}), keys = hole("keys_of_pair", {d, j, n, c, g, h, b}),
               values = hole("values_of_pair", {e, j, n, c, g, h, b}), decay = hole("decay_of_pair", {i, j, n, c, g, h, b}),
               dnum = hole("dnum_of_pair", {e, i, n, c, g, h, b}), dden = hole("dden_of_pair", {i, n, c, g, h, b});
    x.pair = parallel_pair(
        {n, c, g, h, b}, [&](const Expr &d) { return queries(d, i, n, c, g, h, b); },
        [&](const Expr &d) { return keys(d, j, n, c, g, h, b); }, decay(i, j, n, c, g, h, b), call, sizes, "pair");
    const RDom over_key(0, C, "over_key_of_pair");
    Func num("num_of_pair");
    num(e, i, n, c, g, h, b) += x.pair.weights(i, over_key, n, c, g, h, b) * values(e, over_key, n, c, g, h, b);

    // A scalar for each pair whose gradient is the vector-Jacobian product wanted.
    const RDom over_num(0, value_extent, 0, C, "over_num"), over_den(0, C, "over_den");
    Func loss("loss"), one("one");
    loss(n, c, g, h, b) = 0.0f;
    loss(n, c, g, h, b) += num(over_num.x, over_num.y, n, c, g, h, b) * dnum(over_num.x, over_num.y, n, c, g, h, b);
    loss(n, c, g, h, b) += x.pair.sum(over_den, n, c, g, h, b) * dden(over_den, n, c, g, h, b);
    one(n, c, g, h, b) = 1.0f;
    // The last ones stand for whatever there is, and are gone when guards are. Padding is zero, so that d and e may well go beyond.
    Region all;
    std::vector<Inside> inside = {{i, C - 1}, {j, C - 1}, {d, call.key_extent - 1}, {e, value_extent - 1}};
    for (const Var &block : {n, c, g, h, b}) {
        const Expr last = Param<int>("last_" + block.name());
        all.push_back({0, last});
        inside.push_back({block, last});
    }
    const Derivative grad = propagate_adjoints(loss, one, all);
    auto adjoint = [&](const Func &of, int update, const char *name) { return adjoint_of(grad, name, of, update); };
    x.dweights = adjoint(x.pair.weights, -1, "the weights of a pair");
    x.dscores = adjoint(x.pair.scores, 0, "the scores of a pair");
    x.dqueries = adjoint(queries, -1, "the queries of a pair");
    x.dkeys = adjoint(keys, -1, "the keys of a pair");
    x.dvalues = adjoint(values, -1, "the values of a pair");

    // Rows. Those past the end repeat the last one: they give nothing.
    x.over_block = RDom(0, blocks, "over_block");
    x.over_block.where(x.over_block <= opaque(c));
    x.sum = Func("sum");
    x.sum(i, c, g, h, b) += x.pair.sum(i, x.over_block, c, g, h, b);
    x.factor = Func("factor_of_row");
    x.factor(i, c, g, h, b) =
        select(c * C + i < call.tokens, select(call.normalized != 0, 1.0f / x.sum(i, c, g, h, b), scale_of_row(w, call)), 0.0f);
    x.over_value = RDom(0, value_extent, 0, select(call.normalized != 0, 1, 0), "over_value");
    x.out_dout = Func("out_dout");
    x.out_dout(i, c, g, h, b) += out(x.over_value.x, i, c, g, h, b) * dout(x.over_value.x, i, c, g, h, b);
    x.dnum = Func("dnum");
    x.dnum(e, i, c, g, h, b) = dout(e, i, c, g, h, b) * x.factor(i, c, g, h, b);
    x.dden = Func("dden");
    x.dden(i, c, g, h, b) = select(call.normalized != 0, -x.out_dout(i, c, g, h, b) * x.factor(i, c, g, h, b), 0.0f);

    const Func passed_on = adjoint(num, 0, "the values of a pair's rows");  // dnum: schedules look for that from its users
    fill({x.dqueries, x.dkeys, x.dvalues, x.pair.sum},
         {{queries, w.queries(d, i, c, g, h, b)},
          {keys, k(d, j, n, h, b)},
          {values, v(e, j, n, h, b)},
          {decay, decay_of_key(w)},
          {passed_on, passed_on.value()},
          {dnum, x.dnum(e, i, c, g, h, b)},
          {dden, x.dden(i, c, g, h, b)}},
         inside);

    // Sums over pairs. Where nothing is wanted it would not matter to where it is added: said, so that Halide takes all of these
    // loops for the same kind, in which they can become one.
    auto over_pairs = [&](const Expr &want) {
        RDom pairs(0, 1, 0, blocks, 0, blocks, 0, group, "over_pairs");
        pairs.where(pairs.y <= opaque(pairs.z)), pairs.where(pairs.x < want);
        return pairs;
    };
    auto to = [](const Expr &block, const Expr &want) { return select(want != 0, block, 0); };
    const Expr gates = wanted.dlog_decay, want_dq = max(wanted.dq, gates), want_dk = max(wanted.dk, gates);
    x.over_dq = over_pairs(want_dq), x.over_dk = over_pairs(want_dk), x.over_dv = over_pairs(wanted.dv);
    RDom at = x.over_dq;
    x.dq = Func("dq_sum");
    x.dq(d, i, c, g, h, b) = 0.0f;
    x.dq(d, i, to(at.z, want_dq), to(at.w, want_dq), h, b) += x.dqueries(d, i, at.y, at.z, at.w, h, b);
    at = x.over_dk;
    x.dk = Func("dk_sum");
    x.dk(d, j, n, h, b) = 0.0f;
    x.dk(d, j, to(at.y, want_dk), h, b) += x.dkeys(d, j, at.y, at.z, at.w, h, b);
    at = x.over_dv;
    x.dv = Func("dv_sum");
    x.dv(e, j, n, h, b) = 0.0f;
    x.dv(e, j, to(at.y, wanted.dv), h, b) += x.dvalues(e, j, at.y, at.z, at.w, h, b);

    // Log decays. Of a row's own block the sum of p dG; of those after it, all that pairs have that pass by its end.
    x.over_feature_of_q = RDom(0, call.key_extent, 0, group, "over_feature_of_q");
    x.over_feature_of_k = RDom(0, call.key_extent, "over_feature_of_k");
    RVar feature = x.over_feature_of_q.x, query = x.over_feature_of_q.y;
    x.q_dq = Func("q_dq");
    x.q_dq(i, c, h, b) += w.queries(feature, i, c, query, h, b) * x.dq(feature, i, c, query, h, b);
    feature = x.over_feature_of_k;
    x.k_dk = Func("k_dk");
    x.k_dk(i, c, h, b) += k(feature, i, c, h, b) * x.dk(feature, i, c, h, b);
    x.over_after = RDom(0, C, "over_after");
    x.ddecay_after = Func("ddecay_after");
    x.ddecay_after(i, c, h, b) +=
        select(x.over_after >= i, x.q_dq(x.over_after, c, h, b) - x.k_dk(x.over_after, c, h, b), 0.0f);
    x.over_key = RDom(0, C, "over_key_of_row");
    x.ddecay_of_row = Func("ddecay_of_row");
    x.ddecay_of_row(i, n, c, g, h, b) += x.pair.scores(i, x.over_key, n, c, g, h, b) * x.dscores(i, x.over_key, n, c, g, h, b);
    x.over_row = RDom(0, C, "over_row_of_pair");
    x.ddecay_of_pair = Func("ddecay_of_pair");
    x.ddecay_of_pair(n, c, g, h, b) += x.ddecay_of_row(x.over_row, n, c, g, h, b);
    x.over_gates = over_pairs(gates);
    at = x.over_gates;
    x.ddecay = Func("ddecay_sum");
    x.ddecay(n, c, h, b) = 0.0f;
    x.ddecay(to(at.y, gates), to(at.z, gates), h, b) += x.ddecay_of_pair(at.y, at.z, at.w, h, b);
    x.over_before = RDom(1, blocks - 1, "over_before");
    x.ddecay_before = Func("ddecay_before");
    x.ddecay_before(n, c, h, b) = x.ddecay(n, c, h, b);
    x.ddecay_before(x.over_before, c, h, b) += x.ddecay_before(x.over_before - 1, c, h, b);
    x.over_later = RDom(0, blocks, "over_later");
    x.ddecay_of_later = Func("ddecay_of_later");
    x.ddecay_of_later(c, h, b) += select(x.over_later > c, x.ddecay_before(c, x.over_later, h, b), 0.0f);
    x.dlog_decay = Func("dlog_decay_of_rows");
    x.dlog_decay(i, c, h, b) = (x.ddecay_after(i, c, h, b) + x.ddecay_of_later(c, h, b)) / cast<float>(call.degree);
    return x;
}

}  // namespace holdfast

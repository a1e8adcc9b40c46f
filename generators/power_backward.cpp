// The stages of power_backward.h.
#include "power_backward.h"

#include "adjoint.h"
#include "decay.h"

#include <map>
#include <set>
#include <string>

using namespace Halide;

namespace holdfast {
namespace {

/// Funcs of a pipeline that autodiff is not to look behind: in their place it meets Funcs of zeros, until they are put back.
class Holes {
public:
    explicit Holes(const Func &output) : pipeline(Internal::find_transitive_calls(output.function())) {}

    Func hide(const Func &real) {
        Func hole(real.name() + "_hole");
        hole(real.args()) = Internal::make_zero(real.type());
        holes.emplace_back(real, hole);
        put(hole, real);
        return hole;
    }
    /// Also in what has been derived. `seeds` take the place of the gradients that they are.
    void fill(const std::vector<Func> &derived, const std::vector<std::pair<Func, Func>> &seeds) {
        for (const Func &f : derived)
            for (auto &stage : Internal::find_transitive_calls(f.function())) pipeline.insert(stage);
        for (const auto &list : {holes, seeds})
            for (const auto &[real, hole] : list) put(real, hole);
    }

private:
    std::map<std::string, Internal::Function> pipeline;
    std::vector<std::pair<Func, Func>> holes;

    void put(const Func &now, const Func &before) {
        for (auto &stage : pipeline)  // sums call themselves
            if (!stage.second.same_as(now.function()) && !stage.second.same_as(before.function()))
                stage.second.substitute_calls(before.function(), now.function());
    }
};

/// Autodiff reads what it meets at clamp(x, ..) and adds 0 outside of bounds that it was told. Those of rows, elements and heads hold
/// wherever a gradient is computed; what says so would cost a gather, or two more copies of all loops. Of features they stay: a tile
/// of them may reach past the last one.
class WithoutGuards : public Internal::IRMutator {
    const std::set<std::string> inside = {"b", "h", "g", "i", "j", "d", "e"};

    int variables_of(const Expr &x) const {
        struct Visitor : Internal::IRVisitor {
            std::set<std::string> names;
            using IRVisitor::visit;
            void visit(const Internal::Variable *op) override {
                if (!op->param.defined()) names.insert(op->name);
            }
        } all;
        x.accept(&all);
        int count = 0;
        for (const std::string &name : all.names) count += inside.count(name) ? 1 : 100;
        return count;
    }
    Expr clamped(const Expr &x, const Expr &limit, const Expr &same) const {
        const auto *variable = x.as<Internal::Variable>();
        return variable && inside.count(variable->name) && variables_of(limit) == 0 ? x : same;
    }
    template<class MinOrMax>
    Expr unclamped(const MinOrMax *op) {
        const Expr a = mutate(op->a), b = mutate(op->b);
        return clamped(a, b, clamped(b, a, MinOrMax::make(a, b)));
    }

protected:
    using IRMutator::visit;
    Expr visit(const Internal::Min *op) override { return unclamped(op); }
    Expr visit(const Internal::Max *op) override { return unclamped(op); }
    Expr visit(const Internal::Call *op) override {
        return op->is_intrinsic(Internal::Call::likely) ? mutate(op->args[0]) : IRMutator::visit(op);
    }
    Expr visit(const Internal::Let *op) override {
        const Expr value = mutate(op->value);
        if (value.as<Internal::Variable>()) return mutate(Internal::substitute(op->name, value, op->body));
        return Internal::Let::make(op->name, value, mutate(op->body));
    }
    Expr visit(const Internal::Select *op) override {
        const bool guard = Internal::is_const_zero(op->false_value) && variables_of(op->condition) == 1;
        return guard ? mutate(op->true_value) : IRMutator::visit(op);
    }
};

}  // namespace

PowerBackwardFuncs power_backward(const Func &q, const Func &k, const Func &v, const Func &log_decay, const Func &state_in,
                                  const Func &keys_in, const Func &out, const Func &dout, const Func &dstate_out,
                                  const Func &dkeys_out, const PowerExtents &extents, const PowerOptions &options,
                                  const PowerSizes &sizes) {
    const int C = sizes.chunk;
    Var b("b"), h("h"), g("g"), i("i"), j("j"), d("d"), f("f"), e("e"), u("u");
    PowerBackwardFuncs w;
    w.out = out, w.dout = dout, w.dstate_out = dstate_out, w.dkeys_out = dkeys_out;

    // Denominators, in blocks; and the chunk to be differentiated, whose phi and weights they are the sums of.
    const PowerFuncs sums = power(q, k, v, log_decay, state_in, keys_in, extents.key, extents.features, options, sizes);
    PowerSizes whole = sizes;
    whole.block = 0, whole.causal_tile = C;
    PowerOptions normalized = options;
    normalized.normalize = 1;  // autodiff wants to see the ends of sums; what does not count is multiplied by 0
    w.p = power(q, k, v, log_decay, state_in, keys_in, extents.key, extents.features, normalized, whole);
    PowerFuncs &p = w.p;
    w.den_block = sums.den_block, w.den_inter = sums.den_inter, w.den_intra = sums.den_intra, w.row = sums.row;
    w.over_feature_weight = sums.over_feature_weight, w.over_block = sums.over_block;
    w.over_key_weight = sums.over_key_weight;
    for (Func stage : {sums.den_block, sums.den_intra, sums.row})
        for (const auto &[own, shared] : {std::pair(sums.phi_q, p.phi_q), {sums.weights, p.weights}, {sums.unit, p.unit}})
            stage.function().substitute_calls(own.function(), shared.function());

    w.dnum = Func("dnum");
    w.dnum(e, i, g, h, b) = dout(e, i, g, h, b) * w.row(i, g, h, b);
    w.over_value = RDom(0, extents.value * options.normalize, "over_value");
    w.from_out = Func("from_out");
    w.from_out(i, g, h, b) += out(w.over_value, i, g, h, b) * dout(w.over_value, i, g, h, b);
    w.dden = Func("dden");
    w.dden(i, g, h, b) = select(options.normalize != 0, -w.from_out(i, g, h, b) * w.row(i, g, h, b), 0.0f);

    // Any Func that depends on all that the chunk computes.
    Func all("all");
    all(e, f, i, g, h, b) = p.num_inter(e, i, g, h, b) + p.num_intra(e, i, g, h, b) + p.den_inter(i, g, h, b) +
                            p.den_intra(i, g, h, b) + p.contribution(e, f, h, b) + p.keys_contribution(f, h, b);
    Holes holes(all);
    const Func of_state = holes.hide(state_in), of_keys_sum = holes.hide(keys_in), of_v = holes.hide(v);
    const Func of_phi_q = holes.hide(p.phi_q), of_phi_k = holes.hide(p.phi_k);
    const Func of_queries = holes.hide(p.queries), of_keys = holes.hide(p.keys);
    holes.hide(p.decay_steps), holes.hide(p.decay_rest);
    Func one("one");
    one(e, f, i, g, h, b) = 1.0f;
    const Region everywhere = {{0, extents.value - 1}, {0, extents.features - 1}, {0, C - 1},
                               {0, extents.group - 1}, {0, extents.heads - 1},    {0, extents.batch - 1}};
    const Derivative derivative = propagate_adjoints(all, one, everywhere);
    auto derived = [&](const char *name, const Func &of) {
        return adjoint_of(derivative, name, of, of.num_update_definitions() - 1);
    };
    w.dweights = derived("weights", p.weights), w.dscores = derived("scores", p.scores);
    w.dqueries = derived("queries", of_queries), w.dkeys = derived("keys", of_keys), w.dvalues = derived("values", of_v);
    w.dphi_q = derived("phi_q", of_phi_q), w.dphi_k = derived("phi_k", of_phi_k);
    w.from_queries = derived("state_in", of_state), w.keys_from_queries = derived("keys_in", of_keys_sum);
    const std::vector<Func> gradients = {w.dweights, w.dscores,      w.dqueries,         w.dkeys, w.dvalues, w.dphi_q,
                                         w.dphi_k,   w.from_queries, w.keys_from_queries};
    WithoutGuards without_guards;
    for (const Func &gradient : gradients) gradient.function().mutate(&without_guards);
    holes.fill(gradients, {{w.dnum, derived("num_inter", p.num_inter)},
                           {w.dnum, derived("num_intra", p.num_intra)},
                           {w.dden, derived("den_inter", p.den_inter)},
                           {w.dden, derived("den_intra", p.den_intra)},
                           {dstate_out, derived("contribution", p.contribution)},
                           {dkeys_out, derived("keys_contribution", p.keys_contribution)}});

    // Through phi.
    const Expr factors = p.phi.open ? clamp(options.degree, 1, most_factors) : Expr(sizes.degree);
    w.over_factor_q = RDom(0, factors, 0, extents.features, "over_factor_q");
    w.over_factor_k = RDom(0, factors, 0, extents.features, "over_factor_k");
    w.dqueries_state = Func("dqueries_state");
    {
        const RVar s = w.over_factor_q.x, n = w.over_factor_q.y;
        w.dqueries_state(d, i, g, h, b) = 0.0f;
        w.dqueries_state(p.phi.element_of(s, n), i, g, h, b) +=
            w.dphi_q(n, i, g, h, b) * p.phi.without(s, n, [&](const Expr &a) { return p.queries(a, i, g, h, b); });
    }
    w.dkeys_state = Func("dkeys_state");
    {
        const RVar s = w.over_factor_k.x, n = w.over_factor_k.y;
        w.dkeys_state(d, j, h, b) = 0.0f;
        w.dkeys_state(p.phi.element_of(s, n), j, h, b) +=
            w.dphi_k(n, j, h, b) * p.phi.without(s, n, [&](const Expr &a) { return p.keys(a, j, h, b); });
    }
    w.dquery = Func("dquery");
    w.dquery(d, i, g, h, b) = w.dqueries(d, i, g, h, b) + w.dqueries_state(d, i, g, h, b) * p.row_decay(i, h, b);
    w.dq = Func("dq_chunk");
    w.dq(d, i, g, h, b) = w.dquery(d, i, g, h, b) * p.unit(i, g, h, b);
    w.dkey = Func("dkey");
    w.dkey(d, j, h, b) = w.dkeys(d, j, h, b) + w.dkeys_state(d, j, h, b) * p.key_decay(j, h, b);

    // The initial state.
    w.dstate = Func("dstate");
    w.dstate(e, f, h, b) = decayed(p.chunk_decay(h, b), dstate_out(e, f, h, b), w.from_queries(e, f, h, b));
    w.dkeys_sum = Func("dkeys_sum");
    w.dkeys_sum(f, h, b) = decayed(p.chunk_decay(h, b), dkeys_out(f, h, b), w.keys_from_queries(f, h, b));

    // Gates.
    w.over_query_element = RDom(0, extents.key, 0, extents.group, "over_query_element");
    w.along_row = Func("along_row");
    w.along_row(i, h, b) += p.queries(w.over_query_element.x, i, w.over_query_element.y, h, b) *
                            w.dquery(w.over_query_element.x, i, w.over_query_element.y, h, b);
    w.over_key_element = RDom(0, extents.key, "over_key_element");
    w.along_key = Func("along_key");
    w.along_key(j, h, b) += p.keys(w.over_key_element, j, h, b) * w.dkeys(w.over_key_element, j, h, b);
    w.along_end = Func("along_end");
    w.along_end(j, h, b) += p.keys(w.over_key_element, j, h, b) * w.dkeys_state(w.over_key_element, j, h, b);
    const int block = sizes.block;
    const Expr blocks = Internal::simplify((p.phi.features + block - 1) / block);
    const bool whole_blocks = Internal::can_prove(p.phi.features % block == 0);
    auto features_of_block = [&](const Expr &extent, const char *name) {
        RDom over(0, extent, name);
        if (!whole_blocks) over.where(u * block + over < p.phi.features);
        return over;
    };
    auto feature_of = [&](const Expr &n) { return whole_blocks ? u * block + n : min(u * block + n, p.phi.features - 1); };
    w.over_state = features_of_block(block, "over_state");
    w.along_block = Func("along_block");
    w.along_block(e, u, h, b) += state_in(e, feature_of(w.over_state), h, b) * dstate_out(e, feature_of(w.over_state), h, b);
    w.over_state_block = RDom(0, blocks, "over_state_block");
    w.along_state = Func("along_state");
    w.along_state(e, h, b) += w.along_block(e, w.over_state_block, h, b);
    w.over_keys = features_of_block(block * options.normalize, "over_keys");
    w.along_keys_block = Func("along_keys_block");
    w.along_keys_block(u, h, b) += keys_in(feature_of(w.over_keys), h, b) * dkeys_out(feature_of(w.over_keys), h, b);
    w.along_keys = Func("along_keys");
    w.along_keys(h, b) += w.along_keys_block(w.over_state_block, h, b);
    w.over_kept = RDom(0, extents.value, "over_kept");
    w.kept = Func("kept");
    w.kept(h, b) = w.along_keys(h, b);
    w.kept(h, b) += w.along_state(w.over_kept, h, b);
    w.over_row = RDom(0, C, "over_row");
    w.dgates = Func("dgates");
    const Expr r = w.over_row, degree = p.phi.open ? cast<float>(options.degree) : Expr((float)sizes.degree);
    w.dgates(i, h, b) = w.kept(h, b) * (p.chunk_decay(h, b)[0] + p.chunk_decay(h, b)[1]);
    w.dgates(i, h, b) +=
        select(r >= i, w.along_row(r, h, b) - w.along_key(r, h, b), w.along_end(r, h, b) * p.key_decay(r, h, b)) / degree;
    return w;
}

}  // namespace holdfast

// The stages of chunkwise_backward.h.
#include "chunkwise_backward.h"
#include "adjoint.h"
#include "decay.h"
#include "operands.h"

#include <string>
#include <utility>
#include <vector>

using namespace Halide;

namespace holdfast {
namespace {

/// Nothing here is read past its end but for features, and those are 0 there. And gives `placeholder` its value.
class UnguardAndPut : public Unguard {
public:
    UnguardAndPut(const Param<int> &placeholder, const Expr &value) : placeholder(placeholder), value(value) {}

private:
    const Param<int> placeholder;
    const Expr value;
    using Unguard::visit;

    Expr visit(const Internal::Variable *op) override { return op->name == placeholder.name() ? value : op; }
};

/// The update of `f` that reads `factor`.
int update_reading(const Func &f, const Func &factor) {
    for (int u = 0; u < f.num_update_definitions(); u++) {
        struct Find : Internal::IRVisitor {
            std::string name;
            bool found = false;
            using IRVisitor::visit;
            void visit(const Internal::Call *op) override {
                found |= op->name == name;
                IRVisitor::visit(op);
            }
        } find;
        find.name = factor.name();
        f.update_value(u).accept(&find);
        if (find.found) return u;
    }
    _halide_user_error << "no update of " << f.name() << " reads " << factor.name() << "\n";
    return -1;
}

/// `sum`, two derived sums, one of them over scaled * other where scaled = factor * value and the factor is a row's: as factor *
/// product, to which the other one adds. The product, over value * other, is put where `product` is.
Func take_out(const Func &sum, const Func &scaled, const Func &value, const Func &factor, Func &product) {
    const int reads_scaled = update_reading(sum, scaled);
    _halide_user_assert(sum.num_update_definitions() == 2) << sum.name() << " is not two sums\n";
    struct Rename : Internal::IRMutator {
        const std::vector<std::pair<Func, Func>> names;
        explicit Rename(const std::vector<std::pair<Func, Func>> &names) : names(names) {}
        using IRMutator::visit;
        Expr visit(const Internal::Call *op) override {
            for (const auto &[from, to] : names)
                if (op->call_type == Internal::Call::Halide && op->name == from.name()) return to(op->args);
            return IRMutator::visit(op);
        }
    };
    // Over a domain of its own: that of a variable in the derived one still has the extents that autodiff saw.
    const auto update = [&](int u, Rename rename) {
        Region region;
        const auto &rvars = sum.function().update(u).schedule().rvars();
        for (const auto &rvar : rvars) region.emplace_back(rvar.min, rvar.extent);
        const RDom over(region);
        Expr value = rename.mutate(sum.update_value(u));
        for (size_t n = 0; n < rvars.size(); n++) value = Internal::substitute(rvars[n].var, over[(int)n], value);
        return value;
    };
    const std::vector<Var> args = sum.args();
    const size_t n = args.size();
    product = Func(sum.name() + "_from_state");
    product(args) = 0.0f;
    product(args) = update(reads_scaled, Rename({{sum, product}, {scaled, value}}));
    Func taken_out(sum.name() + "_of_rows");
    taken_out(args) = factor(args[1], args[2], args[n - 2], args[n - 1]) * product(args);
    taken_out(args) = update(1 - reads_scaled, Rename({{sum, taken_out}}));
    return taken_out;
}

/// RDom::where of an update that is there.
void where(const Func &f, int update, const Expr &condition) {
    Expr &predicate = f.function().update(update).predicate();
    predicate = predicate.defined() ? predicate && condition : condition;
}

}  // namespace

ChunkwiseBackwardFuncs chunkwise_backward(const Func &q, const Func &k, const Func &v, const Func &log_decay,
                                          const Func &state_in, const Func &dout, const Func &dstate_out, const Chunks &chunks,
                                          const ChunkwiseBackwardExtents &extents, const Expr &scale,
                                          const ChunkwiseSizes &sizes) {
    const int C = sizes.chunk;
    Var b("b"), h("h"), c("c"), i("i"), j("j"), d("d"), e("e");
    ChunkwiseBackwardFuncs r;
    // Autodiff takes no sum whose bounds depend on a pure variable: those of the gradients are trimmed below.
    ChunkwiseSizes untrimmed = sizes;
    untrimmed.causal_tile = C, untrimmed.operands = Dtype::f32;  // rounded below
    r.f = chunkwise(q, k, v, log_decay, state_in, chunks, extents.key, scale, untrimmed);
    r.dout = dout, r.dstate_out = dstate_out;

    // One chunk, with holes for the gates and for what comes from its neighbours: the state before it, the gradient of the one
    // after it.
    std::vector<std::pair<Func, Func>> holes;
    for (const Func &f : {r.f.row_decay, r.f.key_decay, r.f.mask, r.f.state}) holes.emplace_back(f, hole_for(f));
    const Func before = holes.back().second;
    r.dstate_next = Func("dstate_next");
    r.dstate_next(e, d, c, h, b) = undef<float>();
    holes.emplace_back(r.dstate_next, hole_for(r.dstate_next));
    const Func dafter = holes.back().second;
    for (const auto &[f, hole] : holes) replace({r.f.out, r.f.contribution}, f, hole);

    // A number per chunk whose gradient is the vector-Jacobian product. Autodiff makes one sum of two that have the same extents:
    // that over values gets one of its own, until it is done.
    Param<int> value_extent(Internal::unique_name("value_extent"));
    RDom over_out(0, value_extent, 0, C, 0, extents.group, "over_out");
    RDom over_after(0, value_extent, 0, extents.key, "over_after");
    Func one("one"), loss("loss");
    one(c, h, b) = 1.0f;
    loss(c, h, b) += r.f.out(over_out.x, over_out.y, c, over_out.z, h, b) * dout(over_out.x, over_out.y, c, over_out.z, h, b);
    loss(c, h, b) += r.f.contribution(over_after.x, over_after.y, c, h, b) * dafter(over_after.x, over_after.y, c, h, b);
    const Derivative grad =
        propagate_adjoints(loss, one, {{0, chunks.count - 1}, {0, extents.heads - 1}, {0, extents.batch - 1}});

    // The adjoint of a sum that the stages before it read is that of its update.
    UnguardAndPut unguard(value_extent, extents.value);
    auto adjoint = [&](const char *name, const Func &of, int update = -1) {
        Func derived = adjoint_of(grad, name, of, update);
        derived.function().mutate(&unguard);
        return derived;
    };
    r.dout_staged = adjoint("out", r.f.out), r.dintra = adjoint("intra", r.f.intra, 0);
    r.dinter = adjoint("inter", r.f.inter, 0), r.dstate_from_inter = adjoint("state", before);
    r.dweights = adjoint("weights", r.f.weights), r.dscores = adjoint("scores", r.f.scores, 0);
    r.dcontribution = adjoint("contribution", r.f.contribution, 0);
    r.dkeys_decayed = adjoint("keys_decayed", r.f.keys_decayed);
    r.dq = adjoint("q", q), r.dk = adjoint("k", k), r.dv = adjoint("v", v);
    if (sizes.operands != Dtype::f32) {
        r.dq = take_out(r.dq, r.dinter, r.dout_staged, r.f.row_decay, r.dq_from_state);
        r.dv = take_out(r.dv, r.f.keys_decayed, k, r.f.key_decay, r.dv_from_state);
    }
    const std::vector<Func> derived = {r.dq, r.dk, r.dv, r.dstate_from_inter, r.f.contribution};

    // Keys until row i, rows from key j on; whole tiles of them, as in the forward's sum.
    if (sizes.causal_tile < C) {
        const auto tile = [&](const Expr &row) { return row / sizes.causal_tile * sizes.causal_tile; };
        const int dq = update_reading(r.dq, r.dscores), dk = update_reading(r.dk, r.dscores),
                  dv = update_reading(r.dv, r.dintra);
        // A variable of a derived sum is known by its name alone.
        const auto first = [](const Func &f, int update) {
            return Internal::Variable::make(Int(32), Func(f).rvars(update)[0].name());
        };
        where(r.dq, dq, first(r.dq, dq) < tile(r.dq.update_args(dq)[1]) + sizes.causal_tile);
        where(r.dk, dk, first(r.dk, dk) >= tile(r.dk.update_args(dk)[1]));
        where(r.dv, dv, first(r.dv, dv) >= tile(r.dv.update_args(dv)[1]));
        // What the mask makes zero need not be summed: in blocks of two tiles, as wide as vectors are.
        const int block = 2 * sizes.causal_tile;
        const std::vector<Var> at = r.dweights.args();
        if (C % block == 0) where(r.dweights, 0, at[0] / block <= at[1] / block);
    }

    // The scan, which leaves out the final states, and back.
    where(r.f.state, 1, chunks.next(r.f.over_chunk) < chunks.count);
    r.over_sequence = RDom(0, chunks.slots - chunks.count, "over_sequence_back");
    r.over_chunk = RDom(0, chunks.count, "over_chunk_back");
    const Expr in = chunks.count - 1 - r.over_chunk;
    r.dstate = Func("dstate");
    r.dstate(e, d, c, h, b) = undef<float>();
    r.dstate(e, d, chunks.count + r.over_sequence, h, b) = dstate_out(e, d, r.over_sequence, h, b);
    r.dstate(e, d, in, h, b) =
        decayed(r.f.chunk_decay(in, h, b), r.dstate(e, d, chunks.next(in), h, b), r.dstate_from_inter(e, d, in, h, b));
    r.dstate_next = Func("dstate_next");
    r.dstate_next(e, d, c, h, b) = r.dstate(e, d, chunks.next(c), h, b);
    holes.back().first = r.dstate_next;
    for (const auto &[f, hole] : holes) replace(derived, hole, f);

    // Gates. <S, dS> of the state after the chunk without that state.
    r.over_query = RDom(0, extents.key, 0, extents.group, "over_query");
    r.row_product = Func("row_product");
    r.row_product(i, c, h, b) +=
        q(r.over_query.x, i, c, r.over_query.y, h, b) * r.dq(r.over_query.x, i, c, r.over_query.y, h, b);
    r.over_key = RDom(0, extents.key, "over_key_product");
    r.key_product = Func("key_product");
    r.key_product(j, c, h, b) += k(r.over_key, j, c, h, b) * r.dk(r.over_key, j, c, h, b);
    r.over_value = RDom(0, extents.value, "over_value");
    r.state_product = Func("state_product");
    r.state_product(d, c, h, b) += r.f.state(r.over_value, d, c, h, b) * r.dcontribution(r.over_value, d, c, h, b);
    r.over_token = RDom(0, C, "over_token_product");
    r.added_product = Func("added_product");
    r.added_product(d, c, h, b) += r.f.keys_decayed(d, r.over_token, c, h, b) * r.dkeys_decayed(d, r.over_token, c, h, b);
    r.over_state = RDom(0, extents.key, "over_state_product");
    r.end_product = Func("end_product");
    const Tuple decay = r.f.chunk_decay(c, h, b);
    r.end_product(c, h, b) +=
        (decay[0] + decay[1]) * r.state_product(r.over_state, c, h, b) + r.added_product(r.over_state, c, h, b);
    r.over_row = RDom(0, C, "over_row_back");
    r.dlog_decay = Func("dlog_decay_chunks");
    r.dlog_decay(i, c, h, b) = r.end_product(c, h, b);
    r.dlog_decay(i, c, h, b) +=
        select(r.over_row >= i, r.row_product(r.over_row, c, h, b) - r.key_product(r.over_row, c, h, b), 0.0f);

    // Both products of dscores read the same ones, and both sums of dkeys_decayed: what gates add and take back cancels as before.
    // <S, dS> is of fp32: of states that decay slowly it is larger than what else is in a gradient of gates.
    r.weights_read = round_operand(r.f.weights, {r.dv}, sizes.operands);
    r.dscores_read = round_operand(r.dscores, {r.dq, r.dk}, sizes.operands);
    r.state_read = round_operand(r.f.state, {r.dq_from_state}, sizes.operands);
    r.dstate_read = round_operand(r.dcontribution, {r.dkeys_decayed, r.dv_from_state}, sizes.operands);
    return r;
}

}  // namespace holdfast

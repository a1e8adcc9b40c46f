// Products on tensor cores, asked for wrongly: each must stop the build and say why; beside them what is right must build.
// What the code computes is for tests/cuda.
#include "../../generators/operands.h"
#include "../../schedules/cuda/fragments.h"

#include <gtest/gtest.h>

namespace {
using namespace Halide;
using namespace holdfast;
using cuda::Fragments;

/// A causal square of products and a product of that: out = (lower triangle of q k^T) v, for one block of size x size.
struct Attention {
    static constexpr int size = 64;
    ImageParam Q{BFloat(16), 3, "Q"}, K{BFloat(16), 3, "K"}, V{BFloat(16), 3, "V"};
    Var d{"d"}, e{"e"}, i{"i"}, j{"j"}, c{"c"}, block{"block"};
    RDom over_d{0, size, "over_d"}, over_j;
    Func q{"q"}, k{"k"}, v{"v"}, scores{"scores"}, weights{"weights"}, sum{"sum"}, out{"out"};
    LoopLevel at;

    explicit Attention(bool rounded = true, int keys = size) : over_j(0, keys, "over_j") {
        for (ImageParam *p : {&Q, &K, &V}) {
            p->set_host_alignment(16);
            p->dim(0).set_bounds(0, size), p->dim(1).set_bounds(0, keys), p->dim(2).set_min(0);
            for (int m : {1, 2}) p->dim(m).set_stride(p->dim(m).stride() / 8 * 8);
        }
        q(d, i, c) = cast<float>(Q(d, i, c)), k(d, j, c) = cast<float>(K(d, j, c)), v(e, j, c) = cast<float>(V(e, j, c));
        scores(j, i, c) += q(over_d, i, c) * k(over_d, j, c);
        weights(j, i, c) = select(j <= i, scores(j, i, c), 0.0f);
        sum(e, i, c) += weights(over_j, i, c) * v(e, over_j, c);
        out(e, i, c) = sum(e, i, c);
        if (rounded) round_operand(weights, {sum}, Dtype::bf16);
        out.bound(e, 0, size).bound(i, 0, keys).reorder(e, i, c).gpu_blocks(c);
        at = LoopLevel(out, c);
    }
    void stage(int warps, int keys = size) {
        cuda::stage(Q.in(q), warps, Q.in(q).args()[0], size, Q.in(q).args()[1], keys, at);
        cuda::stage(K.in(k), warps, K.in(k).args()[0], size, K.in(k).args()[1], keys, at);
        cuda::stage(V.in(v), warps, V.in(v).args()[0], size, V.in(v).args()[1], keys, at);
    }
    void schedule(const Fragments &square, const Fragments &tile) {
        tile.result(out, e, i);
        square.product(scores, j, i, {over_d}, at);
        tile.product(sum, e, i, {over_j}, at);
        stage(tile.warps());
    }
    /// "", or why it does not build.
    std::string build(const std::string &features = "") {
        const Target target("x86-64-linux-cuda-cuda_capability_80-no_runtime" + features);
        set_compiler_stack_size(0);  // an error thrown on a stack of Halide's own confuses the address sanitizer
        try {
            Pipeline pipeline(out);
            cuda::add_passes(pipeline, target);
            pipeline.compile_to_module({Q, K, V}, "kernel", target);
            return "";
        } catch (const Error &error) {
            return error.what();
        }
    }
};

const Fragments square(64, 64, 64, 16);

void expect_refused(Attention &a, const std::string &func, const std::string &reason) {
    const std::string error = a.build();
    EXPECT_NE(error.find("holdfast: CUDA: "), std::string::npos) << (error.empty() ? "it built" : error);
    EXPECT_NE(error.find(func), std::string::npos) << error;
    EXPECT_NE(error.find(reason), std::string::npos) << error;
}

TEST(TensorCores, Build) {
    Attention a;
    a.schedule(square, square);
    EXPECT_EQ(a.build(), "");
}

TEST(TensorCores, RegistersOfOneThreadAreLeftAlone) {
    ImageParam in(BFloat(16), 2, "in");
    Var x("x"), y("y"), xi("xi"), yi("yi");
    Func f("f"), out("out");
    f(x, y) = cast<float>(in(x, y)) * 2.0f;
    out(x, y) = cast<bfloat16_t>(f(x, y) + f(x, y + 1) + cast<float>(cast<bfloat16_t>(3.0f)));
    out.gpu_tile(x, y, xi, yi, 16, 8);
    f.compute_at(out, xi).store_in(MemoryType::Register).unroll(y);
    const Target target("x86-64-linux-cuda-cuda_capability_80-no_runtime");
    Pipeline pipeline(out);
    cuda::add_passes(pipeline, target);
    EXPECT_NO_THROW(pipeline.compile_to_module({in}, "kernel", target));
}

TEST(TensorCores, FactorsMustHave16Bits) {
    Attention a(false);
    a.schedule(square, square);
    expect_refused(a, "sum", "a factor of the product is float32");
}

TEST(TensorCores, OneOrientation) {  // scores are held by rows of queries, and read by rows of keys
    Attention a;
    Func other("other"), result("result");
    other(a.e, a.j, a.c) += cast<float>(cast<bfloat16_t>(a.scores(a.j, a.over_j, a.c))) * a.v(a.e, a.over_j, a.c);
    a.out = result;
    a.out(a.e, a.j, a.c) = other(a.e, a.j, a.c);
    a.out.bound(a.e, 0, a.size).bound(a.j, 0, a.size).reorder(a.e, a.j, a.c).gpu_blocks(a.c);
    a.at = LoopLevel(a.out, a.c);
    square.result(a.out, a.e, a.j);
    square.product(a.scores, a.j, a.i, {a.over_d}, a.at);
    square.product(other, a.e, a.j, {a.over_j}, a.at);
    a.stage(4);
    expect_refused(a, "scores", "is owned by thread");
}

TEST(TensorCores, OneDistributionOverWarps) {
    Attention a;
    a.schedule(square, Fragments(64, 64, 32, 32));
    expect_refused(a, "scores", "is owned by thread");
}

TEST(TensorCores, LoopsOverRegistersAreUnrolled) {
    Attention a;
    a.schedule(square, square);
    a.scores.update().serial(Var("tile_col"));
    expect_refused(a, "scores", "must be unrolled");
}

TEST(TensorCores, RowsInSharedMemoryStartAt16Bytes) {
    Attention a;
    a.schedule(square, square);
    a.Q.in(a.q).align_storage(a.Q.in(a.q).args()[0], 3);
    expect_refused(a, "Q", "16-byte boundaries");
}

TEST(TensorCores, RowsInDeviceMemoryStartAt16Bytes) {
    Attention a;
    a.schedule(square, square);
    a.Q.dim(1).set_stride(Expr());
    expect_refused(a, "Q", "16-byte boundaries for sure");
}

TEST(TensorCores, SumsAreInRegisters) {
    Attention a;
    a.schedule(square, square);
    a.scores.store_in(MemoryType::GPUShared);
    expect_refused(a, "scores", "must be stored in registers");
}

TEST(TensorCores, OperandsOfOtherThreadsAreInSharedMemory) {
    Attention a;
    a.schedule(square, square);
    a.V.in(a.v).store_in(MemoryType::Register);
    expect_refused(a, "V", "is owned by thread");
}

TEST(TensorCores, LoopsOfOneFragmentAreTogether) {
    Attention a;
    a.schedule(square, square);
    a.scores.update().reorder(Var("tile_col"), Var("mma_col"));
    expect_refused(a, "scores", "expected one store");
}

TEST(TensorCores, LanesAreTheFragments) {  // columns by 8 lanes and rows by 4: not how the hardware has them
    Attention a;
    Var e = a.e, i = a.i, q("q"), r("r"), nt("nt"), mt("mt"), ni("mma_col"), mi("mma_row"), lane("lane"), w("w");
    RVar k_in("mma_k"), k_out("k_out");
    square.result(a.out, e, i);
    square.product(a.scores, a.j, i, {a.over_d}, a.at);
    square.keep(a.sum, e, i, a.at);
    a.sum.update()
        .split(e, nt, q, 16)
        .split(q, q, ni, 2)
        .split(i, w, mi, 16)
        .split(mi, mt, mi, 8)
        .split(mi, mi, r, 4)
        .split(a.over_j.x, k_out, k_in, 16)
        .fuse(q, r, lane)
        .reorder({ni, mi, k_in, nt, mt, k_out, lane, w})
        .unroll(nt)
        .unroll(mt)
        .unroll(k_out)
        .gpu_threads(lane, w);
    a.stage(4);
    expect_refused(a, "sum", "fragments of one warp");
}

TEST(TensorCores, SizesAreWholeTiles) {
    Attention a(true, 60);
    a.schedule(square, square);
    expect_refused(a, "sum", "over 12; a fragment needs 0 over 16 (sizes that are not multiples of the tile");
    EXPECT_THROW(Fragments(64, 60, 64, 16), Error);
}

}  // namespace

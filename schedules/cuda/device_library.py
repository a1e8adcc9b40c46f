#!/usr/bin/env python3
"""device_library.py libHalide.so out.cpp: Halide's PTX device library, as it is in the installed libHalide, with the
functions that schedules/cuda calls linked in. out.cpp defines the two symbols that Halide reads it from; in an
executable they take the place of libHalide's own. Nothing of Halide's is kept in the repository.

Each function is an LLVM intrinsic whose operands and results are put into the types that Halide has: several
registers are one wide integer. llvmlite 0.45 has LLVM 20, which reads what LLVM 21 wrote here, and writes what Halide
21 reads.
"""

import ctypes
import sys

import llvmlite.binding as llvm


def define(result, name, parameters, body):
    listed = ", ".join(f"{kind} %{n}" for n, kind in parameters)
    return [f"define weak_odr {result} @{name}({listed}) alwaysinline nounwind convergent {{", *body, "}"]


def pack(count, element):
    """Returns %r, a struct of `count` elements of 32 bits, as one integer."""
    struct, lines = "{ " + ", ".join([element] * count) + " }", []
    for i in range(count):
        lines.append(f"  %e{i} = extractvalue {struct} %r, {i}")
        vector = "poison" if i == 0 else f"%v{i - 1}"
        lines.append(f"  %v{i} = insertelement <{count} x {element}> {vector}, {element} %e{i}, i32 {i}")
    bits = 32 * count
    return [*lines, f"  %o = bitcast <{count} x {element}> %v{count - 1} to i{bits}", f"  ret i{bits} %o"]


def mma(name, intrinsic, pair):
    """Four sums, then two operands of four and of two registers, each register a pair of 16-bit numbers."""
    sums, operands = [f"c{i}" for i in range(4)], ["a0", "a1", "a2", "a3", "b0", "b1"]
    struct = "{ " + ", ".join(["float"] * 4) + " }"
    types = ", ".join([pair] * 6 + ["float"] * 4)
    values = ", ".join([f"{pair} %pair_{o}" for o in operands] + [f"float %{c}" for c in sums])
    body = [f"  %pair_{o} = bitcast i32 %{o} to {pair}" for o in operands]
    body += [f"  %r = call {struct} @{intrinsic}({values})", *pack(4, "float")]
    parameters = [(c, "float") for c in sums] + [(o, "i32") for o in operands]
    return [f"declare {struct} @{intrinsic}({types})", *define("i128", name, parameters, body)]


def ldmatrix(count, transposed):
    suffix = "_trans" if transposed else ""
    struct = "{ " + ", ".join(["i32"] * count) + " }"
    intrinsic = f"llvm.nvvm.ldmatrix.sync.aligned.m8n8.x{count}{suffix.replace('_', '.')}.b16.p3"
    body = [
        "  %p = inttoptr i32 %address to ptr addrspace(3)",
        f"  %r = call {struct} @{intrinsic}(ptr addrspace(3) %p)",
    ]
    lines = define(
        f"i{32 * count}", f"holdfast_ldmatrix_x{count}{suffix}", [("address", "i32")], body + pack(count, "i32")
    )
    return [f"declare {struct} @{intrinsic}(ptr addrspace(3))", *lines]


def statement(name, parameters, before, call, declaration):
    """A function that returns nothing of interest."""
    return [declaration, *define("i32", name, parameters, [*before, f"  call void {call}", "  ret i32 0"])]


def convert(name, vector, intrinsic):
    """Two fp32 to two of 16 bits, the first one above the second."""
    body = [
        f"  %r = call {vector} @{intrinsic}(float %high, float %low)",
        f"  %o = bitcast {vector} %r to i32",
        "  ret i32 %o",
    ]
    return [
        f"declare {vector} @{intrinsic}(float, float)",
        *define("i32", name, [("high", "float"), ("low", "float")], body),
    ]


def functions():
    lines = mma("holdfast_mma_m16n8k16_bf16", "llvm.nvvm.mma.m16n8k16.row.col.bf16", "i32")
    lines += mma("holdfast_mma_m16n8k16_f16", "llvm.nvvm.mma.m16n8k16.row.col.f32.f32", "<2 x half>")
    for count in (2, 4):
        lines += ldmatrix(count, False) + ldmatrix(count, True)
    shared, device = "ptr addrspace(3)", "ptr addrspace(1)"
    copy = "@llvm.nvvm.cp.async.cg.shared.global.16"
    pointers = [f"  %t = inttoptr i32 %to to {shared}", f"  %f = inttoptr i64 %from to {device}"]
    lines += statement(
        "holdfast_cp_async_16",
        [("to", "i32"), ("from", "i64")],
        pointers,
        f"{copy}({shared} %t, {device} %f)",
        f"declare void {copy}({shared}, {device})",
    )
    commit, wait = "@llvm.nvvm.cp.async.commit.group", "@llvm.nvvm.cp.async.wait.group"
    lines += statement("holdfast_cp_async_commit", [], [], f"{commit}()", f"declare void {commit}()")
    for groups in range(5):
        declaration = "" if groups else f"declare void {wait}(i32)"
        lines += statement(f"holdfast_cp_async_wait_{groups}", [], [], f"{wait}(i32 {groups})", declaration)
    lines += convert("holdfast_cvt_bf16x2", "<2 x bfloat>", "llvm.nvvm.ff2bf16x2.rn")
    lines += convert("holdfast_cvt_f16x2", "<2 x half>", "llvm.nvvm.ff2f16x2.rn")
    body = ["  %r = call bfloat @llvm.nvvm.f2bf16.rn(float %x)", "  %o = bitcast bfloat %r to i16", "  ret i16 %o"]
    lines += ["declare bfloat @llvm.nvvm.f2bf16.rn(float)", *define("i16", "holdfast_cvt_bf16", [("x", "float")], body)]
    return "\n".join(lines) + "\n"


def main(halide, output):
    library, symbol = ctypes.CDLL(halide), "halide_internal_initmod_ptx_dev_ll"
    size = ctypes.c_int.in_dll(library, symbol + "_length").value
    base = llvm.parse_bitcode(bytes((ctypes.c_ubyte * size).in_dll(library, symbol)))
    ours = llvm.parse_assembly(functions())
    ours.triple, ours.data_layout = base.triple, base.data_layout
    base.link_in(ours)
    base.verify()
    code = base.as_bitcode()
    with open(output, "w") as file:
        file.write(f"""// Made by schedules/cuda/device_library.py.
#define VISIBLE extern "C" __attribute__((visibility("default")))
VISIBLE unsigned char {symbol}[];
VISIBLE int {symbol}_length;
unsigned char {symbol}[] = {{{",".join(map(str, code))},0}};
int {symbol}_length = {len(code)};
""")


if __name__ == "__main__":
    main(*sys.argv[1:])

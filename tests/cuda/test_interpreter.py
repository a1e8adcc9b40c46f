"""The tests of the tests: mistakes put into the PTX must be noticed, by a fault or by wrong numbers. And instructions
one by one, where the kernels would not show an error of the interpreter."""

import re

import numpy as np
import ptx
import pytest
from conftest import Call
from rows import TUNED, smallest
from tolerances import OUT, STATE

# On tensor cores, and without.
OF_SIZE = next((r for r in TUNED if r.dtype == "f32" and (r.key_size, r.value_size) == (64, 64)), None)
ROWS = [row for row in (smallest("f16"), OF_SIZE or smallest("f32")) if row]
breaks_kernels = pytest.mark.parametrize("row", ROWS, ids=str)


def noticed(device, row, change, lengths=(70,)):
    """What notices the change: a fault's text, "numbers", or "" when nothing does."""
    changed = []

    def apply(text):
        changed.append(change(text) != text)
        return change(text)

    device.reset(apply)
    call = Call(row, list(lengths), heads=1)
    try:
        call.run(device)
    except ptx.Fault as fault:
        return str(fault)
    assert changed and all(changed)
    out, state = call.errors()
    return "" if out <= OUT[row.dtype] and state <= STATE[row.dtype] else "numbers"


def without(pattern, number):
    """Leaves out the n-th instruction that matches."""

    def change(text):
        found = list(re.finditer(pattern, text))[number]
        return text[: found.start()] + text[found.end() :]

    return change


def text_of(device, row):
    texts = []
    assert noticed(device, row, lambda text: texts.append(text) or text + " ") == ""
    return texts[0]


def count(device, row, pattern):
    found = len(re.findall(pattern, text_of(device, row)))
    assert found
    return found


def by_kernel(device, row, pattern):
    """{kernel: what notices that the n-th instruction in it that matches is left out}"""
    text, kinds = text_of(device, row), {}
    for n, match in enumerate(re.finditer(pattern, text)):
        kernel = re.findall(r"\.entry (\w+)", text[: match.start()])[-1]
        kinds.setdefault(kernel, []).append(noticed(device, row, without(pattern, n)))
    assert kinds
    return kinds


BARRIER, WAIT = r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+0;"
ORDERS = [(BARRIER, "race"), (WAIT, "cp.async has not brought")]
# Of fp32 with K = V = 64, by the beginnings of kernels: how many there are, and those that order nothing, or that
# another follows before anything is read.
OF_FP32 = {
    BARRIER: {"_kernel_contribution": (3, []), "_kernel_out_s1": (11, [0, 1, 4, 5, 6, 9, 10])},
    WAIT: {"_kernel_contribution": (1, []), "_kernel_out_s1": (5, [0, 2, 3])},
}
each_order = [(row, *order) for row in ROWS for order in ORDERS]


@pytest.mark.parametrize(("row", "pattern", "says"), each_order, ids=str)
def test_barriers_and_waits_for_copies_are_missed(device, row, pattern, says):
    kinds = by_kernel(device, row, pattern)
    if not row.round_operands:
        for kernel, found in kinds.items():
            assert any(found) and all(says in kind for kind in found if kind), (kernel, found)
        if row is OF_SIZE:
            unnoticed = {
                start: (len(found), [n for n, kind in enumerate(found) if not kind])
                for start in OF_FP32[pattern]
                for kernel, found in kinds.items()
                if kernel.startswith(start)
            }
            assert unnoticed == OF_FP32[pattern] and len(kinds) == len(unnoticed)
        return
    every = [kind for found in kinds.values() for kind in found]
    if pattern == BARRIER:
        # The last three of the outputs: between two products that only read; before rows go to memory that nothing else
        # has used; and each warp reads back its own rows, which orders lanes of one warp, that are in step here.
        assert every[-3:] == ["", "", ""]
        every = every[:-3]
    assert all(says in kind for kind in every), every


@breaks_kernels
def test_every_copy_is_missed(device, row):
    copy = r"cp\.async\.cg\.shared\.global [^;]*;"
    for n in range(count(device, row, copy)):
        assert noticed(device, row, without(copy, n))


@pytest.mark.parametrize("row", [row for row in ROWS if row.round_operands], ids=str)
@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"(ldmatrix\S*x4\S*) \{(%r\d+), (%r\d+), (%r\d+), (%r\d+)\}", r"\1 {\3, \2, \4, \5}"),
        (r"(ldmatrix\S*)\.trans", r"\1"),
        (r"(ldmatrix\S* \{[^}]*\}, \[%rd\d+)(?:\+\d+)?\]", r"\1+16]"),
        # rows 8 .. 15 of the factor a before rows 0 .. 7
        (r"(mma\.sync\S+\s+\{[^}]*\},\s+)\{(%r\d+), (%r\d+), (%r\d+), (%r\d+)\}", r"\1{\3, \2, \5, \4}"),
        (r"(mma\.sync\S+\s+\{[^}]*\},\s+\{[^}]*\},\s+)\{(%r\d+), (%r\d+)\}", r"\1{\3, \2}"),
        (r"(mma\.sync\S+\s+)\{(%r\d+), (%r\d+), (%r\d+), (%r\d+)\}", r"\1{\3, \2, \4, \5}"),
        (r"cvt\.rn\.f16x2\.f32(\s+%r\d+), (%r\d+), (%r\d+)", r"cvt.rn.f16x2.f32\1, \3, \2"),
    ],
)
def test_every_wrong_fragment_is_noticed(device, row, pattern, replacement):
    places = list(re.finditer(pattern, text_of(device, row)))
    assert places
    for n in range(0, len(places), max(1, len(places) // 4)):

        def change(text, n=n):
            m = list(re.finditer(pattern, text))[n]
            return text[: m.start()] + m.expand(replacement) + text[m.end() :]

        assert noticed(device, row, change), f"{n}: {places[n].group(0)}"


# Instructions


def run(body, inputs=(), threads=32, shared=0):
    """Runs instructions between loading %r1 .. from `inputs`, arrays of 32-bit words, and storing %r0."""
    memory = ptx.Memory(1 << 16)
    memory.state[:] = 2
    loads = "\n".join(f"ld.global.b32 %r{i + 1}, [%rd1+{(i + 1) * 4096}];" for i in range(len(inputs)))
    for i, values in enumerate(inputs):
        data = np.resize(values, threads).view(np.uint8)
        memory.bytes[(i + 1) * 4096 : (i + 1) * 4096 + len(data)] = data
    text = f"""
        mov.u32 %r90, %tid.x;
        mul.wide.u32 %rd2, %r90, 4;
        ld.param.b64 %rd3, [p];
        add.s64 %rd1, %rd2, %rd3;
        {loads}
        {body}
        st.global.b32 [%rd1], %r0;
        ret;
    """
    kernel = ptx.Kernel("test", [("p", 8)], text)
    ptx.Launch(kernel, (1, 1, 1), (threads, 1, 1), shared, [memory.base], memory).run()
    return memory.bytes[: 4 * threads].view(np.uint32)


def bits(*numbers):
    return np.array(numbers, np.float32).view(np.uint32)


@pytest.mark.parametrize(
    ("body", "inputs", "expected"),
    [
        ("add.s32 %r0, %r1, -1;", [0], 0xFFFFFFFF),
        ("mul.lo.s32 %r0, %r1, %r2;", [0xFFFFFFFF, 5], 0xFFFFFFFB),
        ("mul.hi.u32 %r0, %r1, %r2;", [0xFFFFFFFF, 5], 4),
        ("mul.wide.s32 %rd9, %r1, 2;\nshr.u64 %rd9, %rd9, 32;\ncvt.u32.u64 %r0, %rd9;", [0xFFFFFFFF], 0xFFFFFFFF),
        ("mad.lo.s32 %r0, %r1, 3, %r2;", [7, 0xFFFFFFFF], 20),
        ("shr.s32 %r0, %r1, 4;", [0x80000000], 0xF8000000),
        ("shr.u32 %r0, %r1, 40;", [0x80000000], 0),
        ("shl.b32 %r0, %r1, 33;", [1], 0),
        ("bfe.u32 %r0, %r1, 8, 4;", [0x1F00], 0xF),
        ("div.s32 %r0, %r1, 2;", [0xFFFFFFFD], 0xFFFFFFFF),
        ("prmt.b32 %r0, %r1, %r2, 0x5410U;", [0xAAAABBBB, 0xCCCCDDDD], 0xDDDDBBBB),
        ("min.s32 %r0, %r1, %r2;", [0xFFFFFFFF, 1], 0xFFFFFFFF),
        ("min.u32 %r0, %r1, %r2;", [0xFFFFFFFF, 1], 1),
        ("setp.lt.s32 %p1, %r1, 0;\nselp.b32 %r0, 5, 6, %p1;", [0xFFFFFFFF], 5),
        ("setp.lt.u32 %p1, %r1, 9;\nselp.b32 %r0, 5, 6, %p1;", [0xFFFFFFFF], 6),
        ("setp.gtu.f32 %p1, %r1, %r1;\nselp.b32 %r0, 5, 6, %p1;", [0x7FC00000], 5),
        ("sqrt.rn.f32 %r0, %r1;", [bits(2)[0]], bits(2**0.5)[0]),
        ("cvt.rzi.s32.f32 %r0, %r1;", [bits(-2.7)[0]], 0xFFFFFFFE),
        ("cvt.rni.f32.f32 %r0, %r1;", [bits(2.5)[0]], bits(2)[0]),
        ("cvt.rmi.ftz.f32.f32 %r0, %r1;", [bits(-2.5)[0]], bits(-3)[0]),
        ("cvt.rn.f32.s32 %r0, %r1;", [0xFFFFFFFF], bits(-1)[0]),
        ("cvt.rn.bf16x2.f32 %r0, %r1, %r2;", [bits(1)[0], 0x3F808000], 0x3F803F80),  # halfway: to even
        ("cvt.rn.f16x2.f32 %r0, %r1, %r2;", [bits(1)[0], bits(-2)[0]], 0x3C00C000),
        ("mov.b32 {%rs1, %rs2}, %r1;\nmov.b32 %r0, {%rs2, %rs1};", [0x12345678], 0x56781234),
        ("fma.rn.f32 %r0, %r1, %r1, %r2;", [bits(1 + 2**-12)[0], bits(-1 - 2**-11)[0]], bits(2**-24)[0]),
    ],
)
def test_instruction(body, inputs, expected):
    assert (run(body, [np.array([x], np.uint32) for x in inputs]) == np.uint32(expected)).all(), body


def test_loops_end_thread_by_thread():
    body = "mov.b32 %r0, 0;\n$again:\nadd.s32 %r0, %r0, 1;\nsetp.lt.u32 %p1, %r0, %r1;\n@%p1 bra $again;"
    counts = np.arange(1, 33, dtype=np.uint32)
    assert (run(body, [counts]) == counts).all()


def test_mma_multiplies():
    """Against the layout tables of the PTX manual, by a product in which every element says where it was."""
    random = np.random.default_rng(1)
    A, B = random.integers(-8, 8, (16, 16)).astype(np.float16), random.integers(-8, 8, (16, 8)).astype(np.float16)
    group, member = np.arange(32) // 4, np.arange(32) % 4

    def pair(matrix, r0, c0, r1, c1):
        return np.stack([matrix[r0, c0], matrix[r1, c1]], 1).view(np.uint32)[:, 0]

    m = 2 * member
    a = [pair(A, group + r, m + k, group + r, m + 1 + k) for k in (0, 8) for r in (0, 8)]
    b = [pair(B, m + k, group, m + 1 + k, group) for k in (0, 8)]
    for r in range(4):
        body = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r20, %r21, %r22, %r23}, {%r1, %r2, %r3, %r4}, "
        body += f"{{%r5, %r6}}, {{%r7, %r7, %r7, %r7}};\nmov.b32 %r0, %r{20 + r};"
        result = run(body, [*a, *b, bits(0.5)]).view(np.float32)
        expected = A.astype(float) @ B.astype(float) + 0.5
        assert (result == expected[group + 8 * (r // 2), m + r % 2]).all()


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("ld.global.b32 %r0, [%rd1+65536];", "outside"),
        ("ld.global.b32 %r0, [%rd1+2];", "multiple of 4"),
        ("cvt.u64.u32 %rd4, %r90;\nld.shared.b32 %r0, [%rd4+256];", "multiple of 4"),
        ("ld.shared.b32 %r0, [%rd2+256];", "outside of the 256 bytes"),
        ("ld.shared.b32 %r0, [%rd2];", "nothing has written"),
        ("selp.b32 %r0, %r90, %r90, %p50;", "before it is set"),
        ("ld.global.b32 %r0, [%rd50];", "multiple of 4"),
        ("setp.lt.u32 %p1, %r90, 7;\n@%p1 bar.sync 0;\nmov.b32 %r0, 0;", "some threads"),
        ("st.shared.b32 [%rd2], %r90;\nld.shared.b32 %r0, [0];", "race"),
        ("st.shared.b32 [0], %r90;\nmov.b32 %r0, 0;", "race"),
        ("frob.b32 %r0, %r90;", "unknown instruction"),
        ("setp.lt.u32 %p1, %r90, 7;\n@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%rd2];", "some lanes"),
    ],
)
def test_fault(body, fault):
    with pytest.raises(ptx.Fault, match=fault):
        run(body, threads=64, shared=256)

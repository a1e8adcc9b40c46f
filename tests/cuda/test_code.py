"""The machine code of all kernels, for every architecture that is compiled: nothing spilt; of chunkwise's and steps'
nothing called; of chunkwise's tensor cores where they are meant, and as many blocks on a multiprocessor as is stated
here."""

import functools
import os

import machine_code
import pytest
from conftest import Call
from occupancy import GPUS, blocks_per_multiprocessor
from rows import ALL, BUILD, CHUNKWISE, RECURRENT, TUNED

ARCHITECTURES = os.environ["HOLDFAST_ARCHITECTURES"].split()
each_tuned_row = pytest.mark.parametrize("row", TUNED, ids=str)


@functools.cache
def all_codes(library):
    (binary,) = machine_code.fat_binaries(library)
    return machine_code.codes(binary)


@functools.cache
def launches(device, row):
    """Of a call for one token, which is not computed."""
    device.reset(execute=False)
    Call(row, [1], heads=1).run(device)
    return device.launches


def code_of(kernels, part):
    """That of the kernel for contributions or outputs."""
    (code,) = (code for name, code in kernels.items() if part in name)
    return code


# Kernels, by the beginning of their names, with so many bytes of memory for each thread: the outputs of power
# retention, which are not tuned.
LOCAL_BYTES = {("power", "_kernel_out_s0"): 64}
BESIDE_THE_TABLE = ["chunk_table", "packed_chunk_table", "convert_state", "sum_decays", "clear_16"]


@pytest.mark.parametrize("library", [*(row.name for row in ALL), *(f"{name}_cuda" for name in BESIDE_THE_TABLE)])
def test_nothing_is_spilt(library):
    codes = all_codes(BUILD / f"lib{library}.a")
    assert sorted(codes) == sorted(ARCHITECTURES)
    kernel = next((row.kernel for row in ALL if row.name == library), library)
    for kernels in codes.values():
        for name, code in kernels.items():
            stated = [size for (of, start), size in LOCAL_BYTES.items() if of == kernel and name.startswith(start)]
            assert code.stack == sum(stated), name
            if not stated:
                assert code.instructions["LDL"] == code.instructions["STL"] == 0, name


@pytest.mark.parametrize("row", CHUNKWISE + RECURRENT, ids=str)
def test_nothing_is_called(row):
    """Divisions, which the others have, are calls where a number is subnormal."""
    for kernels in all_codes(row.library).values():
        for name, code in kernels.items():
            assert code.instructions["CALL"] == 0, name


@each_tuned_row
def test_products_are_on_tensor_cores(row):
    """Of 16 x 8 x 16, in each warp, which has 16 rows: scores C/8 K/16, intra E/8 C/16 and inter E/8 K/16, of a block's
    E = min(V, 64) columns; contributions, whose keys are in two parts, 2 E/8 C/16."""
    C, K, E = row.chunk, row.key_size, min(row.value_size, 64)
    out, contribution = C // 8 * K // 16 + E // 8 * C // 16 + E // 8 * K // 16, 2 * (E // 8) * (C // 16)
    for kernels in all_codes(row.library).values():
        for part, products in (("_out_s1", out), ("contribution", contribution)):
            code = code_of(kernels, part).instructions
            assert code["HMMA"] == (products if row.round_operands else 0), part
            assert (code["LDSM"] > 0) == row.round_operands, part
            assert code["LDGSTS"] > 0, part
            assert row.round_operands or code["FFMA"] > 16, part


# Blocks on a multiprocessor, at least: outputs by type and (K, V), with what the rest have; contributions.
# fp32 of (64, 64) would have three, but for the registers that say which head of a group a block is of.
OUTPUTS = {"f16": {(32, 32): 4, (256, 256): 1}, "f32": {(64, 64): 2, (128, 128): 2, (256, 256): 2}}
OUTPUTS_OF_THE_REST = 3
CONTRIBUTIONS = {"f16": 7, "bf16": 7, "f32": 4}


@pytest.mark.parametrize("gpu", GPUS)
@each_tuned_row
def test_blocks_on_a_multiprocessor(loaded, row, gpu):
    if GPUS[gpu].architecture not in ARCHITECTURES:
        pytest.skip(f"HOLDFAST_CUDA_ARCHITECTURES has no {GPUS[gpu].architecture}")
    codes = all_codes(row.library)[GPUS[gpu].architecture]
    blocks = {
        launched.kernel.name: blocks_per_multiprocessor(GPUS[gpu], launched, codes[launched.kernel.name])
        for launched in launches(loaded, row)
    }
    stated = OUTPUTS["f32" if row.dtype == "f32" else "f16"]
    outputs = stated.get((row.key_size, row.value_size), OUTPUTS_OF_THE_REST)
    assert code_of(blocks, "_out_s1") >= outputs, blocks
    assert code_of(blocks, "contribution") >= CONTRIBUTIONS[row.dtype], blocks


@each_tuned_row
def test_states_of_the_caller_may_start_anywhere(loaded, row):
    """Rows are aligned, the caller's states need not be: they are read and written four bytes at a time."""
    for part, access in (("state_s1", "ld"), ("state_out", "st")):
        (kernel,) = (launched.kernel for launched in launches(loaded, row) if part in launched.kernel.name)
        operations = {tuple(operation) for _, operation, *_ in kernel.code if operation[:2] == [access, "global"]}
        assert operations and all(o[-1] in ("b32", "f32") and "v2" not in o and "v4" not in o for o in operations)

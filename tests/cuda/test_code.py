"""The machine code of the tuned kernels, for every architecture that is compiled: tensor cores where they are meant,
nothing called or spilt, and as many blocks on a multiprocessor as docs/cuda-expected-times.md says."""

import functools

import machine_code
import pytest
from conftest import Call
from occupancy import GPUS, blocks_per_multiprocessor


@functools.cache
def all_codes(library):
    return [machine_code.codes(binary) for binary in machine_code.fat_binaries(library)]


@pytest.fixture(params=["80", "90"])
def kernels(request, library):
    """(library's kernels of one architecture), a dictionary for each fat binary."""
    binaries = all_codes(library)
    assert len(binaries) == 12, "one for each type and size"
    return [codes[request.param] for codes in binaries]


def product_kernels(kernels):
    for codes in kernels:
        for name, code in codes.items():
            if "contribution" in name or name.startswith("_kernel_out_s1"):
                yield name, code


def test_nothing_is_called_or_spilt(kernels):
    for codes in kernels:
        for name, code in codes.items():
            assert code.stack == 0, name
            for instruction in ("CALL", "LDL", "STL"):
                assert code.instructions[instruction] == 0, (name, instruction)


def test_products_are_on_tensor_cores(kernels):
    """8 of 12 binaries are 16-bit ones. Fragments of 16 x 8 x 16: C 64, K = V = 32, 64, 128, 256 per warp of 16
    rows."""
    counts = {"contribution": [], "out": []}
    for name, code in product_kernels(kernels):
        which = "contribution" if "contribution" in name else "out"
        counts[which].append(code.instructions["HMMA"])
        if code.instructions["HMMA"]:
            assert code.instructions["LDSM"] > 0, name
            assert code.instructions["LDGSTS"] > 0, name
        else:
            assert code.instructions["FFMA"] > 16, name
    sizes = (32, 64, 128, 256)
    # out: scores C/8 x K/16, intra E/8 x C/16, inter E/8 x K/16, of E = min(V, 64) columns; contribution: keys in two
    # parts
    out = [8 * K // 16 + min(K, 64) // 8 * 4 + min(K, 64) // 8 * K // 16 for K in sizes]
    contribution = [2 * min(K, 64) // 8 * 4 for K in sizes]
    assert sorted(counts["out"]) == sorted([0] * 4 + 2 * out)
    assert sorted(counts["contribution"]) == sorted([0] * 4 + 2 * contribution)


@pytest.mark.parametrize(
    ("dtype", "size", "outputs", "contributions"),
    [("bf16", 32, 4, 7), ("bf16", 64, 3, 7), ("bf16", 128, 3, 7), ("bf16", 256, 1, 7), ("f32", 64, 3, 4)],
)
def test_blocks_on_a_multiprocessor_of_an_a100(device, library, dtype, size, outputs, contributions):
    device.call(f"cuda_{dtype}_{size}", *Call(dtype, size, [1], heads=1).arguments())
    binary = {"f32": 0, "f16": 4, "bf16": 8}[dtype] + [32, 64, 128, 256].index(size)
    codes = all_codes(library)[binary]["80"]
    blocks = {
        launched.kernel.name: blocks_per_multiprocessor(GPUS["A100"], launched, codes[launched.kernel.name])
        for launched in device.launches
    }
    assert max(n for name, n in blocks.items() if name.startswith("_kernel_out_s1")) >= outputs, blocks
    assert max(n for name, n in blocks.items() if "contribution" in name) >= contributions, blocks

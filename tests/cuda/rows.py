"""The rows of the table for CUDA: the variants that ship, and that the tests run."""

import dataclasses
import os
import pathlib
import re

BUILD = pathlib.Path(os.environ["HOLDFAST_BUILD"])
STANDIN = str(BUILD / "tests" / "cuda" / "libholdfast_cuda_standin.so")


@dataclasses.dataclass(frozen=True)
class Row:
    kernel: str
    name: str
    dtype: str
    chunk: int
    key_size: int  # 0: any
    value_size: int
    target: str
    row_alignment: int  # elements
    round_operands: bool
    degree: int = 0  # of power retention; 0: any

    def __str__(self):
        return self.name

    @property
    def library(self):
        return BUILD / f"lib{self.name}.a"


def _rows():
    for fields in re.findall(r"^HOLDFAST_VARIANT\((.*)\)$", (BUILD / "generated" / "variants.inc").read_text(), re.M):
        values = fields.split(", ")
        casts = (str, str, str, int, int, int, str, int, "true".__eq__, int)
        yield Row(*(cast(value) for cast, value in zip(casts, values, strict=True)))


ALL = [row for row in _rows() if row.target == "cuda"]
CHUNKWISE = [row for row in ALL if row.kernel == "chunkwise"]
RECURRENT = [row for row in ALL if row.kernel == "recurrent"]
CHUNKWISE_BACKWARD = [row for row in ALL if row.kernel == "chunkwise_backward"]
PARALLEL_BACKWARD = [row for row in ALL if row.kernel == "parallel_backward"]
POWER_BACKWARD = [row for row in ALL if row.kernel == "power_backward"]
PARALLEL = [row for row in ALL if row.kernel == "parallel"]
TUNED = [row for row in CHUNKWISE if row.key_size]


def smallest(dtype):
    """The tuned row of a type whose kernels are the smallest; None: HOLDFAST_SIZES left out all."""
    return min((r for r in TUNED if r.dtype == dtype), key=lambda r: r.key_size * r.value_size, default=None)

"""How far kernels on tensor cores may be from the double reference: relative root mean square.

out: what the project holds for each type; docs/tensor-cores.md says which rounding takes how much of it. state: it is
fp32, and so are all sums, but keys enter it as the sum of two numbers of 16 bits: 2^-16 of them in bf16, 2^-22 in
fp16 are left out at most.
"""

OUT = {"f32": 2e-6, "f16": 4e-4, "bf16": 2.5e-3}
STATE = {"f32": 2e-6, "f16": 2e-6, "bf16": 4e-6}

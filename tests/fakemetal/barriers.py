"""barriers.py VARIANTS_TEST: leaves out each barrier of each Metal variant in turn, and expects its tests to fail.

A barrier whose loss no order of threads shows is either redundant or not tested: both are to be looked into. Barriers
are the same in all types: fp32 stands for them.
"""

import itertools
import os
import re
import subprocess
import sys

CASE = "layout_padded"
ORDERS = ("forward", "reverse", "shuffle")
# Gradients have no stages in threadgroup memory, steps none at all.
WITH_BARRIERS = r"(chunkwise|parallel|power)_(p\d+_)?f32_"


def run(test, variant, **settings):
    environment = dict(os.environ, HOLDFAST_REQUIRED_BACKENDS="metal", **settings)
    cases = [f"*/{variant}_*{CASE}", f"*/{variant}", f"*/{variant}_K5_V7"]  # with chunks; without
    cases.append(f"*/{variant}_*out_alone")  # of the parallel form, where an initial state hides one
    command = [test, f"--gtest_filter={':'.join(cases)}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")


def order_that_notices(test, variant, barrier):
    """None where none does; "" where there is no such barrier."""
    for order in ORDERS:
        result = run(test, variant, FAKEMETAL_DROP_BARRIER=str(barrier), FAKEMETAL_ORDER=order)
        if f"no barrier {barrier}" in result.stderr:
            return ""
        if result.returncode:
            return order
    return None


def main(test):
    names = subprocess.run([test, "--gtest_list_tests"], capture_output=True, text=True, check=True).stdout
    variants = sorted(set(re.findall(r"(\w+_f32_\w+_metal)(?=_|\s)", names)))
    unnoticed = [] if variants else ["no Metal variant"]
    for variant in variants:
        whole = run(test, variant)
        if whole.returncode or not re.search(r"PASSED  \] [1-9]", whole.stdout):
            sys.exit(f"{variant} does not pass with all of its barriers:\n{whole.stdout}{whole.stderr}")
        for barrier in itertools.count():
            order = order_that_notices(test, variant, barrier)
            if order == "":
                if barrier == 0 and re.match(WITH_BARRIERS, variant):
                    unnoticed.append(f"{variant}, which has barriers: none was found to leave out")
                break
            print(f"{variant}, barrier {barrier}: noticed with threads {order}", flush=True)
            if order is None:
                unnoticed.append(f"{variant}, barrier {barrier}")
    if unnoticed:
        sys.exit("not noticed: " + "; ".join(unnoticed))


main(sys.argv[1])

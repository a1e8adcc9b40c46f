"""barriers.py VARIANTS_TEST: leaves out each barrier of each Metal variant in turn, and expects its tests to fail.

A barrier whose loss no order of threads shows is either redundant or not tested: both are to be looked into.
"""

import os
import subprocess
import sys

ORDERS = ("forward", "reverse", "shuffle")


def run(test, variant, case, barrier, order):
    environment = dict(os.environ, FAKEMETAL_DROP_BARRIER=str(barrier), FAKEMETAL_ORDER=order)
    environment["HOLDFAST_REQUIRED_BACKENDS"] = "metal"
    command = [test, f"--gtest_filter=*/{variant}*_{case}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")


def main(test):
    names = subprocess.run([test, "--gtest_list_tests", "--gtest_filter=*_metal_*"], capture_output=True, text=True, check=True)
    variants = sorted({line.split("/")[-1].split("_metal_")[0].strip() + "_metal" for line in names.stdout.split("\n") if "_metal_" in line})
    unnoticed = []
    for variant in variants:
        whole = subprocess.run([test, f"--gtest_filter=*/{variant}*_layout_compact"], capture_output=True, text=True)
        if whole.returncode or " 0 tests" in whole.stdout:
            sys.exit(f"{variant} does not pass with all of its barriers:\n{whole.stdout}{whole.stderr}")
        barrier = 0
        while True:
            noticed = None
            for order in ORDERS:
                result = run(test, variant, "layout_compact", barrier, order)
                if f"no barrier {barrier}" in result.stderr:
                    break
                if result.returncode:
                    noticed = order
                    break
            else:
                unnoticed.append(f"{variant}, barrier {barrier}")
            if f"no barrier {barrier}" in result.stderr:
                break
            print(f"{variant}: barrier {barrier} left out: {f'noticed, threads {noticed}' if noticed else 'NOT noticed'}", flush=True)
            barrier += 1
        if barrier == 0:
            sys.exit(f"{variant} has no barrier")
    if not variants or unnoticed:
        sys.exit("not noticed: " + "; ".join(unnoticed or ["no Metal variant"]))


main(sys.argv[1])

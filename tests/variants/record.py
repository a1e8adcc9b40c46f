"""Records on which hardware the tests of the compiled variants have passed, for README's table:

    python tests/variants/record.py BUILD MACHINE TARGET...

runs variants_test of the build for these targets and writes bench/record/MACHINE/tested.txt, a line "kernel type
target" for each of which cases ran, and none failed. Only for targets that run on their own hardware: not on PoCL,
lavapipe or the stand-in for Metal.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]


def main(build, machine, *targets):
    build = pathlib.Path(build)
    rows = re.findall(r"^HOLDFAST_VARIANT\((\w+), (\w+), (\w+), (?:\d+, ){3}(\w+)", variants_inc(build), re.M)
    cases = ":".join(f"*_{target}:*_{target}_*" for target in targets)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [build / "tests" / "variants_test", f"--gtest_filter={cases}", f"--gtest_output=json:{file.name}"]
        environment = {k: v for k, v in os.environ.items() if k != "HOLDFAST_TARGET"}
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
        suites = json.load(file)["testsuites"]
    ran, failed = set(), set()
    for case in (case for suite in suites for case in suite["testsuite"]):
        name = case["name"].split("/")[-1]
        # The longest: avx512 begins avx512_bf16.
        kernel, _, dtype, target = max(
            (row for row in rows if re.match(rf"{row[1]}(_|$)", name)), key=lambda row: len(row[1])
        )
        if case["result"] == "COMPLETED":
            ran.add((kernel, dtype, target))
        if case.get("failures"):
            failed.add((kernel, dtype, target))
    lines = sorted(" ".join(row) for row in ran - failed)
    path = ROOT / "bench" / "record" / machine / "tested.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "# tests/variants/record.py: kernel, type and target whose tests have passed here\n" + "\n".join(lines) + "\n"
    )
    print(f"{path}: {len(lines)} passed, {len(failed)} failed: {sorted(failed)}")
    sys.exit(bool(failed) or not lines)


def variants_inc(build):
    return (build / "generated" / "variants.inc").read_text()


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

"""info() and the command `holdfast`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import holdfast
import numpy as np
import pytest
from holdfast.cli import main


def run(tmp_path, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "holdfast", *arguments],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_info():
    report = holdfast.info()
    assert report["version"] == holdfast.__version__
    cpu = report["backends"]["cpu"]
    assert cpu["compiled"] and cpu["available"] and cpu["why_not"] == "" and "generic" in cpu["targets"]
    assert all(isinstance(feature, str) and feature for feature in report["cpu_features"])

    targets = report["targets"]
    assert targets[-1] == {"name": "generic", "runs_here": True, "missing": []}
    for target in targets:
        assert target["runs_here"] == (target["missing"] == [])
        assert not set(target["missing"]) & set(report["cpu_features"])
    by_name = {target["name"]: target for target in targets}
    for variant in report["variants"]:
        assert set(variant) == {
            "name", "kernel", "dtype", "chunk", "key_size", "value_size", "target", "row_alignment", "round_operands",
            "degree", "runs_here", "selected", "missing"
        }  # fmt: skip
        for key in ("runs_here", "missing"):
            assert variant[key] == by_name[variant["target"]][key]


def test_the_selected_variants_are_those_that_run(problem):
    lines = []
    holdfast.set_verbose(lines.append)
    holdfast.set_num_threads(1)  # more would share a head's columns of values
    selected = [v for v in holdfast.info()["variants"] if v["selected"]]
    kernels = {"chunkwise", "parallel", "recurrent", "power", "power_step", "rotate", "head_norm_gate"}
    gradients = {"chunkwise_backward", "parallel_backward", "power_backward", "head_norm_gate_backward"}
    assert {v["kernel"] for v in selected} == kernels | gradients
    assert all(v["runs_here"] for v in selected)
    for variant in selected:
        [backend] = [name for name, b in holdfast.info()["backends"].items() if variant["target"] in b["targets"]]
        holdfast.set_backend(backend if backend != "cpu" else None)
        p = problem(1, variant["chunk"] or 1, 1, variant["key_size"] or 5, variant["value_size"] or 3)
        of_dtype = {
            "f32": lambda x: x,
            "f16": lambda x: x.astype(np.float16),
            "bf16": lambda x: holdfast.BFloat16Array(np.zeros(x.shape, np.uint16)),
        }[variant["dtype"]]
        around = {
            "rotate": lambda x: holdfast.rotate(x, holdfast.theta(6)),
            "head_norm_gate": lambda x: holdfast.head_norm_gate(x),
            "head_norm_gate_backward": lambda x: holdfast.head_norm_gate_backward(x, x),
        }
        if call := around.get(variant["kernel"]):
            call(of_dtype(np.zeros((1, 2, 1, 6), np.float32)))
        elif variant["kernel"] in gradients:
            rows = [of_dtype(x) for x in (p.out, p.q, p.k, p.v)]
            form, _, _ = variant["kernel"].partition("_")
            form, options = ("chunkwise" if form == "power" else form), {"degree": variant["degree"] or 2}
            options = {} if variant["kernel"] == "chunkwise_backward" else {**options, "out": rows[0]}
            holdfast.retention_backward(*rows, form=form, **options)
        elif variant["kernel"] == "power_step" and backend != "cpu":
            rows = (of_dtype(x[:, 0]) for x in (p.q, p.k, p.v))
            holdfast.retention_step(*rows, None, p.initial_state, np.ones((1, 1, 5), np.float32), normalize=True)
        elif variant["kernel"].startswith("power"):
            degree, form = variant["degree"] or 1, "recurrent" if variant["kernel"] == "power_step" else "chunkwise"
            rows = [of_dtype(x) for x in (p.q, p.k, p.v)]
            holdfast.retention(*rows, degree=degree, normalize=True, form=form)
        elif variant["kernel"] == "recurrent" and not variant["chunk"]:
            holdfast.retention_step(*(of_dtype(x[:, 0]) for x in (p.q, p.k, p.v)), None, p.initial_state)
        else:
            holdfast.retention(of_dtype(p.q), of_dtype(p.k), of_dtype(p.v), form=variant["kernel"])
        assert f" {variant['name']} " in lines.pop()
    holdfast.set_backend(None)


def test_info_as_json(tmp_path):
    done = run(tmp_path, "info", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == holdfast.info()


def test_info_for_people(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    report = holdfast.info()
    assert f"Holdfast {report['version']}" in text and "Backend cpu: available" in text
    for variant in report["variants"]:
        [line] = [line for line in text.splitlines() if f" {variant['name']} " in line]
        assert line.startswith("*") == variant["selected"]
        assert ("needs" in line) == (not variant["runs_here"])


def test_info_with_a_wrong_target(tmp_path):
    done = run(tmp_path, "info", HOLDFAST_TARGET="bogus")
    assert done.returncode == 0
    assert "Backend cpu: HOLDFAST_TARGET: target is 'bogus'; expected one of" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith("*  ")]
    report = json.loads(run(tmp_path, "info", "--json", HOLDFAST_TARGET="bogus").stdout)
    assert not report["backends"]["cpu"]["available"] and "bogus" in report["backends"]["cpu"]["why_not"]
    assert not any(variant["selected"] for variant in report["variants"])


def test_version(tmp_path):
    done = run(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"holdfast {holdfast.__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["foo"], ["info", "--foo"]])
def test_wrong_arguments(tmp_path, arguments):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: holdfast")


def test_bench_has_its_options(tmp_path):
    done = run(tmp_path, "bench", "--help")
    assert done.returncode == 0
    assert "--quick" in done.stdout


def test_nothing_heavy_is_imported(tmp_path):
    script = "import sys, holdfast.cli; print({'torch', 'onnxruntime', 'holdfast.bench'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"

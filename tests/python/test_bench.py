"""`holdfast bench`: what it measures is right, what is missing is said, what is written can be read."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from holdfast import bench, peers
from holdfast.peers import Absent, Inputs, Peer

# One token; a partial last chunk; only full ones; and both of degree 2.
SHAPES = [(1, 1, 1, 4, 4), (2, 70, 3, 16, 8), (1, 256, 2, 32, 32), (2, 70, 3, 32, 8, 2), (1, 256, 2, 16, 16, 2)]


def run_bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(arguments))


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "missing", lambda *modules: f"not installed; pip install {' '.join(modules)}")


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", [(1, 40, 2, 8, 8, 1), (1, 7, 1, 4, 12, 2)])
    monkeypatch.setattr(bench, "SECONDS_PER_TURN", 0.001)


def test_quick_without_peers(brief, nothing_installed, tmp_path, capsys):
    path = tmp_path / "new folder" / "bench.json"
    assert run_bench("--quick", "--repeats", "2", "--threads", "1", "--json", str(path)) == 0
    report = json.loads(path.read_text())
    assert report["machine"]["cpu"] and report["machine"]["threads"] == 1
    assert report["versions"]["holdfast"] and report["date"]
    assert [tuple(result["shape"].values()) for result in report["results"]] == bench.QUICK
    for result in report["results"]:
        ours, steps = result["times"]
        assert ours["name"] == "Holdfast" and steps["name"] == peers.STEPS and steps["correct"]
        assert ours["how"].startswith(
            "parallel_f32_" if result["shape"]["degree"] > 1 else ("chunkwise_f32_", "recurrent_f32_")
        )
        assert "1 threads" in ours["how"]
        assert ours["correct"] and ours["relative_error"] < bench.TOLERANCE and ours["ratio"] == 1
        assert 0 < ours["best_ms"] == min(ours["all_ms"]) <= ours["median_ms"] and len(ours["all_ms"]) >= 2
        absent = {peer["name"]: peer["reason"] for peer in result["absent"]}
        published = peers.ALL_PUBLISHED if result["shape"]["degree"] > 1 else ()
        assert set(absent) == {peers.ORT, peers.EAGER, peers.COMPILED, *published, peers.ATTENTION, peers.SGEMM}
        of_no_degree_2 = {
            "has no degrees",
            "of degree 1, and of degree 2 for K a multiple of 16",
            "power retention's, of degree 2 for K a multiple of 16",
        }
        assert all("pip install" in reason or reason in of_no_degree_2 for reason in absent.values())
    table = capsys.readouterr().out
    assert "Holdfast" in table and table.count("not installed; pip install torch") == 4 + 2


def test_a_wrong_result_fails(brief, nothing_installed, monkeypatch, capsys):
    right = peers.retention
    monkeypatch.setattr(peers, "retention", lambda *a, out, **b: np.multiply(right(*a, out=out, **b), 1.001, out=out))
    assert run_bench("--shapes", "1,40,2,8,8", "--repeats", "1") == 1
    captured = capsys.readouterr()
    assert "WRONG RESULT" in captured.out and "Holdfast" in captured.err


def test_gradients_beside_autograd(brief, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    autograd = peers.torch_gradients
    without = Absent(peers.COMPILED, "takes minutes")
    monkeypatch.setattr(peers, "torch_gradients", lambda *a: without if a[3] else autograd(*a))
    path = tmp_path / "bench.json"
    options = ("--gradients", "--repeats", "1", "--threads", "1", "--json", str(path))
    assert run_bench(*options, "--shapes", "2,40,3,8,4", "1,40,2,16,8,2") == 0
    for result in json.loads(path.read_text())["results"]:
        assert {row["name"] for row in result["times"]} == {peers.OURS, peers.FORWARD, peers.BACKWARD, peers.EAGER}
        assert all(row["correct"] and row["relative_error"] < bench.TOLERANCE for row in result["times"])
        assert result["absent"] == [{"name": peers.COMPILED, "reason": without.reason}]
        backward = next(row["how"] for row in result["times"] if row["name"] == peers.BACKWARD)
        assert backward.startswith(
            "parallel_backward_f32_" if result["shape"]["degree"] == 2 else "chunkwise_backward_f32_"
        )


def test_a_wrong_gradient_fails(brief, nothing_installed, monkeypatch, capsys):
    right = peers.retention_backward

    def wrong(*a, gradients, **b):
        right(*a, gradients=gradients, **b)
        gradients.k[:] *= 1.001

    monkeypatch.setattr(peers, "retention_backward", wrong)
    assert run_bench("--gradients", "--shapes", "1,40,2,8,8", "--repeats", "1") == 1
    captured = capsys.readouterr()
    assert f"wrong results: {peers.OURS}, {peers.BACKWARD}" in captured.err
    assert captured.out.count("not installed; pip install torch") == 2


@pytest.mark.parametrize(
    "text", ["1,2,3,4", "1,2,3,4,x", "0,1,1,1,1", "1,1,1,1,-1", "1,1,1,1,1,5", "1,1,1,1,1,1,1", ""]
)
def test_bad_shapes(text, capsys):
    with pytest.raises(SystemExit):
        run_bench("--shapes", text)
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--threads", "--repeats"])
def test_bad_numbers(option, capsys):
    with pytest.raises(SystemExit):
        run_bench(option, "0")
    assert "expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("shape", SHAPES)
def test_reference(shape):
    """The double references against the parallel form: every score written out."""
    x = Inputs.random(*shape)
    total = np.cumsum(x.log_decay[0, :, -1], dtype=np.float64)
    scores = x.q[0, :, -1].astype(np.float64) @ x.k[0, :, -1].T * x.scale
    weights = np.tril(scores**x.degree * np.exp(total[:, None] - total))
    expected, head = weights @ x.v[0, :, -1], [(0, shape[2] - 1)]
    if x.degree > 1:
        expected = (expected / weights.sum(1, keepdims=True))[-peers.LAST_ROWS :]
    found = peers.reference(x, head) if x.degree == 1 else peers.power_reference(x, head)
    np.testing.assert_allclose(found[0], expected, rtol=1e-9, atol=1e-12)


PREPARE = {
    "holdfast": lambda x: peers.holdfast(x, 1),
    "steps": lambda x: peers.holdfast_steps(x, 1),
    "onnxruntime": lambda x: peers.onnx_runtime(x, 1),
    "eager": lambda x: peers.torch_chunkwise(x, 1),
    "compiled": lambda x: peers.torch_chunkwise(x, 1, compiled=True),
    "published": lambda x: peers.torch_published(x, 1),
    "published, compiled": lambda x: peers.torch_published(x, 1, compiled=True),
    "attention": lambda x: peers.torch_attention(x, 1),
    "sgemm": lambda x: peers.torch_product(x, 1, peers.holdfast(x, 1)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PREPARE)
def test_peers_agree_with_the_reference(name, shape):
    x = Inputs.random(*shape)
    peer = PREPARE[name](x)
    if isinstance(peer, Absent):
        pytest.skip(f"{peer.name}: {peer.reason}")
    assert isinstance(peer, Peer)
    for _ in range(2):  # a run leaves nothing behind that changes the next
        peer.run()
        assert name == "sgemm" or peer.result().shape == x.v.shape
        # Of degree 2: products of expanded keys cancel where q.k is small beside |q| |k|.
        limit = 2e-6 if x.degree == 1 else bench.TOLERANCE
        assert bench.check(x, [peer] if name == "holdfast" else [peers.holdfast(x, 1), peer])[peer.name] < limit


SEGMENTS = [peers.eager_segment, peers.functional_segment, peers.power_segment, peers.published_segment]


@pytest.mark.skipif(peers.missing("torch") is not None, reason="PyTorch is not installed")
@pytest.mark.parametrize("segment", SEGMENTS)
def test_torch_state_is_carried(segment):
    degree = 2 if segment in (peers.power_segment, peers.published_segment) else 1
    whole = Inputs.random(2, 192, 2, 16, 24, degree)
    parts = [
        Inputs(*(a[:, part] for a in (whole.q, whole.k, whole.v, whole.log_decay)), degree)
        for part in (slice(64), slice(64, None))
    ]
    first, second = (peers.TorchChunkwise(part, 32, 2, segment) for part in parts)
    second.state = first.run()
    second.run()
    expected = (peers.reference if degree == 1 else peers.power_reference)(whole, [(1, 1)])[0]
    result = np.concatenate([first.result(), second.result()], axis=1)[1, :, 1]
    assert peers.relative_rms(result[-len(expected) :], expected) < 2e-6


@pytest.fixture
def on_gpu(monkeypatch):
    """bench/gpu.py, its tensors on the CPU and every call of a millisecond."""
    pytest.importorskip("torch")
    path = Path(__file__).parents[2] / "bench" / "gpu.py"
    spec = importlib.util.spec_from_file_location("bench_gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "milliseconds", lambda run: (run(), 1.0)[1])
    return module


@pytest.mark.parametrize("backward", [False, True])
def test_a_gpu_is_compared_on_right_results_alone(on_gpu, backward, monkeypatch):
    result = on_gpu.compare((2, 300, 3, 16, 8), "f32", backward, 2)
    ours, *peers = result["times"]
    assert ours["name"] == "Holdfast" and ours["error"] < 1e-5 and ours["ms"] == ours["median_ms"] == 1
    assert all(("ms" in row) != ("why_not" in row) for row in result["times"])
    assert len(peers) == 4 and all(
        "ms" in row or "No module named" in row["why_not"]
        for row in peers
        if row["name"] != "PyTorch causal FlashAttention"
    )
    off = on_gpu.holdfast.torch.retention
    monkeypatch.setattr(on_gpu.holdfast.torch, "retention", lambda q, k, v, g: 1.01 * off(q, k, v, g))
    ours, *_ = on_gpu.compare((2, 300, 3, 16, 8), "f32", backward, 2)["times"]
    assert "ms" not in ours and ours["why_not"].startswith("wrong: relative error 1.00e-02; expected at most 0.001")


def test_a_gpu_that_is_not_there_is_said():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    path = Path(__file__).parents[2] / "bench" / "gpu.py"
    done = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"no CUDA device: PyTorch {torch.__version__} finds none (Holdfast: "), done.stderr

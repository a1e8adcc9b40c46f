"""holdfast train, generate and plot: text, resuming to the bit, several processes, pictures, errors."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")

from holdfast import cli, plot, train  # noqa: E402
from holdfast.lm import RetentionLM  # noqa: E402
from holdfast.text import Text, gzip_bits, order_bits, standard_library  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: E402

ROOT = Path(__file__).parents[2]
SMALL = "--preset tiny --context 32 --batch 4 --log-every 1 --validation-bytes 500 --threads 1 --quiet".split()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of PyTorch: for sizes like these more of them take longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sixty small files of text that can be learnt."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for n in range(60):
        words = random.choice(["retention ", "decay, ", "state; ", "chunk\n"], 60)
        (folder / f"{n:02}.txt").write_text("".join(words))
    (folder / ".hidden").write_text("hidden")
    return folder


def holdfast(*arguments: str | Path) -> int:
    return cli.main([str(x) for x in arguments])


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, text=True, capture_output=True, timeout=120)


def entries(path: Path, key: str) -> list[dict]:
    return [entry for entry in map(json.loads, (path / "log.jsonl").read_text().splitlines()) if key in entry]


def same_weights(one: Path, other: Path) -> bool:
    first, second = (train.read_checkpoint(path)["model"] for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- Text ------------------------------------------------------------------------------------------------------------


def test_text(data):
    text = Text.read([data])
    contents = {path.name: path.read_bytes() for path in data.iterdir() if path.suffix}
    assert text.files == 60 and len(text.training) + len(text.validation) == sum(map(len, contents.values()))
    validation = text.validation.tobytes()
    of_validation = [name for name, content in contents.items() if content in validation]
    assert 1 <= len(of_validation) <= 12
    assert all(contents[name] not in text.training.tobytes() for name in of_validation)
    assert Text.read([data]).fingerprint == text.fingerprint
    assert Text.read([*data.glob("1*.txt")]).fingerprint != text.fingerprint


def test_text_of_one_file(tmp_path):
    (tmp_path / "one").write_bytes(bytes(range(200)))
    text = Text.read([tmp_path / "one"])
    assert text.training.tolist() == list(range(190)) and text.validation.tolist() == list(range(190, 200))


def test_batches(data):
    text = Text.read([data])
    rows = text.batch(3, 7, 5, 20)
    assert rows.shape == (5, 21)
    assert all(row.tobytes() in text.training.tobytes() for row in rows)
    assert np.array_equal(rows, text.batch(3, 7, 5, 20))
    assert not np.array_equal(rows, text.batch(3, 8, 5, 20)) and not np.array_equal(rows, text.batch(4, 7, 5, 20))


def test_windows(data):
    """Each byte but the first is predicted once."""
    text = Text.read([data])
    assert b"".join(w[1:].tobytes() for w in text.windows(32)) == text.validation[1:].tobytes()
    assert [len(w) for w in text.windows(32, 100)] == [33, 33, 33]


def test_standard_library():
    names = [name for name, _ in standard_library()]
    assert "abc.py" in names and names == sorted(names)
    assert not [name for name in names if "test" in name.split("/") or "site-packages" in name]


def test_order_bits():
    """Against dictionaries; and gzip."""
    random = np.random.default_rng(0)
    training, text = (random.choice(5, size, p=[0.5, 0.2, 0.1, 0.1, 0.1]).astype(np.uint8) for size in (400, 90))
    counts = [Counter(bytes(training[n : n + size]) for n in range(len(training) - size + 1)) for size in range(1, 5)]

    def probability(context: bytes, byte: bytes) -> float:
        shorter = probability(context[1:], byte) if context else 1 / 256
        following = {gram: n for gram, n in counts[len(context)].items() if gram[:-1] == context}
        if not following:
            return shorter
        total, distinct = sum(following.values()), len(following)
        return (following.get(context + byte, 0) + distinct * shorter) / (total + distinct)

    bits = order_bits(training, text, (0, 3))
    for order in (0, 3):
        ps = [probability(bytes(text[max(0, n - order) : n]), bytes(text[n : n + 1])) for n in range(len(text))]
        assert bits[order] == pytest.approx(-np.log2(ps).mean())
    assert gzip_bits(text) == 8 * len(gzip.compress(text.tobytes(), 9)) / 90


# ---- Training --------------------------------------------------------------------------------------------------------


def test_learning_rate():
    args = train_arguments("--steps", "100", "--warmup", "0.1", "--learning-rate", "2", "--min-learning-rate", "0.25")
    rates = [train.learning_rate(args, step / 100) for step in range(101)]
    assert 0 < rates[0] < rates[5] < rates[10] == 2 and rates[100] == pytest.approx(0.5)
    assert rates[55] == pytest.approx(1.25) and all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def train_arguments(*arguments: str):
    import argparse

    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(arguments)


def test_weight_decay_is_of_matrices():
    """Those that products are with, and the head's, all of them; nothing else."""
    model = RetentionLM("tiny", attention=("retnet", "gated", "power", "softmax"), layers=4, ffn="swiglu")
    decayed, others = train.make_optimizer(model, train_arguments("--weight-decay", "0.3")).param_groups
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    matrices = {f"{name}.weight" for name in linear if not name.endswith("decay_proj")}
    assert {names[id(x)] for x in decayed["params"]} == matrices
    assert {names[id(x)] for x in others["params"]} == set(names.values()) - matrices
    assert len(decayed["params"]) + len(others["params"]) == len(names)


@pytest.mark.parametrize("attention", ["retnet", "gated", "power", "softmax", "power,softmax"])
def test_learns(data, tmp_path, attention):
    options = ["--attention", attention, "--steps", "24", "--validate-every", "12", "--min-learning-rate", "0.1"]
    if attention == "power":
        options += ["--disable-gating", "--degree", "2", "--chunk-size", "16", "--tie-embeddings", "--ffn", "swiglu"]
    assert holdfast("train", *SMALL, *options, "--data", data, "--output", tmp_path) == 0
    losses, validations = entries(tmp_path, "loss"), entries(tmp_path, "validation_loss")
    assert [entry["step"] for entry in losses] == list(range(1, 25))
    assert [(entry["step"], entry["of_all"]) for entry in validations] == [(12, False), (24, True)]
    assert losses[0]["loss"] == pytest.approx(math.log(256), rel=0.15) and losses[-1]["loss"] < 4
    assert validations[-1]["validation_bits_per_byte"] == validations[-1]["validation_loss"] / math.log(2)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    # The last validation, again, from the checkpoint.
    model, text = train.load_model(tmp_path), Text.read([data])
    nats = count = 0
    with torch.no_grad():
        for window in text.windows(32):
            row = torch.tensor(window.tolist())[None]
            nats += torch.nn.functional.cross_entropy(model(row[:, :-1])[0], row[0, 1:], reduction="sum").item()
            count += row.shape[1] - 1
    assert validations[-1]["validation_loss"] == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume(data, tmp_path, capsys, dtype):
    """A run that stops and goes on has the weights and the log of one that does not, to the bit; dropout too."""
    options = [*SMALL, "--steps", "9", "--dropout", "0.2", "--accumulate", "2", "--data", data, "--validate-every", "4"]
    options += ["--dtype", dtype]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert holdfast("train", *options, "--output", whole) == 0
    assert holdfast("train", *options, "--output", parts, "--stop-at", "5", "--save-every", "3") == 0
    assert train.read_checkpoint(parts)["step"] == 5 and not same_weights(whole, parts)
    log = (parts / "log.jsonl").read_text()
    (parts / "log.jsonl").write_text(log + '{"step": 6, "loss": 0}\n')  # of a run that went on after its checkpoint
    assert holdfast("train", "--resume", parts) == 0
    assert same_weights(whole, parts)
    for key in ("loss", "validation_loss"):
        one, other = (
            [
                {name: entry[name] for name in entry if name in ("step", key, "gradient_norm")}
                for entry in entries(path, key)
            ]
            for path in (whole, parts)
        )
        assert one == other
    assert holdfast("train", "--resume", parts) == 0  # there is nothing left to do
    assert train.read_checkpoint(parts)["step"] == 9
    capsys.readouterr()
    for changes, message in (
        (["--dim", "64"], "make another model than that of the checkpoint"),
        (["--data", data / "00.txt"], "the text is not that of the checkpoint"),
    ):
        assert holdfast("train", "--resume", parts, *changes) == 1
        assert message in capsys.readouterr().err


def test_resume_elsewhere(data, tmp_path):
    """In another folder, or from the file: a run of its own, whose log begins with what came before."""
    one, other = tmp_path / "one", tmp_path / "other"
    assert holdfast("train", *SMALL, "--steps", "6", "--stop-at", "4", "--data", data, "--output", one) == 0
    other.mkdir()
    (other / "log.jsonl").write_text('{"step": 1, "loss": 0}\n')  # of another run
    assert holdfast("train", "--resume", one / "checkpoint.pt", "--output", other) == 0
    assert [entry["step"] for entry in entries(one, "loss")] == [1, 2, 3, 4]
    assert [entry["step"] for entry in entries(other, "loss")] == [1, 2, 3, 4, 5, 6]
    assert entries(other, "loss")[:4] == entries(one, "loss") and len(entries(other, "run")) == 1
    assert (other / "loss.png").exists()
    (one / "log.jsonl").unlink()
    alone = tmp_path / "alone"
    assert holdfast("train", "--resume", one, "--output", alone) == 0
    assert [entry["step"] for entry in entries(alone, "loss")] == [5, 6] and len(entries(alone, "run")) == 1
    assert holdfast("plot", alone, other, "--output", tmp_path / "both.png") == 0


def test_resume_after_a_kill(data, tmp_path, capsys):
    """The last line of the log was not written to its end."""
    assert holdfast("train", *SMALL, "--steps", "6", "--stop-at", "4", "--data", data, "--output", tmp_path) == 0
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "los')
    assert holdfast("plot", tmp_path, "--output", tmp_path / "x.png") == 0
    assert holdfast("train", "--resume", tmp_path) == 0
    assert [entry["step"] for entry in entries(tmp_path, "loss")] == [1, 2, 3, 4, 5, 6]
    log = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text("{\n" + log)  # no such run writes that
    capsys.readouterr()
    assert holdfast("train", "--resume", tmp_path) == 1
    assert "log.jsonl is not a log of holdfast train" in capsys.readouterr().err


def test_stop_before_the_checkpoint(data, tmp_path):
    options = [*SMALL, "--steps", "8", "--data", data, "--output", tmp_path]
    assert holdfast("train", *options, "--stop-at", "5") == 0
    assert holdfast("train", "--resume", tmp_path, "--stop-at", "3") == 0
    assert train.read_checkpoint(tmp_path)["step"] == 5


def test_bytes_whatever_the_preset(data, tmp_path, capsys):
    """The larger presets have the vocabulary of a tokenizer."""
    for preset in ("125m", "retnet-1.3b"):
        options = ["--dim", "32", "--layers", "1", "--heads", "2", "--steps", "1", "--output", tmp_path]
        assert holdfast("train", *SMALL, "--preset", preset, *options, "--data", data) == 0
        assert train.load_model(tmp_path).config.vocab_size == 256
        assert holdfast("generate", tmp_path, "--bytes", "20", "--temperature", "5") == 0
    checkpoint = train.read_checkpoint(tmp_path)
    model = RetentionLM("tiny", vocab_size=300)
    checkpoint.update(config=dataclasses.asdict(model.config), model=model.state_dict())
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    assert holdfast("generate", tmp_path) == 1
    assert "has a vocabulary of 300; expected bytes" in capsys.readouterr().err


def test_accumulate(data, tmp_path):
    """A batch in parts has the losses and gradients of the batch at once, to rounding."""
    paths = []
    for parts in ("1", "2", "4"):
        output = tmp_path / parts
        options = ["--steps", "5", "--accumulate", parts, "--data", data, "--output", output]
        assert holdfast("train", *SMALL, *options) == 0
        paths.append([(entry["loss"], entry["gradient_norm"]) for entry in entries(output, "loss")])
    for path in paths[1:]:
        assert len(path) == 5 and np.array(path) == pytest.approx(np.array(paths[0]), rel=1e-5)


@pytest.mark.parametrize("clip", [0, 0.3])
def test_clip(data, tmp_path, clip):
    """The norm of what the optimizer gets is at most --clip, and the log has the norm that was there before."""
    norms = []

    def measure(optimizer, *_):
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    hook = register_optimizer_step_pre_hook(measure)
    status = holdfast("train", *SMALL, "--steps", "6", "--clip", clip, "--data", data, "--output", tmp_path)
    hook.remove()
    assert status == 0
    before = [entry["gradient_norm"] for entry in entries(tmp_path, "loss")]
    assert max(before) > 0.3 and norms == pytest.approx([min(norm, clip or norm) for norm in before], rel=1e-4)


def test_seed_and_degree(data, tmp_path):
    """They make the run, and they are in its checkpoint."""
    seven = ["--attention", "power", "--seed", "7"]
    runs = {"one": seven, "same": seven, "other": [*seven[:-1], "8"], "cubes": [*seven, "--degree", "3"]}
    for name, options in runs.items():
        options = [*options, "--steps", "2", "--data", data, "--output", tmp_path / name]
        assert holdfast("train", *SMALL, *options) == 0
    assert same_weights(tmp_path / "one", tmp_path / "same")
    first, other, cubes = ([x["loss"] for x in entries(tmp_path / name, "loss")] for name in ("one", "other", "cubes"))
    assert first[0] != other[0] and first[0] != cubes[0]
    for name, seed, degree in (("one", 7, 2), ("other", 8, 2), ("cubes", 7, 3)):
        checkpoint = train.read_checkpoint(tmp_path / name)
        assert (checkpoint["options"]["seed"], checkpoint["config"]["degree"]) == (seed, degree)
    assert train.load_model(tmp_path / "cubes").blocks[0].mixer.degree == 3


def test_minutes(data, tmp_path):
    start = time.perf_counter()
    options = ["--minutes", "0.02", "--steps", "1000000", "--validate-every", "0"]
    assert holdfast("train", *SMALL, *options, "--data", data, "--output", tmp_path) == 0
    losses = entries(tmp_path, "loss")
    assert time.perf_counter() - start < 30 and losses[-1]["seconds"] >= 1.2
    assert losses[-1]["learning_rate"] < losses[len(losses) // 2]["learning_rate"]  # it has come down by then


def test_minutes_alone(data, tmp_path, monkeypatch):
    """They are not bounded by the default of --steps; steps that are given bound them."""
    monkeypatch.setattr(train, "STEPS", 5)
    options = [*SMALL, "--minutes", "0.01", "--data", data, "--output", tmp_path]
    assert holdfast("train", *options) == 0
    assert entries(tmp_path, "loss")[-1]["step"] > 5 and entries(tmp_path, "loss")[-1]["seconds"] >= 0.6
    assert holdfast("train", *options, "--minutes", "5", "--steps", "3") == 0
    assert entries(tmp_path, "loss")[-1]["step"] == 3
    assert holdfast("train", *SMALL, "--data", data, "--output", tmp_path) == 0
    assert entries(tmp_path, "loss")[-1]["step"] == 5


@pytest.mark.parametrize("options", [["--dtype", "bf16"], ["--kv-heads", "1", "--threads", "2", "--clip", "0"]])
def test_options(data, tmp_path, options):
    assert holdfast("train", *SMALL, *options, "--steps", "3", "--data", data, "--output", tmp_path) == 0
    assert all(math.isfinite(entry["loss"]) for entry in entries(tmp_path, "loss"))
    torch.set_num_threads(1)


def test_compile(data, tmp_path, monkeypatch):
    """--compile is torch.compile, with the losses of a run without it. Its default backend would compile C++."""
    compiled = []
    real = torch.compile

    def compile(model):
        compiled.append(model)
        return real(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile)
    for name, options in (("one", ["--compile"]), ("other", [])):
        assert holdfast("train", *SMALL, *options, "--steps", "3", "--data", data, "--output", tmp_path / name) == 0
    assert len(compiled) == 1
    one, other = ([entry["loss"] for entry in entries(tmp_path / name, "loss")] for name in ("one", "other"))
    assert one == pytest.approx(other, rel=1e-5)


def test_compile_by_inductor(data, tmp_path):
    """As users have it, forward and back: what the kernels' operators say of themselves is enough for it."""
    small = [*SMALL, "--layers", "1", "--attention", "power", "--conv-width", "0", "--steps", "2", "--data", data]
    for name, options in (("one", ["--compile"]), ("other", [])):
        assert holdfast("train", *small, *options, "--output", tmp_path / name) == 0
    one, other = ([entry["loss"] for entry in entries(tmp_path / name, "loss")] for name in ("one", "other"))
    assert one == pytest.approx(other, rel=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("agents", [1, 2])
def test_two_processes(data, tmp_path, agents):
    """Under torchrun, each with half of every batch: the losses of one process, to rounding. Two agents meet at an
    address, as those of two machines do; a single one stops, and goes on."""
    options = [*SMALL, "--steps", "6", "--accumulate", "2", "--validate-every", "3", "--data", data]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2 // agents, "--nnodes", agents]
    with socket.create_server(("127.0.0.1", 0)) as free:
        address, port = free.getsockname()
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{port}", "--local-addr", address]
    torchrun += ["--standalone"] if agents == 1 else meeting
    command = [*torchrun, "-m", "holdfast", "train", *options, "--output", tmp_path / "two"]
    if agents == 1:
        done = run(*command, "--stop-at", "4", OMP_NUM_THREADS="1")
        assert done.returncode == 0 and train.read_checkpoint(tmp_path / "two")["step"] == 4, done.stderr
        command = [*torchrun, "-m", "holdfast", "train", "--resume", tmp_path / "two"]
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(run, *command, OMP_NUM_THREADS="1") for _ in range(agents)]
    for call in calls:
        assert call.result().returncode == 0, call.result().stderr
    assert holdfast("train", *options, "--output", tmp_path / "one") == 0
    for key in ("loss", "validation_loss", "gradient_norm"):
        one, two = ([entry[key] for entry in entries(tmp_path / name, key)] for name in ("one", "two"))
        assert len(one) in (6, 2) and two == pytest.approx(one, rel=1e-5)
    assert entries(tmp_path / "two", "run")[0]["processes"] == 2


def test_commands(data, tmp_path):
    """As a user calls them: train with a bar, interrupted; generate; plot."""
    output = tmp_path / "run"
    arguments = [sys.executable, "-m", "holdfast", "train", *SMALL[:-1], "--steps", "100000", "--data", data]
    process = subprocess.Popen(
        [str(x) for x in (*arguments, "--output", output)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (output / "log.jsonl").exists() or not entries(output, "loss"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, bar = process.communicate(timeout=60)
    assert process.returncode == 0, bar
    assert "0.04 M parameters" in bar and "tokens/s" in bar and "to go" in bar
    step = train.read_checkpoint(output)["step"]
    assert step == entries(output, "loss")[-1]["step"] >= 1

    done = run("-m", "holdfast", "generate", output, "--prompt", "retention é", "--bytes", "30", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("retention é") and len(done.stdout) > len("retention é") + 1
    before, after = (int(part.split(" bytes")[0].replace(",", "")) for part in _sizes(done.stderr))
    assert "a second" in done.stderr and before == after > 0

    done = run(
        "-m", "holdfast", "plot", output, output / "log.jsonl", "--output", tmp_path / "two.png", "--x", "tokens"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


def _sizes(report: str) -> list[str]:
    sizes = report.split("state: ")[1]
    return [sizes, sizes.split("prompt, ")[1].split(" at the end")[0] + " bytes"]


def test_generate(data, tmp_path, capsys):
    """Bytes as the model gives them, for a seed; softmax attention's state grows."""
    options = ["--attention", "gated,softmax", "--steps", "3", "--data", data]
    assert holdfast("train", *SMALL, *options, "--output", tmp_path) == 0
    capsys.readouterr()
    (tmp_path / "prompt").write_bytes(b"decay, ")
    texts = []
    for seed in ("1", "1", "2"):
        sampling = ["--seed", seed, "--top-k", "50", "--top-p", "0.9", "--bytes", "40", "--temperature", "1.5"]
        assert holdfast("generate", tmp_path, "--prompt-file", tmp_path / "prompt", *sampling) == 0
        printed = capsys.readouterr()
        texts.append(printed.out)
        before, after = (int(part.split(" bytes")[0].replace(",", "")) for part in _sizes(printed.err))
        assert after > before
    assert texts[0] == texts[1] != texts[2]


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "/nowhere"], "/nowhere is neither a file nor a folder"),
        (["--context", "100000"], "expected more than --context, 100000"),
        (["--accumulate", "3"], "--batch is 4; expected a multiple of 3"),
        (["--steps", "0"], "--steps is 0; expected at least 1"),
        (["--heads", "3"], "dim is 32; expected a multiple of heads, 3"),
        (["--attention", "retnet", "--disable-gating"], "--attention retnet has no gates"),
        (["--attention", "power", "--degree", "7"], "degree is 7; expected one of 2, 3, 4"),
        (["--attention", "power", "--degree", "1"], "degree is 1; expected one of 2, 3, 4"),
        (["--ffn-size", "0"], "ffn_size is 0; expected at least 1"),
        (["--value-size", "0"], "value_size is 0; expected at least 1"),
        (["--chunk-size", "0"], "chunk_size is 0; expected at least 1"),
        (["--conv-width", "-1"], "conv_width is -1; expected at least 0"),
        (["--threads", "-1"], "--threads is -1; expected at least 1"),
        (["--seed", "-1"], "--seed is -1; expected at least 0"),
        (["--seed", str(2**63)], "; expected less than 2^63"),
        (["--clip", "nan"], "--clip is nan; expected at least 0, and finite"),
        (["--min-learning-rate", "nan"], "--min-learning-rate is nan; expected at least 0, and finite"),
        (["--learning-rate", "inf"], "--learning-rate is inf; expected at least 0, and finite"),
        (["--weight-decay", "-1"], "--weight-decay is -1.0; expected at least 0"),
        (["--beta2", "1"], "--beta2 is 1.0; expected less than 1"),
        (["--minutes", "-1"], "--minutes is -1.0; expected at least 0"),
        (["--minutes", "0"], "--minutes is 0; expected more than 0"),
        (["--stop-at", "-1"], "--stop-at is -1; expected at least 0"),
        (["--device", "foo"], "device is 'foo'; expected one that PyTorch has here"),
        (["--attention", "gated,gated,gated"], "attention has 3 names"),
        (["--learning-rate", "1e30", "--steps", "20"], "; a smaller --learning-rate may help"),
        (["--learning-rate", "1e30", "--steps", "20", "--attention", "softmax"], "the loss is nan at step"),
        (["--resume", "/nowhere/run"], "No such file"),
    ],
)
def test_bad_options(data, tmp_path, capsys, options, message):
    given = [] if "--data" in options else ["--data", data]
    assert holdfast("train", *SMALL, *given, "--output", tmp_path, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("holdfast train: ") and message in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(data, tmp_path, capsys):
    """Neither command blames the checkpoint."""
    assert holdfast("train", *SMALL, "--data", data, "--output", tmp_path, "--steps", "1") == 0
    for command in (["train", *SMALL, "--data", data, "--output", tmp_path / "other"], ["generate", tmp_path]):
        assert holdfast(*command, "--device", "cuda") == 1
        error = capsys.readouterr().err
        assert "expected one that PyTorch has here" in error and "not a holdfast checkpoint" not in error
    assert holdfast("generate", tmp_path, "--device", "foo") == 1
    assert "device is 'foo'; expected one that PyTorch has here" in capsys.readouterr().err


def test_bad_attention(capsys):
    with pytest.raises(SystemExit):
        holdfast("train", "--attention", "linear")
    assert "'linear' is none of retnet, gated, power, softmax" in capsys.readouterr().err


def test_bad_files(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    (tmp_path / "log.jsonl").write_text("no log")
    assert holdfast("train", "--resume", tmp_path) == 1
    assert "is not a holdfast checkpoint" in capsys.readouterr().err
    assert holdfast("generate", tmp_path) == 1
    assert "is not a holdfast checkpoint" in capsys.readouterr().err
    assert holdfast("plot", tmp_path, "--output", tmp_path / "x.png") == 1
    assert "is not a log of holdfast train" in capsys.readouterr().err
    torch.save({"format": train.FORMAT, "version": 2}, tmp_path / "checkpoint.pt")
    assert holdfast("generate", tmp_path) == 1
    assert "is of version 2; this version of Holdfast reads up to 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not a log"):
        plot.read(tmp_path)


@pytest.mark.parametrize(("command", "module"), [("train", "torch"), ("generate", "torch"), ("plot", "matplotlib")])
def test_library_missing(tmp_path, command, module):
    """A clear error, and no traceback; the others work."""
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(f"raise ModuleNotFoundError('no {module}', name='{module}')")
    (tmp_path / "log.jsonl").write_text('{"run": {}, "config": {"attention": "power"}, "parameters": 1}\n')
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = run("-m", "holdfast", command, *([tmp_path] if command != "train" else []), PYTHONPATH=path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"{module} is not installed: pip install 'holdfast[" in done.stderr
    assert run("-m", "holdfast", "info", PYTHONPATH=path).returncode == 0


def test_versions_are_the_same_everywhere():
    """A library that stands in several lists of pyproject.toml has one version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lists = [*project["project"]["optional-dependencies"].values(), *project["dependency-groups"].values()]
    pins: dict[str, set[str]] = {}
    for requirement in (r for requirements in lists for r in requirements if isinstance(r, str) and "==" in r):
        name, version = requirement.split(";")[0].split("==")
        pins.setdefault(name.strip(), set()).add(version.strip())
    assert {name: versions for name, versions in pins.items() if len(versions) > 1} == {}
    assert {"torch", "train", "dev"} <= set(project["project"]["optional-dependencies"])

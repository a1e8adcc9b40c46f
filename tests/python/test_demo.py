"""`make demo`: examples/demo.py from end to end, on little text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import holdfast
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")

from holdfast.text import Text, gzip_bits, order_bits  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_demo(tmp_path):
    """What it says is there, in this order; numbers that can be computed again are those."""
    data, source = tmp_path / "data", Path(holdfast.__file__).read_text()
    data.mkdir()
    for n in range(40):
        (data / f"{n}.txt").write_text(source[1000 * n : 1000 * (n + 1)])
    command = [sys.executable, ROOT / "examples/demo.py", "--data", data, "--output", tmp_path]
    command += ["--megabytes", "0.02", "--heads", "2", "--size", "16", "--minutes", "0.005"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr

    lines = iter(done.stdout.splitlines())

    def after(pattern: str) -> list[str]:
        """The groups of the first of the lines that follow to match."""
        match = next((m for line in lines if (m := re.search(pattern, line))), None)
        assert match, f"{pattern!r}\n{done.stdout}"
        return list(match.groups())

    after("^20,971 bytes of the standard library of Python .*; 2 heads of 16$")
    after("^forward: chunkwise_f32_")
    for tokens in ("4,096", "8,192", "12,288", "20,971"):
        after(rf"^ +{tokens} +[\d,]+ +[\d,]+ +\d+ MB$")
    after(r"^token by token: [\d,]+ tokens/s in retention, 2,048 tokens$")
    after(r"^largest difference, .* \(16,384 tokens; 2,048 one by one\):$")
    for pair in ("blocks, one call", "blocks, token by token", "blocks, double reference", "token by token, double .*"):
        assert float(after(rf"^  {pair} +(\S+)$")[0]) < 1e-4
    after("^the same retention of 20,971 tokens by PyTorch ")
    assert float(after(r"Holdfast .* s, PyTorch .* s: .* largest difference in the last block (\S+)$")[0]) < 1e-4
    after("^picture of time against length: ")

    text = Text.read([data])
    sizes = f"{len(text.training):,} bytes of 40 files; {len(text.validation):,} bytes, of other files, validate"
    after(f"^a language model of bytes, 0.005 minutes on {sizes}$")
    after("^bits per byte of the validation files:$")
    last = json.loads((tmp_path / "model/log.jsonl").read_text().splitlines()[-1])
    counted = order_bits(text.training, text.validation, (0, 3))
    for name, bits in (
        ("retention", last["validation_bits_per_byte"]),
        ("order 0, counted in the same training files", counted[0]),
        ("order 3, counted in the same training files", counted[3]),
        ("gzip -9 of the validation files", gzip_bits(text.validation)),
    ):
        assert after(rf"^  {name} +(\S+)$") == [f"{bits:.3f}"]
    after(r"^400 bytes after the prompt, as they come \(holdfast generate .*model\):$")
    after(r"^def main\(arguments\):$")
    after(r"^logits of \d+ bytes in one call and \d+ one by one, against the parallel form of all:$")
    assert float(after("^  largest difference, over the root mean square: (.*)$")[0]) < 1e-4

    for picture in ("time_against_length.png", "model/loss.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "a second" in done.stderr  # of what is generated
    assert "lacks no " not in done.stdout  # as drivers of GPUs say it


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_demo():
    """It runs that file, with its options."""
    commands = subprocess.run(
        ["make", "--dry-run", "demo", "ARGS=--minutes 0"], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout
    assert re.search(r"^PYTHONPATH=\S+/build/demo/python python examples/demo.py --minutes 0$", commands, re.MULTILINE)

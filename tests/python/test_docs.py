"""What the documents show really runs: README's examples, and docs/adding-hardware.md followed to the letter."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import holdfast
import pytest

ROOT = Path(__file__).parents[2]
BUILD = Path(holdfast.__file__).parents[2]  # of the package under test: <build>/python/holdfast

# A fenced block, and the paragraph right before it; the end of that paragraph, when the block belongs into a file.
BLOCK = re.compile(r"((?:[^\n]+\n)+)\n```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PLACE = re.compile(r"(New file|At the end of|In) `([^`]+)`(?:, (above|below) `([^`]+)`)?:$")


def blocks(document: str, language: str = r"\w+") -> list[tuple[str, str, str]]:
    """(paragraph before, language, text) of each fenced block of a document."""
    found = BLOCK.findall((ROOT / document).read_text())
    return [(" ".join(before.split()), name, text) for before, name, text in found if re.fullmatch(language, name)]


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """Run a command with the tools of the running interpreter's environment; returns what it prints."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HOLDFAST_TARGET")}
    tools = {"VIRTUAL_ENV": sys.prefix, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    env = {**inherited, **tools, **environment}
    done = subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}"
    return done.stdout


def put(text: str, place: re.Match[str], tree: Path) -> None:
    """Put the text of a block into the file of `tree`, at the place in it, that the document names."""
    how, name, side, anchor = place.groups()
    path = tree / name
    if how == "New file":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return
    lines = path.read_text().splitlines(keepends=True)
    at = len(lines)
    if side:
        (at,) = (number for number, line in enumerate(lines) if anchor in line)
        at += side == "below"
    path.write_text("".join([*lines[:at], text, *lines[at:]]))


def follow(document: str, tree: Path, **environment: str) -> None:
    """Do in `tree` what a document says, block by block."""
    for before, language, text in blocks(document):
        if language == "sh":
            run(["bash", "-euo", "pipefail", "-c", text], tree, **environment)
        else:
            place = PLACE.search(before)
            assert place, f"{document}: '{before}' does not say where the block after it belongs"
            put(text, place, tree)


def test_readme_python(tmp_path: Path) -> None:
    ((_, _, example),) = blocks("README.md", "python")
    assert float(run([sys.executable, "-c", example], tmp_path, PYTHONPATH=str(BUILD / "python"))) < 1e-4


def test_pytorch_page(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    ((_, _, example),) = blocks("docs/pytorch.md", "python")
    assert float(run([sys.executable, "-c", example], tmp_path, PYTHONPATH=str(BUILD / "python"))) < 1e-4


def test_readme_c(tmp_path: Path) -> None:
    ((_, _, example),) = blocks("README.md", "c")
    (tmp_path / "example.c").write_text(example)
    cache = (BUILD / "CMakeCache.txt").read_text()
    (dlpack,) = re.findall(r"^DLPACK_INCLUDE_DIR:PATH=(.*)$", cache, re.MULTILINE)
    (compiler,) = re.findall(r"^CMAKE_C_COMPILER:\w+=(.*)$", cache, re.MULTILINE)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'runtime/include'}", "-isystem", dlpack]
    run([compiler, *flags, "example.c", f"-L{BUILD}", "-lholdfast", f"-Wl,-rpath,{BUILD}", "-o", "example"], tmp_path)
    assert run([str(tmp_path / "example")], tmp_path) == "0.125\n"


@pytest.mark.recipe
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the recipe adds an x86 target")
def test_adding_hardware(tmp_path: Path) -> None:
    tree = tmp_path / "holdfast"
    leave_out = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "build")
    shutil.copytree(ROOT, tree, ignore=leave_out)
    # To compile takes most of the time: without optimization, but for kernels, which Halide compiles.
    quick = tmp_path / "quick.cmake"
    quick.write_text('set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O0 -DNDEBUG" CACHE STRING "")\n')
    follow("docs/adding-hardware.md", tree, CMAKE_TOOLCHAIN_FILE=str(quick))

    environment = {"PYTHONPATH": str(tree / "build/dev/python"), "HOLDFAST_TARGET": "avx"}
    info = json.loads(run([sys.executable, "-m", "holdfast", "info", "--json"], tree, **environment))
    assert [v["name"] for v in info["variants"] if v["selected"]] == [
        "chunkwise_f32_c64_k64_v64_avx",
        "recurrent_f32_k64_v64_avx",
    ]
    # README's example checks itself, and now runs on the new target where that has the kernel: its sizes are 64x64.
    # But for gradients, whose kernels this build has for no size.
    ((_, _, example),) = blocks("README.md", "python")
    example = "\n".join(line for line in example.splitlines() if "_backward(" not in line)
    del environment["HOLDFAST_TARGET"]
    assert float(run([sys.executable, "-c", example], tree, **environment)) < 1e-4


def test_the_gradient_for_free_is_the_tested_one():
    tested = (ROOT / "tests" / "algorithm" / "adjoint_test.cpp").read_text()
    shown = [text for _, _, text in blocks("docs/autodiff.md", "cpp")]
    assert len(shown) == 1 and shown[0] in tested

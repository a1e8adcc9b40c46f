"""The wheel, built from this source tree, is enough by itself: no Halide, no CMake, nothing of the build."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import holdfast
import numpy as np

SOURCE = Path(__file__).resolve().parents[2]
BUILD = Path(holdfast.__file__).parents[2]  # of the package under test: <build>/python/holdfast

SCRIPT = """
import importlib.util, shutil, sys
from pathlib import Path
import numpy as np
import holdfast

for name in ("halide", "cmake", "ninja", "pybind11", "scikit_build_core"):
    assert not importlib.util.find_spec(name) and not shutil.which(name), name
package = Path(holdfast.__file__).parent
assert package.is_relative_to(sys.prefix)

T, H, K = 70, 2, 64
q, k, v = np.random.default_rng(0).standard_normal((3, 1, T, H, K)).astype("f")
out, state = holdfast.retention(q, k, v, holdfast.decay(H), return_state=True)
gamma = np.exp(holdfast.decay(H).astype("d"))
expected = sum(gamma[:, None, None] ** (T - 1 - t) * k[0, t, :, :, None] * v[0, t, :, None, :] for t in range(T))
assert np.allclose(state[0], expected, rtol=0, atol=1e-5 * abs(expected).max())
assert np.allclose(out[0, -1], np.einsum("hd,hde->he", q[0, -1], expected) / K**0.5, atol=1e-4)

loaded = {Path(line.split()[-1]) for line in open("/proc/self/maps") if ".so" in line}
loaded = {path for path in loaded if "holdfast" in path.name or "alide" in path.name}
assert loaded and all(path.parent == package for path in loaded), loaded
print(holdfast.__version__)
"""


TRAINING = """
import sys
from pathlib import Path
import holdfast
from holdfast import cli

assert Path(holdfast.__file__).is_relative_to(sys.prefix)
options = "--preset tiny --context 32 --batch 1 --steps 2 --validation-bytes 100 --quiet --output run".split()
assert cli.main(["train", *options, "--data", sys.argv[1]]) == 0
assert cli.main(["generate", "run", "--bytes", "3"]) == 0
assert Path("run/loss.png").exists()
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HOLDFAST_TARGET")}
    env = {**inherited, **environment}
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def spaceless(requirement: str) -> str:
    return requirement.replace(" ", "")


def test_wheel(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # In the build tree, so that a second run has next to nothing to compile; with the generators that the build has.
    settings = {
        "build-dir": SOURCE / "build" / "wheel",
        "cmake.define.HOLDFAST_TARGETS": "generic",
        "cmake.define.HOLDFAST_SIZES": "any",
        "cmake.define.HOLDFAST_COSTLY": "none",
        "cmake.define.holdfast-halide_generators_ROOT": BUILD / "cmake",
    }
    options = [f"--config-settings={name}={value}" for name, value in settings.items()]
    run(*pip, "wheel", SOURCE, "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, *options, cwd=tmp_path)
    [wheel] = tmp_path.glob("holdfast-*.whl")

    # Of this interpreter and machine, in its name and within.
    name, version, *tag = wheel.stem.split("-")
    assert tag[:2] == [f"cp{sys.version_info.major}{sys.version_info.minor}"] * 2
    assert tag[2].startswith("macosx" if sys.platform == "darwin" else ("linux", "manylinux"))
    assert tag[2].endswith(platform.machine())
    metadata = zipfile.ZipFile(wheel).read(f"{name}-{version}.dist-info/WHEEL").decode().splitlines()
    assert {"Root-Is-Purelib: false", f"Tag: {'-'.join(tag)}"} <= set(metadata)

    # Its extras bring what pyproject.toml says that they do.
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    metadata = zipfile.ZipFile(wheel).read(f"{name}-{version}.dist-info/METADATA").decode()
    required = {line.split(": ", 1)[1].replace('"', "'") for line in metadata.splitlines() if "Requires-Dist" in line}
    extras = {f"{what}; extra == '{extra}'" for extra, x in project["optional-dependencies"].items() for what in x}
    assert {spaceless(x) for x in required} == {spaceless(x) for x in extras | set(project["dependencies"])}

    names = zipfile.ZipFile(wheel).namelist()
    libraries = [name for name in names if ".so" in name]
    assert len([name for name in libraries if name.startswith("holdfast/_holdfast.")]) == 1
    assert len([name for name in libraries if name.startswith("holdfast/libholdfast.so.")]) == 1
    assert len(libraries) == 2
    assert not [name for name in names if "halide" in name.lower()]
    source = SOURCE / "bindings/python"
    package = {
        path.relative_to(source).as_posix()
        for path in (source / "holdfast").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected = {"holdfast/__init__.py", "holdfast/py.typed", "holdfast/_holdfast.pyi", "holdfast/compat/fla.py"}
    assert expected <= package == {name for name in names if name.startswith("holdfast/")} - set(libraries)
    assert {name.split("/")[0] for name in names} == {"holdfast", f"{name}-{version}.dist-info"}

    venv.create(tmp_path / "clean", with_pip=False)
    python = tmp_path / "clean" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # NumPy is the one dependency; the installed one does, alone.
    clean_packages = Path(sysconfig.get_path("platlib", vars={"platbase": str(tmp_path / "clean")}))
    for part in Path(np.__file__).parents[1].glob("numpy*"):
        (clean_packages / part.name).symlink_to(part)
    alone = {"cwd": tmp_path, "PATH": str(python.parent)}
    assert run(python, "-c", SCRIPT, **alone).strip() == version
    assert run(python.parent / "holdfast", "info", **alone).startswith("Holdfast ")

    # And what its extra `train` is for, with the libraries that are installed here.
    if all(importlib.util.find_spec(name) for name in ("torch", "tqdm", "matplotlib")):
        alone["PYTHONPATH"] = str(Path(np.__file__).parents[1])
        assert "bits per byte" in run(python, "-c", TRAINING, SOURCE / "README.md", **alone)

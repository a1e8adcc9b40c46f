"""NVIDIA's tools: from the wheels that pyproject.toml pins, or the CUDA Toolkit."""

import functools
import pathlib
import shutil
import sysconfig


@functools.cache
def find(name):
    wheels = pathlib.Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    found = shutil.which(name, path=str(wheels)) or shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if not found:
        raise FileNotFoundError(f"{name} is missing: pip install nvidia-cuda-{name}, or the CUDA Toolkit")
    return found

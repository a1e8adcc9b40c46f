"""Libraries that some commands and modules need, and `import holdfast` does not."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["require"]


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of pyproject.toml has it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.split(".")[0]
        if error.name != name:
            raise
        raise ModuleNotFoundError(f"{name} is not installed: pip install 'holdfast[{extra}]'", name=name) from error

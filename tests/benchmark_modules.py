"""Modules of benchmarks/, which is no part of what is installed, for tests that need no process of their own."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def benchmark(name: str) -> ModuleType:
    """benchmarks/<name>.py."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if "benchmarks" not in sys.modules:
        spec = importlib.util.spec_from_file_location("benchmarks", folder / "__init__.py")
        assert spec is not None and spec.loader is not None
        sys.modules["benchmarks"] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return importlib.import_module(f"benchmarks.{name}")

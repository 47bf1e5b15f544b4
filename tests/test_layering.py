"""The layers of the house, read from the imports with `ast`; and each rule shown to notice its breach."""

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGES = {"kernels": "fused_beit.kernels", "engine": "fused_beit.engine"}
NOT_PACKAGED = ("tests", "benchmarks")
MAX_LINES = 500


@dataclass(frozen=True)
class Module:
    """One Python file and what it imports, wherever in the file."""

    path: Path  # relative to the root
    text: str

    @property
    def folder(self) -> str:
        return self.path.parts[0]

    @property
    def name(self) -> str:
        """Dotted name as it is imported: `fused_beit.kernels.impl` for `kernels/impl.py`."""
        parts = [*self.path.parent.parts, self.path.stem]
        parts[0] = PACKAGES.get(parts[0], parts[0])
        return ".".join(parts).removesuffix(".__init__")

    @property
    def is_script(self) -> bool:
        """Whether it is run and not imported: it stands directly in `engine/` and has a `__main__` part."""
        return self.path.parent == Path("engine") and 'if __name__ == "__main__"' in self.text

    def import_statements(self) -> Iterator[tuple[ast.Import | ast.ImportFrom, str, list[str]]]:
        """Each import as (statement, absolute module, names taken from it)."""
        package = self.name.split(".") if self.path.stem == "__init__" else self.name.split(".")[:-1]
        for node in ast.walk(ast.parse(self.text)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node, alias.name, []
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                yield node, module, [alias.name for alias in node.names]

    def imports(self) -> set[str]:
        """Absolute dotted names; `from a import b` counts as `a` and `a.b`, for `b` may be a module."""
        found = set()
        for _, module, names in self.import_statements():
            found |= {module, *(f"{module}.{name}" for name in names)}
        return found

    def imports_any(self, *modules: str) -> list[str]:
        """Those of `modules` that this file imports, or imports from."""
        found = self.imports()
        return [module for module in modules if any(is_within(name, module) for name in found)]


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def read_tree(root: Path) -> list[Module]:
    folders = (*PACKAGES, *NOT_PACKAGED)
    paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return [Module(path.relative_to(root), path.read_text()) for path in paths]


def kernels_know_only_torch_and_triton(tree: list[Module]) -> Iterator[str]:
    allowed = {"torch", "triton", "xformers", *sys.stdlib_module_names}  # xformers has a rule of its own
    for module in tree:
        if module.folder == "kernels":
            for name in module.imports():
                if name.split(".")[0] not in allowed and not is_within(name, "fused_beit.kernels"):
                    yield f"{module.path} imports {name}"


def triton_is_imported_only_by_kernels(tree: list[Module]) -> Iterator[str]:
    peers_scheme = Path(
        "benchmarks/attention_batch_loop.py"
    )  # timed against, and used nowhere: no kernel of the library
    for module in tree:
        beside = module.folder in ("engine", "benchmarks") and module.path != peers_scheme
        if beside and module.imports_any("triton"):
            yield f"{module.path} imports triton"


def deepspeed_has_one_importer(tree: list[Module]) -> Iterator[str]:
    for module in tree:
        owner = module.path == Path("engine/training/zero.py")
        if module.folder in PACKAGES and not owner and module.imports_any("deepspeed"):
            yield f"{module.path} imports deepspeed"


def xformers_has_at_most_one_importer(tree: list[Module]) -> Iterator[str]:
    importers = [str(module.path) for module in tree if module.folder in PACKAGES and module.imports_any("xformers")]
    if len(importers) > 1:
        yield f"xformers is imported by {' and '.join(importers)}"


def lower_layers_do_not_know_higher_ones(tree: list[Module]) -> Iterator[str]:
    engine = "fused_beit.engine"
    forbidden = {
        "fused_beit.kernels": [engine],
        f"{engine}.data": [f"{engine}.models", f"{engine}.tokenizer", f"{engine}.training", f"{engine}.planning"],
        f"{engine}.models": [f"{engine}.data", f"{engine}.tokenizer", f"{engine}.training", f"{engine}.planning"],
        f"{engine}.tokenizer": [f"{engine}.models", f"{engine}.training", f"{engine}.planning"],
        f"{engine}.training": [f"{engine}.planning"],
        # A plan counts and runs nothing: it answers without DeepSpeed, which it would take to join a process group.
        f"{engine}.planning": [f"{engine}.training.zero", f"{engine}.training.pretraining", f"{engine}.data"],
    }
    for module in tree:
        for lower, higher in forbidden.items():
            if is_within(module.name, lower):
                yield from (f"{module.path} imports {name}" for name in module.imports_any(*higher))


def nothing_imports_a_script_test_or_benchmark(tree: list[Module]) -> Iterator[str]:
    scripts = [module.name for module in tree if module.is_script]
    for module in tree:
        for name in module.imports():
            parts = name.split(".")
            is_run = any(part.startswith(("test_", "bench_")) or part == "conftest" for part in parts)
            other_folder = parts[0] in NOT_PACKAGED and parts[0] != module.folder
            if is_run or other_folder or any(is_within(name, script) for script in scripts):
                yield f"{module.path} imports {name}"


def settings_import_no_torch(tree: list[Module]) -> Iterator[str]:
    torchless = {Path("engine", name) for name in ("config.py", "errors.py", "command_line.py", "hardware.py")}
    torchless.add(Path("engine", "planning", "settings.py"))
    for module in tree:
        if module.path in torchless and module.imports_any("torch", "fused_beit.kernels", "deepspeed"):
            yield f"{module.path} imports torch"


def optimised_code_does_not_import_its_reference(tree: list[Module]) -> Iterator[str]:
    for module in tree:
        if module.folder == "kernels" and module.path.name != "op.py":
            names = [name for name in module.imports() if is_within(name, "fused_beit.kernels")]
            if any("reference" in name.split(".") for name in names):
                yield f"{module.path} imports a reference.py; only op.py, which dispatches, may"


def imports_are_relative_inside_a_package_only(tree: list[Module]) -> Iterator[str]:
    for module in tree:
        home = PACKAGES.get(module.folder)
        for node, name, _ in module.import_statements():
            relative = isinstance(node, ast.ImportFrom) and node.level > 0
            if home and relative and not is_within(name, home):
                yield f"{module.path} reaches {name} by a relative import"
            if home and not relative and is_within(name, home) and not module.is_script:
                yield f"{module.path} imports {name}, of its own package, by its absolute name"
            if home and relative and module.is_script:
                yield f"{module.path} is run as a script and imports {name} relatively"
            if name.split(".")[0] in PACKAGES:
                yield f"{module.path} imports {name}, which users know as {PACKAGES[name.split('.')[0]]}"


def names_in_engine_shadow_nothing(tree: list[Module]) -> Iterator[str]:
    """A script there has `engine/` first on its path, so `engine/profile.py` would stand for Python's `profile`."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    own = {"__init__"}
    children = {Path(module.path.parts[1]).stem for module in tree if module.folder == "engine"}
    for name in sorted(children & taken - own):
        yield f"engine/{name} bears the name of a module of Python or of an installed package"


def no_drawers_for_odds_and_ends(tree: list[Module]) -> Iterator[str]:
    drawers = {"util", "utils", "common", "helper", "helpers", "misc"}
    for module in tree:
        if drawers & {part.removesuffix(".py").strip("_") for part in module.path.parts}:
            yield f"{module.path}: a thing lives with what it is about"


def files_are_short(tree: list[Module]) -> Iterator[str]:
    for module in tree:
        if (lines := len(module.text.splitlines())) > MAX_LINES:
            yield f"{module.path} has {lines} lines, more than {MAX_LINES}"


# Each rule with files that break it, one breach a file.
RULES: dict[Callable[[list[Module]], Iterator[str]], dict[str, str]] = {
    kernels_know_only_torch_and_triton: {
        "kernels/impl.py": "import numpy",
        "kernels/a/op.py": "def f():\n    from transformers.models import beit",
        "kernels/b/op.py": "from fused_beit.engine import config",
    },
    triton_is_imported_only_by_kernels: {
        "engine/models/encoder.py": "import triton.language as tl",
        "benchmarks/attention.py": "def f():\n    import triton",
    },
    deepspeed_has_one_importer: {
        "engine/training/loop.py": "def f():\n    import deepspeed",
        "engine/pretrain.py": "from deepspeed.comm import barrier",
    },
    xformers_has_at_most_one_importer: {"kernels/a/op.py": "import xformers", "engine/a.py": "import xformers.ops"},
    lower_layers_do_not_know_higher_ones: {
        "kernels/impl.py": "from fused_beit.engine.models import Encoder",
        "engine/models/mim.py": "from ..training import loop",
        "engine/tokenizer/files.py": "from .. import training",
        "engine/data/loading.py": "from ..models.encoder import Encoder",
        "engine/training/header.py": "from ..planning.choice import choose",
        "engine/planning/choice.py": "from ..training.zero import start",
    },
    nothing_imports_a_script_test_or_benchmark: {
        "engine/training/loop.py": "from ..pretrain import main",
        "tests/test_a.py": "from fused_beit.engine import pretrain",
        "benchmarks/bench_a.py": "from . import bench_b",
        "engine/plan.py": "from benchmarks import gate",
        "tests/test_b.py": "import test_a",
    },
    settings_import_no_torch: {
        "engine/config.py": "import torch",
        "engine/errors.py": "from torch import nn",
        "engine/command_line.py": "from fused_beit.kernels import Impl",
    },
    optimised_code_does_not_import_its_reference: {
        "kernels/a/forward.py": "from .reference import f",
        "kernels/a/backward.py": "from . import reference",
        "kernels/b/__init__.py": "from ..a.reference import f",
    },
    imports_are_relative_inside_a_package_only: {
        "kernels/a/op.py": "from fused_beit.kernels.impl import Impl",
        "engine/models/mim.py": "from ...kernels import Impl",
        "engine/pretrain.py": 'from .config import Settings\nif __name__ == "__main__":\n    pass',
        "tests/test_a.py": "from kernels import rel_pos_attention",
    },
    names_in_engine_shadow_nothing: {"engine/profile.py": "", "engine/tokenizers/dvae.py": "", "engine/torch.py": ""},
    no_drawers_for_odds_and_ends: {"kernels/a/_utils.py": "", "engine/common/a.py": "", "benchmarks/misc.py": ""},
    files_are_short: {"tests/test_a.py": "\n" * (MAX_LINES + 1)},
}
SCRIPT = {"engine/pretrain.py": 'from fused_beit.engine.config import Settings\nif __name__ == "__main__":\n    pass\n'}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps(rule, root):
    tree = read_tree(root)
    assert len(tree) > 10, "the tree was not found"
    assert list(rule(tree)) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_breach_is_noticed(rule, tmp_path):
    for path, text in (SCRIPT | RULES[rule]).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = list(rule(read_tree(tmp_path)))
    for path in RULES[rule]:
        stem = path.split("/")[1].removesuffix(".py") if rule is names_in_engine_shadow_nothing else path
        assert any(stem in line for line in found), f"{path} went unnoticed in {found}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_proper_tree_has_no_breach(rule, tmp_path):
    files = SCRIPT | {
        "kernels/__init__.py": "from .a import f",
        "kernels/a/__init__.py": "from .op import f",
        "kernels/a/op.py": "import torch\nfrom ..impl import Impl\nfrom . import reference\nfrom .reference import f",
        "kernels/a/forward.py": "import math\nimport triton\nimport triton.language as tl",
        "kernels/a/xformers.py": "def f():\n    import xformers.ops",
        "engine/models/mim.py": "import torch\nfrom fused_beit.kernels import f\nfrom ..config import Settings",
        "engine/training/zero.py": "import deepspeed\nfrom ..models.mim import Model",
        "tests/test_a.py": "import triton\nfrom fused_beit.kernels import f",
        "benchmarks/bench_a.py": "from .gate import check",
        "benchmarks/attention_batch_loop.py": "import triton",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert list(rule(read_tree(tmp_path))) == []


def import_without(absent: str, modules: list[str], path: Path | None = None) -> subprocess.CompletedProcess:
    """Import `modules` in a fresh interpreter in which `absent` cannot be imported."""
    code = f"import sys; sys.modules[{absent!r}] = None; import {', '.join(modules)}"
    return subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True, timeout=120)


def test_kernels_import_where_triton_is_absent():
    result = import_without("triton", ["fused_beit.kernels", "fused_beit.kernels.testing"])
    assert result.returncode == 0, result.stderr


def test_settings_import_where_torch_is_absent():
    modules = ["config", "errors", "command_line", "hardware", "planning.settings"]
    result = import_without("torch", [f"fused_beit.engine.{name}" for name in modules])
    assert result.returncode == 0, result.stderr


def test_an_import_at_module_level_is_noticed_when_its_module_is_absent(tmp_path):
    (tmp_path / "early.py").write_text("import triton.language")
    result = import_without("triton", ["early"], tmp_path)
    assert result.returncode != 0
    assert "triton.language" in result.stderr

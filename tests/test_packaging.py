"""What is installed: every module and data file, editable or as a wheel, and nothing undeclared."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest
from setuptools import find_packages

FOLDERS = ("kernels", "engine", "ds_configs")
# Imported only where they are installed; nothing needs them.
OPTIONAL = {"tensorboard", "xformers"}


def normalized(distribution: str) -> str:
    """Name of a distribution as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def shipped_files(root: Path) -> set[str]:
    """Every file of the packages that an installation needs, as `engine/presets/digits.toml`."""
    paths = (path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file())
    kept = (path for path in paths if "__pycache__" not in path.parts and path.suffix not in (".md", ".pyc"))
    return {path.relative_to(root).as_posix() for path in kept}


@pytest.fixture
def sources(root, tmp_path):
    """A copy of what a build reads, so that nothing is written into the tree."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    for folder in FOLDERS:
        shutil.copytree(root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_every_file_of_the_packages_is_taken_into_a_build(root, sources):
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=sources, check=True, capture_output=True, timeout=120)
    built = sources / "built" / "fused_beit"
    found = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    assert found == shipped_files(root)


def test_every_folder_with_modules_is_a_package(root):
    for folder in FOLDERS[:2]:
        packages = {(root / folder).joinpath(*name.split(".")) for name in find_packages(root / folder)}
        with_modules = {path.parent for path in (root / folder).rglob("*.py")}
        assert with_modules == packages | {root / folder}


@pytest.mark.parametrize("folder", FOLDERS)
def test_installed_package_is_found_under_the_namespace(folder, root):
    files = {entry.name for entry in resources.files(f"fused_beit.{folder}").iterdir()}
    assert {path.name for path in (root / folder).iterdir() if path.is_file()} <= files


def test_importing_leaves_no_short_name_behind():
    code = "import sys, fused_beit.kernels, fused_beit.engine; print(sorted({'kernels', 'engine'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
    assert shown.stdout.strip() == "[]", shown.stderr


def test_every_third_party_import_is_a_declared_dependency(root):
    declared = {normalized(re.match(r"[\w.-]+", line)[0]) for line in metadata.requires("fused-beit")}
    distributions = metadata.packages_distributions()
    for path in (path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"fused_beit"} - OPTIONAL:
                owners = {normalized(name) for name in distributions.get(top, [top])}
                assert owners & declared, f"{path.relative_to(root)} imports {top}, which setup does not ask for"


def test_metadata_names_the_licence_and_the_python_it_needs(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    found = metadata.metadata("fused-beit")
    assert (root / "LICENSE").read_text().startswith("MIT License")
    assert project["license"] == found["License-Expression"] == "MIT"
    assert found["Requires-Python"] == ">=3.11"


def test_changelog_has_the_version(root):
    assert f"## [{metadata.version('fused-beit')}]" in (root / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_wheel_holds_every_file_and_imports_from_itself(root, sources, tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, "."]
    subprocess.run(build, cwd=sources, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("fused_beit-*.whl")
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    installed = {path.relative_to(target / "fused_beit").as_posix() for path in (target / "fused_beit").rglob("*.*")}
    assert shipped_files(root) <= installed

    code = (
        "import fused_beit.kernels as kernels, fused_beit.engine.command_line as command_line\n"
        "print(kernels.__file__, command_line.__file__, *command_line.preset_names(), sep='\\n')"
    )
    # PYTHONPATH comes before what is installed editable, so both modules must come out of the wheel.
    environment = os.environ | {"PYTHONPATH": str(target)}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stderr
    kernels, command_line, *presets = shown.stdout.split()
    assert Path(kernels).is_relative_to(target)
    assert Path(command_line).is_relative_to(target)
    assert presets == sorted(path.stem for path in (root / "engine" / "presets").glob("*.toml"))

"""What the README and the other pages tell a user to type exists: targets, scripts, options, presets, links, code."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from fused_beit.engine.command_line import preset_names

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = ("deepspeed", "torchrun", "python")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(text: str) -> list[list[str]]:
    """Words of every line that starts one of our scripts, from the launcher on."""
    found = []
    for line in text.splitlines():
        words = shlex.split(line.strip(" `"), comments=True) if "engine/" in line and ".py" in line else []
        starts = [i for i, word in enumerate(words) if word in LAUNCHERS]
        if starts and any(word.startswith("engine/") for word in words):
            found.append(words[starts[0] :])
    return found


def options(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


@cache
def known_options(script: str) -> set[str]:
    """Options that a script's --help shows."""
    environment = os.environ | {"COLUMNS": "200"}
    command = [sys.executable, script, "--help"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    return set(re.findall(r"--[\w.-]+", shown.stdout))


@cache
def launcher_options(launcher: str) -> set[str]:
    if launcher == "python":
        return set()
    program = Path(sys.executable).with_name(launcher)
    shown = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=120)
    return {with_underscores(option) for option in re.findall(r"--[\w-]+", shown.stdout)}


def with_underscores(option: str) -> str:
    """torchrun shows its options with hyphens and takes underscores too."""
    return "--" + option.removeprefix("--").replace("-", "_")


def test_the_pages_have_commands_to_check():
    assert len(commands((ROOT / "README.md").read_text())) >= 5


@pages
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w.-]+):", makefile, re.MULTILINE))
    named = re.findall(r"(?:`|^ {4,})make ([a-z.][a-z-]*)", page.read_text(), re.MULTILINE)
    assert set(named) <= targets


def test_every_target_explains_itself():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    explained = re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    assert set(explained) == {name for name in phony if not name.startswith(".")} - {"help"}


@pages
def test_commands_name_scripts_and_options_that_exist(page):
    for words in commands(page.read_text()):
        at = next(i for i, word in enumerate(words) if word.startswith("engine/"))
        script = words[at]
        assert (ROOT / script).is_file(), f"{page.name} runs {script}"
        unknown = set(options(words[at:])) - known_options(script)
        assert not unknown, f"{page.name} gives {script} {unknown}"
        launcher = {with_underscores(option) for option in options(words[:at])}
        assert launcher <= launcher_options(words[0]), f"{page.name} gives {words[0]} other options than it has"


@pages
def test_settings_named_in_the_text_exist(page):
    sections = {option.split(".")[0] for option in known_options("engine/pretrain.py") if "." in option}
    named = re.findall(r"`(?:--)?([a-z]+\.(?!safetensors)[a-z_]+)[ `]", page.read_text())
    unknown = {f"--{name}" for name in named if f"--{name.split('.')[0]}" in sections} - known_options(
        "engine/pretrain.py"
    )
    assert not unknown


@pages
def test_presets_exist(page):
    text = page.read_text()
    named = set(re.findall(r"--preset (\w+)", text)) | set(re.findall(r"`(beit_\w+)`", text))
    assert named - {"NAME"} <= set(preset_names())


def test_every_preset_is_listed():
    recipes = (ROOT / "docs" / "recipes.md").read_text()
    assert [name for name in preset_names() if f"`{name}`" not in recipes] == []


@pages
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pages
def test_python_examples_run(page):
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code, page.name, "exec"), {"__name__": "example"})


def test_a_command_with_a_wrong_option_is_noticed():
    (words,) = commands("    deepspeed --num_gpus 2 engine/pretrain.py --optim.learning_rate 1e-3  # why not")
    assert words == ["deepspeed", "--num_gpus", "2", "engine/pretrain.py", "--optim.learning_rate", "1e-3"]
    assert "--optim.lr" in known_options("engine/pretrain.py")
    assert "--optim.learning_rate" not in known_options("engine/pretrain.py")
    assert "--num_gpus" in launcher_options("deepspeed")
    assert "--gpus" not in launcher_options("deepspeed")

"""The command `plan.py`: what the pages show is what it prints, and it needs neither DeepSpeed nor pictures."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fused_beit.engine.command_line import run_script

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- plan ([^\n]*): begin -->\n(.*?)<!-- end -->", re.DOTALL)


def blocks(root):
    return BLOCK.findall((root / "docs" / "planning.md").read_text())


MAIN = runpy.run_path(str(ROOT / "engine" / "plan.py"))["main"]


def printed(argv, folder, monkeypatch, capsys):
    """What a command prints, and its exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["plan.py", *argv])
    code = 0
    try:
        run_script(MAIN)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return said.out + said.err, code


def indented(text):
    return "\n" + "".join(f"    {line}\n" for line in text.splitlines()) + "\n"


def test_the_page_shows_what_is_printed(root, tmp_path, monkeypatch, capsys):
    shown = blocks(root)
    assert len(shown) >= 4
    for command, text in shown:
        said, code = printed(shlex.split(command), tmp_path, monkeypatch, capsys)
        assert text == indented(said), f"docs/planning.md shows another output of plan.py {command}"
        assert code == (2 if said.startswith("error: ") else 0)


def test_the_command_that_is_printed_is_one_of_pretrain(root, tmp_path, monkeypatch, capsys):
    from fused_beit.engine.command_line import parse

    said, _ = printed(["--preset", "digits", "--gpus", "2", "--optim.lr", "1e-3"], tmp_path, monkeypatch, capsys)
    words = shlex.split(said.splitlines()[said.splitlines().index("start it with") + 1])
    assert words[:4] == ["deepspeed", "--num_gpus", "2", "engine/pretrain.py"]
    settings = parse(words[4:], description="")
    assert (settings.zero.stage, settings.train.micro_batch, settings.optim.lr) == (1, 32, 1e-3)


def test_pictures_are_counted_or_given(tmp_path, monkeypatch, capsys):
    said, code = printed(["--preset", "beit_small"], tmp_path, monkeypatch, capsys)
    assert code == 2
    assert "--pictures N" in said and "--data.path FOLDER" in said
    said, code = printed(["--preset", "beit_small", "--pictures", "5000"], tmp_path, monkeypatch, capsys)
    assert code == 0
    assert re.search(r"pictures +5,000: as given", said)
    assert re.search(r"steps +5,700 of 256 images", said)  # 300 epochs of 19
    said, code = printed(["--preset", "beit_small", "--pictures", "200"], tmp_path, monkeypatch, capsys)
    assert code == 2
    assert "200 pictures" in said and "train.global_batch = 256" in said


def test_a_price_gives_a_cost_of_the_hours(tmp_path, monkeypatch, capsys):
    said, _ = printed(["--preset", "beit_base_in1k_800ep", "--price_per_gpu_hour", "2"], tmp_path, monkeypatch, capsys)
    hours = float(re.search(r"([\d,.]+) GPU hours", said)[1].replace(",", ""))
    cost = float(re.search(r"cost +([\d,.]+) at 2", said)[1].replace(",", ""))
    energy = float(re.search(r"energy +([\d,.]+) kWh", said)[1].replace(",", ""))
    assert cost == pytest.approx(2 * hours, rel=2e-3)
    assert energy == pytest.approx(0.7 * hours, rel=2e-3)


def test_a_sweep_that_cannot_be_written_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").write_text("")
    said, code = printed(["--sweep", "taken/scaling.svg"], tmp_path, monkeypatch, capsys)
    assert code == 2
    assert "sweep = taken/scaling.svg cannot be written" in said


def test_a_plan_loads_no_deepspeed(root):
    code = "import runpy, sys; sys.modules['deepspeed'] = None; runpy.run_path('engine/plan.py', run_name='__main__')"
    made = subprocess.run(
        [sys.executable, "-c", code, "--gpus", "4"], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    assert "ZeRO stage" in made.stdout


@pytest.mark.parametrize("preset", ["beit_tiny", "beit_small", "beit_base_in22k", "beit_base_in1k_300ep"])
def test_every_preset_can_be_planned(preset, tmp_path, monkeypatch, capsys):
    said, code = printed(["--preset", preset, "--pictures", "100000", "--gpus", "2"], tmp_path, monkeypatch, capsys)
    assert code == 0, said

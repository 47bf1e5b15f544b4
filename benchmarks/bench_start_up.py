"""From the start of the process to the first optimizer step: `engine/pretrain.py` on the built-in digits.

A whole process each time, with a tokenizer that is given, as a run that is queued again has one. Its parts are in the
JSON: imports from one run under `python -X importtime`, which is not timed; what was built when the header was printed,
and the first step after it, medians over the rounds.
"""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pytest
import torch

from fused_beit.engine.command_line import parse
from fused_beit.engine.tokenizer.dvae import DiscreteVAE
from fused_beit.engine.tokenizer.files import save_tokenizer

from .machine import ROOT
from .rounds import Row

HEADER, FIRST_STEP = "run", "step 1/1 "
IMPORTED = {"torch": "import_torch_s", "deepspeed": "import_deepspeed_s"}
PARTS = ("header_s", "first_step_s")


@dataclass
class StartUp:
    """A pre-training of one step, started anew by each call, and when its lines came."""

    folder: Path
    tokenizer: Path
    lines: dict[str, float] = field(default_factory=dict)
    """A line's beginning -> seconds from the start, in the last call."""
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, *interpreter_options: str) -> str:
        """Run to the end; returns what it wrote to stderr. Raises AssertionError where there was no first step."""
        script = str(ROOT / "engine" / "pretrain.py")
        options = ["--tokenizer.path", str(self.tokenizer), "--output_dir", str(self.folder), "--overwrite"]
        options += ["--train.max_steps", "1", "--train.log_every", "1", "--optim.warmup_steps", "0"]
        command = [sys.executable, *interpreter_options, script, *options]
        self.lines = {}
        with (self.folder.parent / "stderr").open("w+") as errors:
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment())
            assert process.stdout is not None
            with process, process.stdout:
                for line in process.stdout:
                    for beginning in (HEADER, FIRST_STEP):
                        if line.startswith(beginning):
                            self.lines.setdefault(beginning, time.perf_counter() - start)
            errors.seek(0)
            said = errors.read()
        assert process.returncode == 0, f"engine/pretrain.py ended with {process.returncode}: {said[-2000:]}"
        assert self.lines.keys() == {HEADER, FIRST_STEP}, f"no first step was seen, only {list(self.lines)}"
        return said


def environment() -> dict[str, str]:
    """Without what pytest or a launcher set for this process."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def import_seconds(said: str) -> dict[str, float]:
    """Seconds of the large imports, what they import themselves included, from the lines of -X importtime.

    deepspeed imports torch, so its own share is what it adds.
    """
    lines = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \| (\s*)(\S+)$", said, flags=re.MULTILINE)
    found = {name: int(microseconds) / 1e6 for microseconds, _, name in lines if name in IMPORTED}
    assert found.keys() == IMPORTED.keys(), f"imports not seen: {IMPORTED.keys() - found.keys()}"
    return {IMPORTED[name]: seconds for name, seconds in found.items()}


@pytest.fixture
def start_up(tmp_path) -> StartUp:
    sizes = parse([], description="").tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = DiscreteVAE(sizes.vocab_size, sizes.width, sizes.groups, sizes.blocks_per_group)
    save_tokenizer(tokenizer, tmp_path / "tokenizer.safetensors")
    return StartUp(tmp_path / "run", tmp_path / "tokenizer.safetensors")


def test_start_up(drive, keep, sizes, start_up):
    imports = import_seconds(start_up("-X", "importtime"))
    row = Row("from the start of the process to the first step, digits", "fused_beit")
    parts: dict[str, list[float]] = {name: [] for name in PARTS}

    def run() -> None:
        start_up()
        header, first_step = start_up.lines[HEADER], start_up.lines[FIRST_STEP]
        row.seconds.append(first_step)
        parts["header_s"].append(header)
        parts["first_step_s"].append(first_step - header)

    drive(lambda: None, run, 1 if sizes == "smoke" else 2)
    row.facts = imports | {name: median(seconds) for name, seconds in parts.items()}
    keep([row])

"""A pre-training of seconds, for tests: digits, a two-block model, an untrained tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch

from fused_beit.engine.command_line import parse
from fused_beit.engine.config import Settings
from fused_beit.engine.tokenizer.dvae import DiscreteVAE
from fused_beit.engine.tokenizer.files import save_tokenizer

SIZE = {
    "model.width": 16,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.abs_pos_embed": True,
    "model.layer_scale": 0.1,
    "model.drop_path": 0.2,
    "train.global_batch": 8,
    "train.max_steps": 6,
    "train.log_every": 1,
    "train.threads": 1,
    "optim.lr": 2e-3,
    "optim.warmup_steps": 2,
    "data.val_max": 16,
    "data.workers": 0,
}


def make_tokenizer(path: Path) -> Path:
    """An untrained tokenizer of the digits' shape; the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = DiscreteVAE(vocab_size=32, width=8, groups=3, blocks_per_group=1)
    save_tokenizer(tokenizer, path)
    return path


def small_argv(output_dir: Path, tokenizer: Path, **changes: Any) -> list[str]:
    """Options of a small run; `changes` are dotted names with `__` for the dot."""
    values = SIZE | {"output_dir": output_dir, "tokenizer.path": tokenizer}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    argv = []
    for name, value in values.items():
        values_of = value if isinstance(value, list) else [value]
        argv += [f"--{name}"] if value is True else [f"--{name}", *map(str, values_of)]
    return argv


def small_settings(output_dir: Path, tokenizer: Path, **changes: Any) -> Settings:
    return parse(small_argv(output_dir, tokenizer, **changes), description="")


def train_rows(output_dir: Path) -> list[dict[str, Any]]:
    """The training rows of a run's metrics."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def losses(output_dir: Path) -> list[float]:
    return [row["loss"] for row in train_rows(output_dir)]

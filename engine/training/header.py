"""What a run prints before it starts: what it will do, on what, and what each thing was resolved to."""

import math
from collections.abc import Mapping

from ..config import Settings, result_settings, speed_settings


def header(settings: Settings, sections: Mapping[str, Mapping[str, str]]) -> str:
    """The run's header.

    Args:
        settings: resolved settings; those that change the result are printed apart from those that change the speed.
        sections: further blocks, as `{title: {name: value}}`.
    """
    blocks = dict(sections) | {
        "settings that change the result": in_lines(result_settings(settings)),
        "settings that change only the speed": in_lines(speed_settings(settings)),
    }
    lines = []
    for title, values in blocks.items():
        lines.append(title)
        width = max((len(name) for name in values), default=0)
        lines += [f"  {name:<{width}}  {value}" for name, value in values.items()]
    return "\n".join(lines)


def in_lines(values: Mapping[str, object]) -> dict[str, str]:
    """Settings as one line a section: `{"optim": "lr=0.0015 min_lr=1e-05 ..."}`."""
    sections: dict[str, list[str]] = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section or "run", []).append(f"{field}={value}")
    return {section: " ".join(fields) for section, fields in sections.items()}


def training_memory(
    *, parameters: int, width: int, depth: int, num_heads: int, tokens: int, num_masked: int,
    vocab_size: int, micro_batch: int, stage: int, world_size: int, activation_bytes: int,
) -> float:  # fmt: skip
    """Estimate of a rank's memory in bytes: weights, gradients, AdamW's state, saved activations.

    Weights, gradients and the two moments are fp32; stages 1, 2, 3 divide the moments, gradients and weights by the
    ranks and add a flat fp32 copy (ZeRO, Rajbhandari et al. 2020, section 5). A block saves about 18 tensors of
    `[batch, tokens, width]` and two of `[batch, heads, tokens, tokens]` when its attention is not fused; the head keeps
    the logits and their gradient in fp32. The tokenizer is not counted.
    """
    shard = [1 if stage < level else 1 / world_size for level in (1, 2, 3)]
    moments = (8 + (4 if stage else 0)) * shard[0]
    state = parameters * (moments + 4 * shard[1] + 4 * shard[2])
    block = 18 * tokens * width + 2 * num_heads * tokens**2
    head = 8 * num_masked * vocab_size
    return state + float(micro_batch) * (depth * block * activation_bytes + head)


def human_bytes(count: float) -> str:
    """`1.5 GB` and the like."""
    if count < 1:
        return "0 B"
    power = min(int(math.log(count, 1000)), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"

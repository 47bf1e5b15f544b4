"""Which modules of a model compute attention, as far as names tell: so that `fuse` leaves none of them unmentioned."""

import re
from collections.abc import Callable

from torch import nn

NAMED = re.compile("attn|attention", re.IGNORECASE)
# Children that project to queries, keys and values; XCiT's XCA is called nothing else.
PROJECTIONS = tuple(
    set(names.split())
    for names in (
        "qkv",
        "to_qkv",
        "in_proj_qkv",
        "c_attn",
        "q kv",
        "to_q to_kv",
        "q k v",
        "to_q to_k to_v",
        "wq wk wv",
        "query key value",
        "q_proj k_proj v_proj",
        "q_lin k_lin v_lin",
    )
)


def looks_like_attention(module: nn.Module) -> bool:
    """By the name of its class, or of its children."""
    children = {name for name, _ in module.named_children()}
    return NAMED.search(type(module).__name__) is not None or any(names <= children for names in PROJECTIONS)


def attention_seen(model: nn.Module, known: Callable[[nn.Module], bool]) -> set[str]:
    """Names of the modules that look like attention and are not known, nor in one that is known.

    Of modules inside one another the innermost counts: those around it hand their arguments on.
    """
    names: set[str] = set()
    skipped: list[str] = []  # modules that are known
    for name, module in model.named_modules():
        if known(module):
            skipped.append(name)
        elif looks_like_attention(module) and not any(_is_inside(name, outer) for outer in skipped):
            names.add(name)
    inner = [*names, *skipped]
    return {name for name in names if not any(_is_inside(other, name) for other in inner)}


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))

"""Where the time of a step goes, as docs/performance.md shows it: `python -m fused_beit.engine.planning.budget`.

BEiT on an H100. Operators and bytes are counted; `at least` is the time at the rate of a large product and the
bandwidth of a large copy; `likely` is what a plan predicts. All of it is arithmetic, with attention's shares of the
rate as an H100 had them.
"""

from collections.abc import Iterable, Iterator, Sequence

from ..config import ModelSettings
from ..hardware import GPUS
from ..models.flops import parameter_count, pretraining_flops
from ..tokenizer.flops import DALLE
from .count import Operators, PassShape, pass_operators, token_operators
from .pass_time import BANDWIDTH, OPTIMIZER_BYTES, host_seconds, seconds
from .settings import DISPATCH_US

GPU = GPUS["h100"]
MEASURED_TFLOPS = 798.0
"""Of large products in bf16, as others measured it."""
BASE = ModelSettings()
LARGE = ModelSettings(width=1024, depth=24, num_heads=16, layer_scale=1e-5)
IMPLS = ("auto", "triton")


def of_model(model: ModelSettings, num_images: int, impl: str, *, compiled: bool = False) -> list[Operators]:
    """Operators of the forward and backward pass, and the 27 of the optimizer."""
    shape = PassShape(model, 224, 75, DALLE.vocab_size, impl, bf16=True, compiled=compiled)
    moved = OPTIMIZER_BYTES * parameter_count(model, 224, DALLE.vocab_size)
    optimizer = Operators("AdamW and the norm", "", True, False, False, starts=27, flops=0.0, bytes=moved)
    return [*pass_operators(shape, num_images), optimizer]


def of_tokens(impl: str) -> list[Operators]:
    return token_operators(DALLE, 112, 128, impl=impl, bf16=True)


def least(found: Iterable[Operators]) -> float:
    """Seconds at the rate of a large product and the bandwidth of a large copy."""
    bandwidth = 1e9 * GPU.bandwidth_gb_s * BANDWIDTH
    return sum(
        max(one.bytes / bandwidth, one.flops / (1e12 * (MEASURED_TFLOPS if one.half else GPU.fp32_tflops)))
        for one in found
    )


def likely(found: Iterable[Operators]) -> float:
    """Seconds, as a plan predicts them."""
    return sum(seconds(one, GPU) for one in found)


def cells(found: Sequence[Operators]) -> str:
    """Operators, GB, milliseconds at least and likely."""
    starts, moved = sum(one.starts for one in found), sum(one.bytes for one in found)
    return f"{starts:,.0f} | {moved / 1e9:.1f} | {1e3 * least(found):.1f} | {1e3 * likely(found):.1f}"


def by_part() -> Iterator[str]:
    """BEiT-base, 128 images: a line for each part, four columns for each implementation."""
    yield "| part | " + " | ".join(f"`{impl}`: operators | GB | at least, ms | likely, ms" for impl in IMPLS) + " |"
    yield "|---|" + "--:|" * 4 * len(IMPLS)
    for step, whole in (
        (lambda impl: of_model(BASE, 128, impl), "the model"),
        (of_tokens, "tokens of DALL-E's encoder"),
    ):
        found = {impl: step(impl) for impl in IMPLS}
        parts = {
            part: [[one for one in found[impl] if one.part == part] for impl in IMPLS]
            for part in dict.fromkeys(one.part for impl in IMPLS for one in found[impl])
        }
        for part, columns in sorted(parts.items(), key=lambda item: -likely(item[1][0])):
            yield f"| {part} | " + " | ".join(map(cells, columns)) + " |"
        yield f"| *{whole}* | " + " | ".join(cells(found[impl]) for impl in IMPLS) + " |"


def by_shape() -> Iterator[str]:
    """The likely step without tokens: its time, images a second, share of both rates; and the host's time for it."""
    yield "| model, images | implementation | likely, ms | images/s | of 798 TFLOP/s | of 989 | host, ms |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for name, model, num_images in (("base", BASE, 128), ("base", BASE, 256), ("large", LARGE, 128)):
        flops = num_images * pretraining_flops(model, 224, 75, DALLE.vocab_size)
        for impl in IMPLS:
            for compiled in (False, True):
                found = of_model(model, num_images, impl, compiled=compiled)
                time = likely(found)
                shares = (f"{flops / (1e12 * rate * time):.0%}" for rate in (MEASURED_TFLOPS, GPU.bf16_tflops))
                host = host_seconds(found, DISPATCH_US)
                yield (
                    f"| {name}, {num_images} | `{impl}`{', compiled' if compiled else ''} | {1e3 * time:.1f} | "
                    f"{num_images / time:,.0f} | {' | '.join(shares)} | {1e3 * host:.0f} |"
                )


if __name__ == "__main__":
    print(*by_part(), "", *by_shape(), sep="\n")

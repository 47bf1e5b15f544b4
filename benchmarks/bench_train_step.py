"""One pre-training step, forward and backward, against transformers' BEiT with the same weights and the same loss."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor, nn

from fused_beit.engine.config import ModelSettings
from fused_beit.engine.models.flops import pretraining_flops
from fused_beit.engine.models.mim import MaskedImageModel

from .rounds import Outputs, build, check
from .transformers_beit import build_peer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NORMALIZE = "inception"  # (x / 255 - 0.5) / 0.5


@dataclass(frozen=True)
class Case:
    """A model, a batch and a precision. Paths are not dropped, so that all providers compute the same thing."""

    name: str
    settings: ModelSettings
    image_size: int
    vocab_size: int
    batch: int
    num_masked: int
    dtype: torch.dtype

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Weights that all providers share, away from the zeros that some begin with."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = MaskedImageModel(self.settings, self.image_size, self.vocab_size, normalize=NORMALIZE)
            return {name: value + 0.02 * torch.randn(value.shape) for name, value in model.state_dict().items()}

    @cached_property
    def pixels(self) -> Tensor:
        """uint8 [B, 3, S, S]"""
        shape = (self.batch, 3, self.image_size, self.image_size)
        return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    @cached_property
    def num_patches(self) -> int:
        return (self.image_size // self.settings.patch_size) ** 2

    @cached_property
    def masked_positions(self) -> Tensor:
        """int64 [B, M], ascending as transformers' mask gives them"""
        order = torch.rand(self.batch, self.num_patches, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
        return order[:, : self.num_masked].sort(dim=1).values.to(DEVICE)

    @cached_property
    def token_ids(self) -> Tensor:
        """int64 [B, P]"""
        shape = (self.batch, self.num_patches)
        return torch.randint(self.vocab_size, shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


TINY = ModelSettings(width=48, depth=2, num_heads=3, drop_path=0.0)
BASE = ModelSettings(drop_path=0.0)
SIZES = {
    "smoke": {"settings": TINY, "image_size": 64, "vocab_size": 64, "batch": 2, "num_masked": 6},
    "full": {"settings": BASE, "image_size": 224, "vocab_size": 8192, "batch": 4, "num_masked": 75},
}


@dataclass(frozen=True)
class Step:
    """One forward and backward pass of a model, timed by calling it."""

    case: Case
    model: nn.Module
    forward: Callable[[], Tensor]
    """The loss."""
    logits: Callable[[], Tensor]
    """Scores at the masked patches, [B*M, V]."""
    watched: dict[str, Tensor]
    """Parameters whose gradients are checked: the first, the shared and the last ones."""

    def __call__(self) -> Outputs:
        self.model.zero_grad(set_to_none=True)
        with self.case.autocast():
            loss = self.forward()
        loss.backward()
        return {"loss": loss.detach()}

    def outputs(self) -> dict[str, Tensor]:
        """All that is checked: scores, gradients, loss."""
        loss = self()["loss"]
        with torch.no_grad(), self.case.autocast():
            logits = self.logits()
        gradients = {f"gradient of {name}": value.grad for name, value in self.watched.items()}
        return {"logits": logits, **gradients, "loss": loss}


def check_step(name: str, outputs: Outputs, eager: Outputs, exact: Outputs, dtype: torch.dtype) -> dict[str, float]:
    """Assert scores and gradients by the house's rule, and that the loss is the one of these scores.

    A mean cross-entropy moves by no more than twice the largest change of a score, so the scores' error bounds the
    loss's; comparing two losses alone would pass or fail by how errors happen to cancel.
    """
    tensors = {key: value for key, value in exact.items() if key != "loss"}
    errors = check(name, outputs, eager, tensors, dtype)
    largest = (outputs["logits"].double() - exact["logits"]).abs().max()
    bound = 2 * largest + torch.finfo(dtype).eps * exact["loss"].abs()
    off = (outputs["loss"].double() - exact["loss"]).abs()
    assert off <= bound, f"{name}: the loss is off by {off:.2e}, more than the {bound:.2e} that its scores explain"
    return errors | {"loss": float(off / exact["loss"].abs())}


def fused_beit(case: Case, impl: str = "auto", dtype: torch.dtype = torch.float32) -> Step:
    """Our model, from uint8 pixels to the gradients."""
    model = MaskedImageModel(case.settings, case.image_size, case.vocab_size, normalize=NORMALIZE, impl=impl)
    model.load_state_dict(case.state)
    model.to(DEVICE, dtype).train()
    return Step(
        case,
        model,
        lambda: model(case.pixels, case.masked_positions, case.token_ids).loss,
        lambda: model.logits(case.pixels, case.masked_positions).flatten(0, 1),
        {
            "patches": model.encoder.patch_embed.proj.weight,
            "positions": model.encoder.rel_pos_bias.relative_position_bias_table,
            "mask token": model.encoder.mask_token,
            "head": model.lm_head.weight,
        },
    )


def transformers(case: Case, attention: str = "sdpa") -> Step:
    """transformers' model, from pixels that are normalised already."""
    model = build_peer(case.settings, case.image_size, case.vocab_size, case.state, attention=attention).to(DEVICE)
    pixels = (case.pixels.float() / 255 - 0.5) / 0.5
    mask = torch.zeros(case.batch, case.num_patches, dtype=torch.bool, device=DEVICE)
    mask.scatter_(1, case.masked_positions, True)
    labels = case.token_ids.gather(1, case.masked_positions).flatten()
    return Step(
        case,
        model,
        lambda: model(pixels, bool_masked_pos=mask, labels=labels).loss,
        lambda: model(pixels, bool_masked_pos=mask).logits[mask],
        {
            "patches": model.beit.embeddings.patch_embeddings.projection.weight,
            "positions": model.beit.shared_position_bias.relative_position_bias_table,
            "mask token": model.beit.embeddings.mask_token,
            "head": model.lm_head.weight,
        },
    )


def transformers_eager(case: Case) -> Step:
    return transformers(case, attention="eager")


PROVIDERS = {"fused_beit": fused_beit, "transformers, sdpa": transformers, "transformers, eager": transformers_eager}


@pytest.fixture(scope="module")
def exact(sizes: str) -> Outputs:
    """The reference in float64; slow, and the same for every precision."""
    return fused_beit(Case(name="float64", dtype=torch.float64, **SIZES[sizes]), "reference", torch.float64).outputs()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_train_step(benchmark, in_turn, sizes, exact, dtype):
    size = SIZES[sizes]
    name = f"{'BEiT-base' if sizes == 'full' else 'tiny'}, batch {size['batch']}, {str(dtype).removeprefix('torch.')}"
    case = Case(name=name, dtype=dtype, **size)

    runs, absent = build(PROVIDERS, case)
    eager = fused_beit(case, "reference").outputs()
    errors = {provider: check_step(provider, run.outputs(), eager, exact, dtype) for provider, run in runs.items()}

    rows = in_turn(name, runs, rounds=7, absent=absent, errors=errors)
    flops = pretraining_flops(case.settings, case.image_size, case.num_masked, case.vocab_size) * case.batch
    benchmark.extra_info["GFLOP"] = flops / 1e9
    benchmark.extra_info["GFLOP/s"] = flops / 1e9 / sorted(rows[0].seconds)[len(rows[0].seconds) // 2]

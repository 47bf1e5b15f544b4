"""What a training step is timed on, what every provider of it must compute, and how that is checked.

B pictures, S their side in pixels, P patches, M masked ones, V visual tokens.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fused_beit.engine.config import DataSettings, MaskSettings, ModelSettings, OptimSettings, Settings, TrainSettings
from fused_beit.engine.models.flops import pretraining_flops
from fused_beit.engine.models.mim import MaskedImageModel
from fused_beit.engine.tokenizer.dvae import DiscreteVAE

from .rounds import Outputs, check, check_same_work
from .tokenizer import TokenizerShape, build_tokenizer, random_views

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = torch.bfloat16
NORMALIZE = "inception"  # (x / 255 - 0.5) / 0.5
PICTURES_AT_ONCE = 16
"""That the references hold; in float64 they need much memory."""

# Small enough for a step to change no result much, and clipped so strongly that the clipping shows.
OPTIM = OptimSettings(lr=1e-4, clip_grad=0.01)


@dataclass(frozen=True)
class Shape:
    """A model and a batch. Paths are not dropped, so that all providers compute the same thing."""

    settings: ModelSettings
    image_size: int
    vocab_size: int
    batch: int
    num_masked: int
    tokenizer: TokenizerShape | None = None
    """Whose ids the visual tokens are, made once and kept; without it they are random numbers."""
    tokens_in_bf16: bool = False
    """Whether the tokenizer runs under bf16 autocast, as in a run in bf16; for a step in float64 they are the same."""

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.settings.patch_size) ** 2

    @property
    def flops(self) -> float:
        """FLOPs of a step as our engine makes it, by `pretraining_flops`: for all providers the same."""
        return self.batch * pretraining_flops(self.settings, self.image_size, self.num_masked, self.vocab_size)


@dataclass(frozen=True)
class Case:
    """A shape and a precision: fp32 weights, and bf16 autocast where `dtype` is bfloat16."""

    name: str
    shape: Shape
    dtype: torch.dtype
    note: str = ""
    """Why it is not the case that one would expect here."""
    rehearsal: bool = False
    """Whether Triton's interpreter may stand in for a GPU, whose times mean nothing."""

    def __str__(self) -> str:
        return f"{self.name}, batch {self.shape.batch}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def state(self) -> dict[str, Tensor]:
        """Weights that all providers share."""
        return state(self.shape.settings, self.shape.image_size, self.shape.vocab_size)

    @cached_property
    def pixels(self) -> Tensor:
        """uint8 [B, 3, S, S]"""
        size = (self.shape.batch, 3, self.shape.image_size, self.shape.image_size)
        return torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    @cached_property
    def masked_positions(self) -> Tensor:
        """int64 [B, M], ascending as a mask of booleans gives them"""
        size = (self.shape.batch, self.shape.num_patches)
        order = torch.rand(size, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
        return order[:, : self.shape.num_masked].sort(dim=1).values.to(DEVICE)

    @cached_property
    def token_ids(self) -> Tensor:
        """int64 [B, P]"""
        if self.shape.tokenizer is not None:
            return cached_token_ids(self.shape)
        size = (self.shape.batch, self.shape.num_patches)
        return torch.randint(self.shape.vocab_size, size, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    @cached_property
    def targets(self) -> Tensor:
        """int64 [B*M]: the visual tokens of the masked patches"""
        return self.token_ids.gather(1, self.masked_positions).flatten()

    @cached_property
    def normalized(self) -> Tensor:
        """fp32 [B, 3, S, S], for the models that take pixels so"""
        return (self.pixels.float() / 255 - 0.5) / 0.5

    def make_inputs(self) -> None:
        """All that providers share, which is then there before the first of them and counts as memory of none."""
        for made in (self.pixels, self.masked_positions, self.token_ids, self.targets, self.normalized):
            assert made.device.type == DEVICE.type

    def autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.dtype == BF16)

    def run_settings(self, impl: str) -> Settings:
        """The settings with which our engine makes this step."""
        shape = self.shape
        return Settings(
            model=shape.settings,
            data=DataSettings(image_size=shape.image_size, normalize=NORMALIZE),
            mask=MaskSettings(num_patches=shape.num_masked),
            optim=OPTIM,
            train=TrainSettings(global_batch=shape.batch, threads=torch.get_num_threads(), impl=impl),
        )


@functools.lru_cache(maxsize=1)
def tokenizer_weights(shape: TokenizerShape) -> DiscreteVAE:
    return build_tokenizer(shape, DEVICE)


@functools.lru_cache(maxsize=2)
def frozen_tokenizer(shape: TokenizerShape, impl: str) -> DiscreteVAE:
    """A tokenizer that searches its codes by `impl`; those of one shape share their weights."""
    tokenizer = copy.copy(tokenizer_weights(shape))
    tokenizer.impl = impl
    return tokenizer


@functools.lru_cache(maxsize=1)
def token_views(shape: Shape) -> Tensor:
    """uint8 [B, 3, T, T]: what the tokenizer of a shape is given."""
    assert shape.tokenizer is not None
    return random_views(shape.tokenizer, shape.batch, DEVICE)


def make_token_ids(shape: Shape, impl: str = "auto") -> Tensor:
    """int64 [B, P]: the tokenizer's pass, in the precision of the run, as `evaluation.tokens_of` has it."""
    assert shape.tokenizer is not None
    with torch.autocast(DEVICE.type, BF16, enabled=shape.tokens_in_bf16):
        return frozen_tokenizer(shape.tokenizer, impl).encode(token_views(shape))


@functools.lru_cache(maxsize=1)
def cached_token_ids(shape: Shape) -> Tensor:
    """The same as a cache of tokens has them: made before."""
    return make_token_ids(shape)


@functools.lru_cache(maxsize=1)
def state(settings: ModelSettings, image_size: int, vocab_size: int) -> dict[str, Tensor]:
    """Weights under our names, away from the zeros and ones that a new model has."""
    with torch.device("meta"):
        shapes = MaskedImageModel(settings, image_size, vocab_size, normalize=NORMALIZE).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: about(name, like, settings) + 0.03 * torch.randn(like.shape, generator=generator)
        for name, like in shapes.items()
    }


def about(name: str, like: Tensor, settings: ModelSettings) -> float:
    """What a weight is near: LayerScale's gammas have their setting, the weights of norms 1."""
    if name.rpartition(".")[2].startswith("gamma"):
        return settings.layer_scale
    return 1.0 if like.ndim == 1 and name.endswith(".weight") else 0.0


def our_model(shape: Shape, impl: str) -> MaskedImageModel:
    with DEVICE:  # where the numbers that the weights are filled with first are drawn much faster
        model = MaskedImageModel(shape.settings, shape.image_size, shape.vocab_size, normalize=NORMALIZE, impl=impl)
    model.load_state_dict(state(shape.settings, shape.image_size, shape.vocab_size))
    return model.to(DEVICE).train()


# The parameters that are checked, by their names in our model: the first, the shared and the last ones.
WATCHED = {
    "patches": "encoder.patch_embed.proj.weight",
    "positions": "encoder.rel_pos_bias.relative_position_bias_table",
    "mask token": "encoder.mask_token",
    "final norm": "encoder.norm.bias",
    "head": "lm_head.weight",
}
NOT_DECAYED = {"final norm"}


def watched(model: nn.Module, rename: Callable[[str], str] = str) -> dict[str, nn.Parameter]:
    """The parameters that are checked; `rename` gives the model's name for one of ours."""
    return {key: model.get_parameter(rename(name)) for key, name in WATCHED.items()}


@dataclass(frozen=True)
class Step:
    """A provider's training step, timed by calling it: forward, backward, clipping, AdamW."""

    case: Case
    model: nn.Module
    forward: Callable[[], Tensor]
    """The loss."""
    logits: Callable[[], Tensor]
    """Scores at the masked patches, [B*M, V]."""
    backward: Callable[[Tensor], None]
    update: Callable[[], None]
    """Clip, change the weights, forget the gradients."""
    optimizer: torch.optim.Optimizer
    watched: dict[str, nn.Parameter]
    about: str
    """How the optimizer is made."""

    def __call__(self) -> Tensor:
        loss = self.forward()
        self.backward(loss)
        self.update()
        return loss.detach()

    def outputs(self) -> dict[str, Tensor]:
        """All that is checked of a first step: scores, loss, gradients, how weights change, the optimizer's memory."""
        with torch.no_grad(), self.case.autocast():
            logits = self.logits()
        before = {key: weight.detach().clone() for key, weight in self.watched.items()}
        loss = self.forward()
        self.backward(loss)
        found = {"logits": logits, "loss": loss.detach()}
        for key, weight in self.watched.items():
            found[f"gradient of {key}"] = existing(key, self.gradient(weight)).clone()
        grads = [grad for weight in self.model.parameters() if (grad := self.gradient(weight)) is not None]
        found["norm"] = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt()
        self.update()
        for key, weight in self.watched.items():
            found[f"change of {key}"] = weight.detach() - before[key]
            found[f"moment of {key}"] = self.moment(weight).clone()
        return found

    def gradient(self, weight: nn.Parameter) -> Tensor | None:
        """Between backward and update."""
        return weight.grad

    def moment(self, weight: nn.Parameter) -> Tensor:
        """The first one of AdamW, after an update."""
        moment: Tensor = self.optimizer.state[weight]["exp_avg"]
        return moment


def existing(key: str, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise AssertionError(f"{key} gets no gradient")
    return gradient


class References:
    """What the providers of a case are held to: eager torch in the same precision, and float64.

    Neither is a provider's model: ours with `impl="reference"`, its loss and its gradients a few pictures at a time,
    whose mean is that of the batch, for every picture has equally many masked patches.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.eager = passes(our_model(case.shape, "reference"), case)
        self.exact = exact(case.shape)

    def check(self, name: str, outputs: Outputs, *, peer: bool = False) -> dict[str, float]:
        """The relative errors of a provider. Raises AssertionError for a wrong result.

        Ours is held to the house's rule, a peer to having done the same work, as `rounds.check_same_work` says.
        """
        rule = check_same_work if peer else check
        errors = check_pass(name, outputs, self.eager, self.exact, self.case.dtype, rule)
        return errors | check_update(name, outputs, self.case, rule)


@functools.lru_cache(maxsize=1)
def exact(shape: Shape) -> dict[str, Tensor]:
    """The reference in float64; slow, and the same for every precision."""
    model = our_model(shape, "reference").double()
    return passes(model, Case("float64", shape, torch.float64))


def passes(model: MaskedImageModel, case: Case) -> dict[str, Tensor]:
    """Scores, loss and gradients of the watched parameters, a few pictures at a time."""
    parameters = watched(model)
    logits, losses = [], []
    parts = (case.pixels, case.masked_positions, case.token_ids)
    for pixels, masked, tokens in zip(*(part.split(PICTURES_AT_ONCE) for part in parts), strict=True):
        share = len(pixels) / case.shape.batch
        with torch.no_grad(), case.autocast():
            logits.append(model.logits(pixels, masked).flatten(0, 1))
        with case.autocast():
            loss = share * model(pixels, masked, tokens).loss
        loss.backward()
        losses.append(loss.detach())
    gradients = {f"gradient of {key}": existing(key, weight.grad).clone() for key, weight in parameters.items()}
    return {"logits": torch.cat(logits), **gradients, "loss": torch.stack(losses).sum()}


Rule = Callable[[str, Outputs, Outputs, Outputs, torch.dtype], dict[str, float]]
"""`rounds.check` or `rounds.check_same_work`."""


def check_pass(
    name: str, outputs: Outputs, eager: Outputs, exact: Outputs, dtype: torch.dtype, rule: Rule
) -> dict[str, float]:
    """Assert scores and gradients by a rule, and that the loss is the one of these scores.

    A mean cross-entropy moves by no more than twice the largest change of a score, so the scores' error bounds the
    loss's; comparing two losses alone would pass or fail by how errors happen to cancel.
    """
    tensors = {key: value for key, value in exact.items() if key != "loss"}
    errors = rule(name, outputs, eager, tensors, dtype)
    largest = (outputs["logits"].double() - exact["logits"]).abs().max()
    bound = 2 * largest + torch.finfo(dtype).eps * exact["loss"].abs()
    off = (outputs["loss"].double() - exact["loss"]).abs()
    assert off <= bound, f"{name}: the loss is off by {off:.2e}, more than the {bound:.2e} that its scores explain"
    return errors | {"loss": float(off / exact["loss"].abs())}


def check_update(name: str, outputs: Outputs, case: Case, rule: Rule) -> dict[str, float]:
    """Hold clipping, decay and AdamW to torch's AdamW in float64 on the gradients that the provider itself found.

    AdamW's first step hardly depends on the size of a gradient, so that clipping shows only in the moment. By how much
    it clipped must have half of its digits right, for it comes from a norm over all weights in fp32.
    """
    assert OPTIM.clip_grad is not None
    assert outputs["norm"] > OPTIM.clip_grad, "the gradient is too small for its clipping to be checked"
    wanted = OPTIM.clip_grad / (float(outputs["norm"]) + 1e-6)
    errors = {}
    for key, full in WATCHED.items():
        weight = case.state[full].to(DEVICE)
        gradient, moment = (outputs[f"{what} of {key}"].double() for what in ("gradient", "moment"))
        clip = float((moment * gradient).sum() / gradient.square().sum() / (1 - OPTIM.betas[0]))
        off = abs(clip / wanted - 1)
        allowed = torch.finfo(torch.float32).eps ** 0.5
        assert off <= allowed, f"{name}: {key} is clipped to {clip:.6g} of its gradient, where {wanted:.6g} is right"
        eager, exact = (adamw_step(key, weight, clip * gradient, dtype) for dtype in (torch.float32, torch.float64))
        errors |= rule(name, outputs, eager, exact, torch.float32)
    return errors


def adamw_step(key: str, weight: Tensor, gradient: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """How torch's AdamW changes a weight in this precision, and its moment then."""
    parameter = nn.Parameter(weight.to(dtype, copy=True))
    parameter.grad = gradient.to(dtype)
    decay = 0.0 if key in NOT_DECAYED else OPTIM.weight_decay
    optimizer = torch.optim.AdamW(
        [parameter], lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=decay, foreach=False
    )
    optimizer.step()
    change = parameter.detach() - weight.to(dtype)
    return {f"change of {key}": change, f"moment of {key}": optimizer.state[parameter]["exp_avg"]}

"""Typed settings of a run, checked before the first allocation. Imports no torch.

A run is described by `Settings`: one section per subject. Every field either changes the result of a run or only its
speed and comfort; the latter are listed in each section's `SPEED_ONLY`, and only they may differ when a run resumes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import UserError

Recompute = Literal["none", "mlp", "block"]
"""What the backward pass computes again in place of keeping it, from nothing to the most."""
Prefetch = Literal["none", "pictures", "tokens"]
"""What of the next batch a GPU gets while a step runs, from nothing to the most."""


class Section(BaseModel):
    """A group of settings about one subject."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset()


class ModelSettings(Section):
    """The encoder that is pre-trained."""

    patch_size: int = Field(16, ge=1)
    """Side of a square patch, in pixels."""
    width: int = Field(768, ge=1)
    """Channels of a token."""
    depth: int = Field(12, ge=1)
    """Number of transformer blocks."""
    num_heads: int = Field(12, ge=1)
    """Attention heads; must divide the width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden channels of the MLP, as a multiple of the width."""
    rel_pos_bias: Literal["shared", "per_layer", "none"] = "shared"
    """Learned relative position bias: one table for all blocks, one per block, or none."""
    abs_pos_embed: bool = False
    """Add learned absolute position embeddings."""
    layer_scale: float = Field(0.1, ge=0)
    """Initial LayerScale gamma; 0 leaves LayerScale out."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Share of samples whose branch is dropped in the last block; grows linearly from 0 over the blocks."""


class DataSettings(Section):
    """The pictures and how they are cut and changed."""

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset({"workers", "timeout"})

    path: Path | None = None
    """Folder of pictures, searched through all its sub-folders; none: the built-in handwritten digits."""
    val_path: Path | None = None
    """Folder of held-out pictures; none: `val_share` of the training folder is held out."""
    val_share: float = Field(0.02, ge=0, lt=1)
    """Share of the pictures held out when no `val_path` is given."""
    val_max: int = Field(2048, ge=1)
    """At most so many held-out pictures are evaluated."""
    image_size: int = Field(224, ge=1)
    """Side of the square patch view, in pixels; a multiple of the patch size."""
    min_scale: float = Field(0.08, gt=0, le=1)
    """Smallest share of a picture's area that a random crop keeps."""
    horizontal_flip: float = Field(0.5, ge=0, le=1)
    """Probability of mirroring a picture."""
    color_jitter: float = Field(0.4, ge=0)
    """Strength of brightness, contrast and saturation jitter; 0 turns it off."""
    rotation: float = Field(0.0, ge=0, le=180)
    """Largest random rotation of the crop, in degrees; 0 turns it off."""
    normalize: Literal["inception", "imagenet"] = "inception"
    """Mean and standard deviation of the patch view: 0.5 and 0.5, or ImageNet's."""
    max_bad_share: float = Field(0.05, ge=0, le=1)
    """Stop when more than this share of the pictures read cannot be decoded."""
    workers: int = Field(2, ge=0)
    """Processes that decode pictures for each rank; 0 decodes in the training process."""
    timeout: float = Field(300.0, ge=0)
    """Seconds to wait for a worker before the run stops; 0 waits for ever."""


class MaskSettings(Section):
    """Block-wise masking (BEiT, section 2.3 and algorithm 1)."""

    num_patches: int = Field(75, ge=1)
    """Masked patches in every picture (M)."""
    min_block: int = Field(16, ge=1)
    """Smallest block, in patches."""
    max_block: int | None = Field(None, ge=1)
    """Largest block, in patches; none: as many as are still to be masked."""
    exact: bool = True
    """Top blocks up at random to exactly `num_patches` (BEiT v2); off: v1 as published, whose shortfall is padding, and
    whose loss is a mean over the masked patches of each forward pass."""


class TokenizerSettings(Section):
    """The frozen tokenizer whose codes are predicted, and how one is trained when none is given."""

    path: Path | None = None
    """A tokenizer saved by `train_tokenizer.py`, or DALL-E's encoder as a state dict; none: train one first."""
    vocab_size: int = Field(8192, ge=2)
    """Number of codes."""
    width: int = Field(256, ge=4, multiple_of=4)
    """Channels of the first group, a multiple of 4; each further group doubles them."""
    groups: int = Field(4, ge=1)
    """Groups of blocks; between two groups the picture is halved, so a token covers 2^(groups - 1) pixels a side."""
    blocks_per_group: int = Field(2, ge=1)
    """Residual blocks in a group."""
    train_steps: int = Field(20_000, ge=1)
    """Steps of tokenizer training."""
    batch_size: int = Field(64, ge=1)
    """Pictures in a step of tokenizer training."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of tokenizer training, cosine to a hundredth of it."""
    temperature: tuple[float, float] = (1.0, 0.0625)
    """Gumbel-softmax temperature at the start and at the end (cosine between them)."""
    kl_weight: float = Field(0.0, ge=0)
    """Largest weight of the divergence from uniform code use, reached after a linear ramp."""
    kl_warmup: float = Field(0.1, ge=0, le=1)
    """Share of the steps over which the divergence's weight rises from 0."""
    reconstruction: Literal["l1", "l2", "logit_laplace"] = "l2"
    """Reconstruction loss; `logit_laplace` is DALL-E's (Zero-shot text-to-image generation, appendix A.3)."""


class OptimSettings(Section):
    """AdamW and its schedules, stepped every optimizer step."""

    lr: float = Field(1.5e-3, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(1e-5, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = Field(10.0, ge=0)
    """Linear warm-up from 0, in epochs."""
    warmup_steps: int | None = Field(None, ge=0)
    """Linear warm-up in steps; replaces `warmup_epochs`."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay; not for biases, vectors, the CLS token and absolute positions."""
    weight_decay_end: float | None = Field(None, ge=0)
    """Weight decay at the end of a cosine; none: constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two decay rates."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    clip_grad: float | None = Field(3.0, gt=0)
    """Largest norm of the whole gradient; none: no clipping."""


class TrainSettings(Section):
    """How long and in which pieces."""

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset(
        {
            "micro_batch", "recompute", "prefetch", "stop_at_step", "impl", "compile", "threads", "log_every",
            "eval_every", "save_every", "keep_checkpoints",
        }
    )  # fmt: skip

    epochs: int = Field(800, ge=1)
    """Passes over the pictures."""
    max_steps: int | None = Field(None, ge=1)
    """Length of the whole schedule in optimizer steps; replaces `epochs`."""
    global_batch: int = Field(2048, ge=1)
    """Pictures in an optimizer step, over all ranks and accumulation."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16`: fp32 weights, bf16 autocast; auto: bf16 on a GPU, fp32 on a CPU."""
    seed: int = Field(0, ge=0)
    """Seed of weights, order, crops, masks and dropped paths."""
    max_skipped: int = Field(5, ge=1)
    """Stop after so many steps in a row with a gradient that is not finite."""
    micro_batch: int | None = Field(None, ge=1)
    """Pictures in one forward pass of one rank; none: all of a rank's share of `global_batch`."""
    recompute: Recompute = "none"
    """Activations that are not kept for the backward pass but computed again in it, for less memory and more time:
    `mlp`: those within the MLP of each block; `block`: all of a block but its inputs."""
    prefetch: Prefetch = "none"
    """What a GPU gets of the next batch while a step runs: `pictures`: they are copied; `tokens`: their tokens are made
    too, for which it takes more memory. On a CPU nothing runs beside a step, and all three are the same."""
    stop_at_step: int | None = Field(None, ge=1)
    """Save and end the session at this step, the schedule unchanged; `--resume auto` goes on from there."""
    impl: Literal["auto", "reference", "sdpa", "xformers", "flex", "triton"] = "auto"
    """Implementation of the operators. auto: plain torch, on a GPU with its scaled_dot_product_attention, and on H100
    and H200 with the tokenizer's search of codes by Triton; triton: this project's kernels, for every operator and that
    search; sdpa, xformers, flex: attention by it, the other operators as with auto."""
    compile: bool = False
    """Have torch.compile join what lies between a block's operators; the first step takes up to minutes longer."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of each rank; none: the processors divided by the ranks of a machine."""
    log_every: int = Field(10, ge=1)
    """Steps between two reads of the loss from the device."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between two evaluations on held-out pictures; none: only at the end."""
    save_every: int = Field(1000, ge=1)
    """Steps between two checkpoints; one is always written at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""


class ZeroSettings(Section):
    """How DeepSpeed shards the optimizer, gradients and weights. Changes memory and speed, not the result."""

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset({"stage", "offload", "config"})

    stage: Literal[0, 1, 2, 3] | None = None
    """0: nothing is sharded; 1: optimizer state; 2: and gradients; 3: and weights; none: as `config` says, or 0 for
    one rank, which has nothing to share, and 1 for more."""
    offload: bool = False
    """Keep the optimizer state, and at stage 3 the weights, in the host's memory; needs stage 1 to 3."""
    config: Path | None = None
    """A DeepSpeed JSON to use in place of the one in `ds_configs/` for the stage."""


class Settings(Section):
    """All settings of a pre-training."""

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset({"output_dir", "resume", "overwrite", "preset", "config"})

    preset: str = "digits"
    """The recipe that gives every setting its default."""
    config: Path | None = None
    """A TOML file whose values replace the preset's."""
    output_dir: Path = Path("output/digits")
    """Folder for checkpoints, metrics and the report."""
    resume: str = "none"
    """`auto`: go on from the newest valid checkpoint in the output folder, if any; a path: from that one; `none`."""
    overwrite: bool = False
    """Delete an earlier run's files in the output folder and start anew."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    mask: MaskSettings = MaskSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    zero: ZeroSettings = ZeroSettings()

    @property
    def grid(self) -> int:
        """Patches along one side of the patch view."""
        return self.data.image_size // self.model.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a picture."""
        return self.grid**2


BEIT_MASK_SHARE = 75 / 196
"""Of the patches of a picture (arXiv:2106.08254, section 2.3: about 40 %; 75 of 196 in the released recipe)."""


def check(settings: Settings) -> None:
    """Raise `UserError` for values that are allowed one by one but not together, or for missing paths."""
    check_combinations(settings)
    if settings.data.path is None and settings.preset != Settings().preset:
        raise UserError(f"preset {settings.preset} is for your own pictures; give their folder as --data.path FOLDER.")
    check_paths(settings)


def check_combinations(settings: Settings) -> None:
    """Raise `UserError` for values that are allowed one by one but not together."""
    model, data, mask = settings.model, settings.data, settings.mask
    if data.image_size % model.patch_size:
        below = data.image_size // model.patch_size * model.patch_size
        near = [size for size in (below, below + model.patch_size) if size]
        raise UserError(
            f"data.image_size = {data.image_size} is not a multiple of model.patch_size = {model.patch_size}; "
            f"set it to {' or '.join(map(str, near))}."
        )
    if model.width % model.num_heads:
        raise UserError(
            f"model.width = {model.width} cannot be split into model.num_heads = {model.num_heads} equal heads; "
            f"choose a width that is a multiple of the heads."
        )
    if mask.num_patches >= settings.num_patches:
        excess = "all of" if mask.num_patches == settings.num_patches else "more than"
        raise UserError(
            f"mask.num_patches = {mask.num_patches} is {excess} the {settings.num_patches} patches of a picture "
            f"({settings.grid} x {settings.grid}), and the model would see none; set it to less, for BEiT's share to "
            f"{max(1, round(BEIT_MASK_SHARE * settings.num_patches))}."
        )
    if mask.max_block is not None and mask.max_block < mask.min_block:
        raise UserError(
            f"mask.max_block = {mask.max_block} is smaller than mask.min_block = {mask.min_block}; "
            f"raise the one or lower the other."
        )
    if min(settings.tokenizer.temperature) <= 0:
        raise UserError(f"tokenizer.temperature = {settings.tokenizer.temperature} must be two numbers above 0.")
    if not all(0 <= beta < 1 for beta in settings.optim.betas):
        raise UserError(f"optim.betas = {settings.optim.betas} must be two numbers from 0 to below 1.")
    if settings.zero.offload and settings.zero.stage == 0:
        raise UserError("zero.offload needs something sharded to keep on the host: set zero.stage to 1, 2 or 3.")
    if settings.resume != "none" and settings.overwrite:
        raise UserError(
            f"--resume {settings.resume} goes on from an earlier run and --overwrite deletes it; give one of the two."
        )


def check_paths(settings: Settings) -> None:
    """Raise `UserError` for a path that is given and is not there."""
    data = settings.data
    for name, path in (("data.path", data.path), ("data.val_path", data.val_path)):
        if path is not None and not path.is_dir():
            raise UserError(f"{name} = {path} is not a folder; give the folder that holds the pictures.")
    for name, path in (("tokenizer.path", settings.tokenizer.path), ("zero.config", settings.zero.config)):
        if path is not None and not path.exists():
            raise UserError(f"{name} = {path} does not exist; give an existing file.")


def result_settings(settings: Settings) -> dict[str, Any]:
    """The settings that change a run's result, as `{"section.field": value}`."""
    return {name: value for name, value, speed_only in _named(settings) if not speed_only and is_used(name, settings)}


def is_used(name: str, settings: Settings) -> bool:
    """False for what says how a tokenizer is trained when a trained one is given."""
    return settings.tokenizer.path is None or not name.startswith("tokenizer.") or name == "tokenizer.path"


def speed_settings(settings: Settings) -> dict[str, Any]:
    """The settings that change only a run's speed and comfort, as `{"section.field": value}`."""
    return {name: value for name, value, speed_only in _named(settings) if speed_only}


def _named(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _named(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, name in section.SPEED_ONLY

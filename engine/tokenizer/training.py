"""Training of a discrete VAE with the Gumbel-softmax relaxation (Ramesh et al. 2021, section 2.1 and appendix A.2).

Encoder logits plus Gumbel noise, divided by a falling temperature, give soft codes; the decoder rebuilds the picture.
The same seed gives the same weights, bit for bit, on the same machine with the same number of threads.

Shapes: B pictures, T side of the token view, G tokens a side, V codes, D channels before the last layer.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Settings, TokenizerSettings
from ..data.loading import BadPictureLog, train_loader
from ..data.seeding import hash64
from ..data.source import Source
from ..errors import UserError
from .dvae import PIXEL_EPS, DiscreteVAE
from .quality import CodeUse
from .revival import revive

WARMUP_SHARE = 0.05
WEIGHT_DECAY = 1e-4
BETAS = (0.9, 0.99)
CLIP_GRAD = 1.0

REVIVE_EVERY = 25
REVIVE_UNTIL = 0.8
"""Share of the steps after which codes are left to settle."""

MIN_LOG_SCALE = -4.0
"""A pixel of constant colour would drive the likelihood of logit-Laplace to infinity."""

KEPT_BYTES = 16 << 20
KEPT_EPOCHS = 2
"""A set of pictures whose views fit in `KEPT_BYTES` is cut so many times and these views are used again: it takes
longer to cut a tiny view than to learn from it."""

FIRST_WEIGHTS, NOISE = 1, 2
"""What a hash of the seed is for."""


@dataclass(frozen=True)
class LogRow:
    """What was measured since the last row; losses are means over the steps."""

    step: int
    """Steps done."""
    steps: int
    """Steps in all."""
    reconstruction: float
    """As `tokenizer.reconstruction` says, a pixel and channel; pixels in [0, 1]."""
    kl: float
    """Divergence of a cell's code distribution from the uniform one, nats."""
    temperature: float
    lr: float
    codes_used: int
    """Codes that were the likeliest of any cell."""
    perplexity: float
    """Exponential of the entropy of code use."""
    pictures_per_second: float
    seconds_left: float

    def __str__(self) -> str:
        return (
            f"tokenizer step {self.step}/{self.steps}  reconstruction {self.reconstruction:.4f}  kl {self.kl:.2f}  "
            f"temperature {self.temperature:.2f}  codes used {self.codes_used}  perplexity {self.perplexity:.1f}  "
            f"{self.pictures_per_second:.0f} pictures/s  {self.seconds_left:.0f} s left"
        )


def print_row(row: LogRow) -> None:
    print(row, flush=True)


def train(
    settings: Settings, source: Source, device: torch.device, *, on_log: Callable[[LogRow], None] = print_row
) -> DiscreteVAE:
    """A tokenizer trained on a run's pictures, in evaluation mode on `device`, to the sizes in its settings.

    Raises:
        UserError: for fewer pictures than a batch, too many bad ones, or a loss that is no longer finite.
    """
    tokenizer, seed = settings.tokenizer, settings.train.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash64(seed, FIRST_WEIGHTS))
        model = DiscreteVAE(
            tokenizer.vocab_size,
            tokenizer.width,
            tokenizer.groups,
            tokenizer.blocks_per_group,
            output_channels=6 if tokenizer.reconstruction == "logit_laplace" else 3,
        )
    precision = settings.train.precision
    fit(
        model.to(device),
        token_views(source, settings),
        tokenizer,
        seed=seed,
        bf16=precision == "bf16" or (precision == "auto" and device.type == "cuda"),
        on_log=on_log,
    )
    return model.eval()


def token_views(source: Source, settings: Settings) -> Iterator[Tensor]:
    """A batch of token views for each step of tokenizer training, uint8 `[B, 3, T, T]`."""
    data, tokenizer = settings.data, settings.tokenizer
    if tokenizer.batch_size > len(source):
        raise UserError(
            f"tokenizer.batch_size = {tokenizer.batch_size} is more than the {len(source)} pictures to train on; "
            f"set it to {len(source)} or less."
        )
    side = settings.grid * 2 ** (tokenizer.groups - 1)
    num_batches = tokenizer.train_steps
    if len(source) * 3 * side**2 <= KEPT_BYTES:
        num_batches = min(num_batches, KEPT_EPOCHS * (len(source) // tokenizer.batch_size))
    loader = train_loader(
        source,
        data.model_copy(update={"image_size": side}),  # the patch view is made beside it and not used: keep it small
        settings.mask,
        settings.grid,
        side,
        global_batch=tokenizer.batch_size,
        micro_batch=tokenizer.batch_size,
        seed=settings.train.seed,
        num_steps=num_batches,
    )
    bad_pictures = BadPictureLog(data.max_bad_share)
    kept = []
    with contextlib.closing(loader):
        for batch in loader:
            bad_pictures.add(batch)
            if num_batches < tokenizer.train_steps:
                kept.append(batch.token_view)
            yield batch.token_view
    yield from itertools.islice(itertools.cycle(kept), tokenizer.train_steps - num_batches)


def fit(
    model: DiscreteVAE,
    batches: Iterable[Tensor],
    tokenizer: TokenizerSettings,
    *,
    seed: int,
    bf16: bool = False,
    log_every: int | None = None,
    on_log: Callable[[LogRow], None] = print_row,
) -> None:
    """Train `model`, in place and where it lies, on `train_steps` batches of uint8 `[B, 3, T, T]`.

    bf16:      autocast convolutions to bf16
    log_every: steps between two rows; none: twenty rows in all, but one in 100 steps

    Raises:
        UserError: when the loss is not finite.
    """
    assert model.decoder is not None
    device = next(model.parameters()).device
    log_every = log_every or min(100, max(1, tokenizer.train_steps // 20))
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=tokenizer.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    recent_use, logged_use = (CodeUse(model.vocab_size, device) for _ in range(2))
    sums = torch.zeros(2, device=device)
    began, logged_at = time.monotonic(), 0
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        for step, pixels in zip(range(tokenizer.train_steps), batches, strict=False):
            done = step + 1
            progress = step / max(1, tokenizer.train_steps - 1)
            temperature = cosine(*tokenizer.temperature, progress)
            lr = learning_rate(tokenizer, step)
            kl_weight = tokenizer.kl_weight * min(1.0, progress / max(tokenizer.kl_warmup, 1e-9))
            for group in optimizer.param_groups:
                group["lr"] = lr
            generator = torch.Generator(device).manual_seed(hash64(seed, NOISE, step))

            target = model.prepare(pixels.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                hidden_BDGG = model.encoder.features(target)
                logits_BVGG = model.encoder.output(hidden_BDGG).float()
                soft_BVGG = gumbel_softmax(logits_BVGG, temperature, generator)
                output = model.decoder(soft_BVGG).float()
            error = reconstruction_error(output, target, tokenizer.reconstruction)
            reconstruction, kl = error.mean(), divergence_from_uniform(logits_BVGG)
            optimizer.zero_grad()
            (reconstruction + kl_weight * kl).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
            optimizer.step()

            ids_R = logits_BVGG.detach().argmax(1).flatten()
            recent_use.add(ids_R)
            logged_use.add(ids_R)
            sums += torch.stack([reconstruction.detach(), kl.detach()])
            if done % REVIVE_EVERY == 0:
                if progress < REVIVE_UNTIL:
                    revive(
                        model,
                        optimizer,
                        counts_V=recent_use.counts_V,
                        hidden_RD=hidden_BDGG.detach().float().permute(0, 2, 3, 1).flatten(0, 2),
                        ids_R=ids_R,
                        error_R=F.avg_pool2d(error.detach().mean(1, keepdim=True), model.stride).flatten(),
                        generator=generator,
                    )
                recent_use.clear()
            if done % log_every == 0 or done == tokenizer.train_steps:
                means = [value / (done - logged_at) for value in sums.tolist()]
                refuse_not_finite(means, done, tokenizer)
                seconds = max(time.monotonic() - began, 1e-9)
                on_log(
                    LogRow(
                        step=done,
                        steps=tokenizer.train_steps,
                        reconstruction=means[0],
                        kl=means[1],
                        temperature=temperature,
                        lr=lr,
                        codes_used=logged_use.used(),
                        perplexity=math.exp(logged_use.entropy()),
                        pictures_per_second=done * pixels.shape[0] / seconds,
                        seconds_left=(tokenizer.train_steps - done) * seconds / done,
                    )
                )
                sums.zero_()
                logged_use.clear()
                logged_at = done


def gumbel_softmax(logits_BVGG: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Soft codes: softmax over V of (logits + Gumbel noise) / temperature (Jang et al. 2016, equation 2)."""
    noise = -torch.empty_like(logits_BVGG).exponential_(generator=generator).log()
    return ((logits_BVGG + noise) / temperature).softmax(1)


def divergence_from_uniform(logits_BVGG: Tensor) -> Tensor:
    """KL divergence of each cell's code distribution from the uniform prior, mean over cells, nats."""
    log_q = logits_BVGG.log_softmax(1)
    return (log_q.exp() * log_q).sum(1).mean() + math.log(logits_BVGG.shape[1])


def reconstruction_error(output: Tensor, target: Tensor, kind: str) -> Tensor:
    """Error of each pixel and channel, fp32 `[B, 3, T, T]`.

    output: `[B, 3 or 6, T, T]`, the decoder's
    target: `[B, 3, T, T]`, mapped pixels
    kind:   `l1` or `l2` between means, in units of pixels in [0, 1]; `logit_laplace`: negative log-likelihood, nats
            (Ramesh et al. 2021, equation 2 of appendix A.3)
    """
    if kind == "logit_laplace":
        center, log_scale = output[:, :3], output[:, 3:].clamp(min=MIN_LOG_SCALE)
        volume = (2 * target * (1 - target)).log()
        return volume + log_scale + (torch.logit(target) - center).abs() * (-log_scale).exp()
    difference = (torch.sigmoid(output[:, :3]) - target) / (1 - 2 * PIXEL_EPS)
    return difference.abs() if kind == "l1" else difference.square()


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(tokenizer: TokenizerSettings, step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    warmup = max(1, round(WARMUP_SHARE * tokenizer.train_steps))
    progress = step / max(1, tokenizer.train_steps - 1)
    return cosine(tokenizer.lr, tokenizer.lr / 100, progress) * min(1.0, (step + 1) / warmup)


def refuse_not_finite(losses: list[float], step: int, tokenizer: TokenizerSettings) -> None:
    if not all(math.isfinite(loss) for loss in losses):
        raise UserError(
            f"the tokenizer's loss was no longer finite by step {step}; lower tokenizer.lr (now {tokenizer.lr:g}) "
            f"or raise the last of tokenizer.temperature (now {tokenizer.temperature[1]:g})."
        )

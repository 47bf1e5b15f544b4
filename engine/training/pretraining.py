"""A whole pre-training: builds the pieces from the settings, runs the loop, leaves checkpoint and report."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fused_beit.kernels import ImplUnavailable, Resolved, resolve

from ..config import BEIT_MASK_SHARE, Settings, result_settings, speed_settings
from ..cpu import has_bf16
from ..data.loading import BadPictureLog, Batch, train_loader, val_batches
from ..data.pictures import Pictures, open_pictures
from ..data.source import Source
from ..errors import UserError
from ..hardware import bf16_rate
from ..launching import resume_command
from ..models.encoder import impl_besides_attention
from ..models.flops import pretraining_flops
from ..models.mim import MaskedImageModel
from ..tokenizer.files import identity, load_tokenizer
from . import checkpoint, zero
from .bottleneck import TOO_SHORT, Circumstances, bottleneck
from .deepspeed_json import resolve_stage
from .evaluation import Evaluation, evaluate, fill_pictures
from .header import RECOMPUTED, header, human_bytes, when_compiled
from .loop import Loop, StopRequest
from .memory import Pass, operators_of, prefetched, rank_memory
from .metrics import MetricsLog, Progress, duration, read_metrics
from .optim import Schedule
from .prefetch import feed
from .report import PictureRow, Report, write_report
from .run_folder import RunFolder, comparable, find_resume, refuse_other_inputs, run_facts
from .run_warnings import long_warm_up, other_tokens, slow_precision
from .tokenizer_stage import prepare_tokenizer

PICTURES_IN_REPORT = 8
COLLAPSED = 0.9  # share of the commonest token beyond which a tokenizer tells pictures no longer apart
OPERATORS = ("embed_tokens", "gather_masked", "residual_norm", "residual_add", "token_loss", "nearest_code")


def pretrain(settings: Settings) -> bool:
    """Run or continue a pre-training; returns whether it reached its end (False: it was asked to stop).

    Every rank calls this. What can be known to be wrong is found before anything is written.

    Raises:
        UserError: for anything the user can mend.
    """
    with open_run(settings) as run:
        if run.start_step >= run.end_step:
            if run.first:
                print(f"step {run.start_step} of {run.total_steps} is done already; there is nothing to do")
            return True
        with run.loop.stop:
            done = run.loop.run(run.start_step, run.end_step)
        return run.finish(done)


@contextmanager
def open_run(settings: Settings, *, rehearsal: bool = False) -> Iterator["Run"]:
    """All pieces of a run in its claimed output folder, until the `with` block ends. Every rank enters it.

    rehearsal: only time is measured. Where no tokenizer is given an untrained one of the same shape does, no metrics
               are kept, and an output folder that a run has used is left alone.

    Raises:
        UserError: for anything the user can mend.
    """
    folder = RunFolder(settings.output_dir)
    folder.refuse_if_used(settings, rehearsal=rehearsal)
    implementations = resolve_implementations(settings)
    if settings.train.compile:
        refuse_without_compiler()
    pictures = open_pictures(settings.data, settings.train.seed)
    steps_per_epoch, total_steps = run_length(settings, len(pictures.train))
    runtime = zero.start(settings)
    first, bf16 = runtime.rank == 0, resolve_bf16(settings, runtime.device)
    zero.deepspeed_config(settings, runtime.world_size, bf16=bf16)
    if not rehearsal or settings.tokenizer.path is not None:
        check_tokenizer(settings, len(pictures.train))
    resume_from, manifest, problems = zero.on_first_rank(partial(find_resume, settings))
    if resume_from is not None:
        stage = resolve_stage(settings, runtime.world_size)
        zero.refuse_other_shape(manifest, folder=resume_from, world_size=runtime.world_size, stage=stage)
    zero.on_first_rank(partial(folder.claim, clear=settings.overwrite and not rehearsal))
    problems += slow_precision(runtime.device, bf16=bf16)
    if not rehearsal:
        problems += [*long_warm_up(settings, total_steps, steps_per_epoch), *other_tokens(settings)]
    with folder:
        for problem in problems if first else []:
            print(f"warning: {problem}", flush=True)
        run = Run(settings, folder, pictures, runtime, implementations, resume_from, manifest, rehearsal=rehearsal)
        try:
            yield run
        finally:
            run.loop.close()


class Run:
    """All pieces of a run, built and, where it resumes, loaded.

    Args:
        settings: checked settings.
        folder: the claimed output folder.
        pictures: what to train and evaluate on.
        runtime: where this process runs.
        implementations: what each operator was resolved to.
        resume_from: a sound checkpoint to go on from, or None.
        manifest: of that checkpoint.
        rehearsal: see `open_run`.
    """

    def __init__(
        self,
        settings: Settings,
        folder: RunFolder,
        pictures: Pictures,
        runtime: zero.Runtime,
        implementations: dict[str, Resolved],
        resume_from: Path | None,
        manifest: dict[str, Any],
        *,
        rehearsal: bool,
    ):
        self.settings, self.folder, self.pictures, self.runtime = settings, folder, pictures, runtime
        self.first = runtime.rank == 0
        self.facts = run_facts(runtime.device)
        self.tokenizer, tokenizer_facts = prepare_tokenizer(
            settings, folder, pictures.train, runtime, resume_from=resume_from, trained=not rehearsal
        )
        self.tokenizer.impl = impl_besides_attention(settings.train.impl)
        self.bf16 = resolve_bf16(settings, runtime.device)
        self.inputs = {
            "tokenizer": identity(self.tokenizer),
            "pictures to train on": len(pictures.train),
            "precision": "bf16" if self.bf16 else "fp32",
        }
        if resume_from is not None:
            refuse_other_inputs(manifest["inputs"], self.inputs, resume_from)
        self.steps_per_epoch, self.total_steps = run_length(settings, len(pictures.train))
        self.end_step = min(self.total_steps, settings.train.stop_at_step or self.total_steps)

        torch.manual_seed(settings.train.seed)
        data, train = settings.data, settings.train
        vocab_size = self.tokenizer.vocab_size
        model = MaskedImageModel(settings.model, data.image_size, vocab_size, normalize=data.normalize, impl=train.impl)
        model.encoder.recompute(train.recompute)
        if train.compile:
            model.encoder.compile_blocks()
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.flops = pretraining_flops(settings.model, data.image_size, settings.mask.num_patches, vocab_size)
        self.engine = zero.ZeroEngine(model, settings, runtime, bf16=self.bf16)
        self.start_step = self.load(resume_from) if resume_from is not None else 0
        in_this_folder = resume_from is not None and resume_from.parent.resolve() == folder.checkpoints.resolve()
        self.saved_step = self.start_step if in_this_folder else None

        if self.first:
            folder.write_settings(settings, self.facts)
            print(self.header(tokenizer_facts, implementations), flush=True)
        loader = train_loader(
            pictures.train,
            data,
            settings.mask,
            settings.grid,
            settings.grid * self.tokenizer.stride,
            global_batch=train.global_batch,
            micro_batch=self.engine.micro_batch,
            rank=runtime.rank,
            world_size=runtime.world_size,
            seed=train.seed,
            start_step=self.start_step,
            num_steps=self.end_step,
        )
        self.loop = Loop(
            engine=self.engine,
            feed=feed(loader, self.engine, self.tokenizer, train.prefetch),
            schedule=Schedule(settings.optim, self.total_steps, self.steps_per_epoch),
            settings=settings,
            log=MetricsLog(folder.path, self.start_step) if self.first and not rehearsal else None,
            progress=Progress(self.end_step, self.start_step, enabled=self.first),
            bad_pictures=BadPictureLog(data.max_bad_share),
            stop=StopRequest(),
            evaluate=self.evaluate,
            save=self.save,
            steps_per_epoch=self.steps_per_epoch,
            flops_per_picture=self.flops,
            peak_flops=bf16_rate(self.facts["device"]) if self.bf16 else None,
        )

    def load(self, checkpoint_folder: Path) -> int:
        """Weights, optimizer and random states of a checkpoint; returns its step."""
        state = self.engine.load(checkpoint_folder)
        torch.set_rng_state(state["rng"][self.runtime.rank % len(state["rng"])])
        return int(state["step"])

    def save(self, step: int) -> None:
        """Write a checkpoint, unless this step's stands there already; every rank calls this."""
        if step == self.saved_step:
            return
        state = {"step": step, "rng": zero.from_all_ranks(torch.get_rng_state())}
        about = {"settings": comparable(self.settings), "inputs": self.inputs, "facts": self.facts}
        self.engine.save(self.folder.checkpoints, step, state, about)
        self.saved_step = step
        if self.first:
            checkpoint.prune(self.folder.checkpoints, self.settings.train.keep_checkpoints)

    def evaluate(self) -> Evaluation | None:
        """Held-out figures over all ranks; None without held-out pictures."""
        if self.pictures.val is None:
            return None
        runtime = self.runtime
        batches = self.val_batches(self.pictures.val, self.engine.micro_batch, runtime.rank, runtime.world_size)
        return evaluate(self.engine, self.tokenizer, batches)

    def val_batches(self, pictures: Source, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
        settings = self.settings
        return val_batches(
            pictures,
            settings.data,
            settings.mask,
            settings.grid,
            settings.grid * self.tokenizer.stride,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=settings.train.seed,
        )

    def finish(self, done: int) -> bool:
        """Evaluate, save and report after the loop; returns whether the session did what it was to do."""
        stopped = done < self.end_step
        evaluation = None
        rows: list[PictureRow] = []
        if not stopped:
            evaluation = self.evaluate()
            if evaluation is not None and self.pictures.val is not None:
                self.loop.report_evaluation(done, evaluation)
                for note in collapse_notes(evaluation):
                    self.loop.progress.say(f"warning: {note}")
                # The same pictures on every rank: at ZeRO stage 3 all of them must take part.
                shown = self.val_batches(self.pictures.val, PICTURES_IN_REPORT, rank=0, world_size=1)
                rows = fill_pictures(self.engine, self.tokenizer, next(shown))
            self.save(done)
        bad = zero.union(self.loop.bad_pictures.reasons)
        if self.first:
            self.say_end(done, stopped, evaluation, rows, bad)
        return not stopped

    def say_end(
        self, done: int, stopped: bool, evaluation: Evaluation | None, rows: list[PictureRow], bad: dict[str, str]
    ) -> None:
        """Write what a person reads at the end, and say where it is."""
        folder = self.folder
        if bad:
            folder.bad_pictures.write_text("".join(f"{name}\t{reason}\n" for name, reason in bad.items()))
            print(f"{len(bad)} pictures could not be decoded and were replaced; see {folder.bad_pictures}")
        newest = folder.checkpoints / checkpoint.tag_of(done)
        if stopped:
            print(f"stopped at step {done} as asked and saved {newest}")
            print(self.bottleneck())
            print(f"go on with\n  {self.resume_command(done)}")
            return
        link_model(newest / "model.safetensors", folder.model)
        write_report(folder.report, self.report(done, evaluation, rows, bad))
        print(f"trained {done - self.start_step} steps in {duration(self.loop.progress.seconds())}")
        print(self.bottleneck())
        print(f"  report      {folder.report}\n  weights     {folder.model}\n  checkpoint  {newest}")
        if done < self.total_steps:
            print(f"step {done} of {self.total_steps} was asked for; go on with\n  {self.resume_command(done)}")

    def resume_command(self, done: int) -> str:
        runtime = self.runtime
        return resume_command(self.settings, done, ranks=runtime.world_size, ranks_a_machine=runtime.local_world_size)

    def bottleneck(self) -> str:
        """What bound this session's speed, and what to change."""
        pace = self.loop.pace()
        return TOO_SHORT if pace is None else bottleneck(pace, self.circumstances())

    def circumstances(self) -> Circumstances:
        settings, runtime = self.settings, self.runtime
        fast_bf16 = has_bf16() if runtime.device.type == "cpu" else torch.cuda.is_bf16_supported()
        return Circumstances(
            workers=settings.data.workers,
            cores=max(1, len(os.sched_getaffinity(0)) // runtime.local_world_size),
            threads=runtime.threads if runtime.device.type == "cpu" else None,
            bf16_untried=fast_bf16 and not self.bf16,
            trains_tokenizer=settings.tokenizer.path is None,
            tokens_ahead=self.loop.feed.tokens_ahead,
        )

    def report(self, done: int, evaluation: Evaluation | None, rows: list[PictureRow], bad: dict[str, str]) -> Report:
        settings, folder = self.settings, self.folder
        history = read_metrics(folder.metrics)
        held_out: dict[str, Any] = {}
        notes = []
        if evaluation is not None:
            notes = collapse_notes(evaluation)
            held_out = {
                "token_entropy": evaluation.token_entropy,
                "commonest_share": evaluation.commonest_share,
                "val_loss": evaluation.loss,
                "val_mlm_acc": evaluation.accuracy,
                "val_pictures": evaluation.pictures,
            }
        return Report(
            title=settings.output_dir.name,
            subject=self.pictures.subject,
            finished=datetime.now().strftime("%Y-%m-%d %H:%M"),
            history=history,
            **held_out,
            steps=done,
            images_seen=done * settings.train.global_batch,
            duration=training_seconds(history, settings.train.global_batch),
            notes=notes,
            bottleneck=self.bottleneck(),
            skipped_steps=max((row.get("skipped") or 0 for row in history), default=0),
            pictures=rows,
            bad_pictures=[f"{name}: {reason}" for name, reason in bad.items()][:50],
            bad_count=len(bad),
            settings_result=result_settings(settings),
            settings_speed=speed_settings(settings),
            machine=self.facts,
            tokenizer={
                "file": str(settings.tokenizer.path or folder.tokenizer),
                "codes": self.tokenizer.vocab_size,
                **({"codes in use, held out": evaluation.codes_used} if evaluation else {}),
            },
            checkpoint=str(folder.model),
            next_command=self.resume_command(done),
            next_purpose="Goes on from the last checkpoint, if the run was stopped before its end.",
        )

    def header(self, tokenizer_facts: dict[str, str], implementations: dict[str, Resolved]) -> str:
        settings, engine, runtime = self.settings, self.engine, self.runtime
        memory = rank_memory(
            settings,
            Pass(
                micro_batch=engine.micro_batch,
                bf16=self.bf16,
                vocab_size=self.tokenizer.vocab_size,
                operators=operators_of(settings.train.impl, runtime.device.type),
                tokenizer=self.tokenizer.encoder_size,
                token_side=settings.grid * self.tokenizer.stride,
                prefetch=prefetched(settings.train.prefetch, runtime.device.type),
            ),
            zero.deepspeed_config(settings, runtime.world_size, bf16=self.bf16),
            world_size=runtime.world_size,
        )
        held_out = 0 if self.pictures.val is None else len(self.pictures.val)
        run = {
            "output": str(self.folder.path),
            "pictures": f"{len(self.pictures.train):,} to train on, {held_out:,} held out",
            "steps": f"{self.total_steps:,} of {settings.train.global_batch} pictures, "
            f"{self.steps_per_epoch:,} an epoch, from step {self.start_step} to {self.end_step}",
            "masked": f"{settings.mask.num_patches} of the {settings.num_patches} patches of a picture "
            f"({settings.mask.num_patches / settings.num_patches:.0%}; BEiT: {BEIT_MASK_SHARE:.0%})",
            "parameters": f"{self.num_parameters:,}",
            "FLOPs a picture": f"{self.flops:.3g}, forward and backward, without the tokenizer",
            "memory a rank": f"about {human_bytes(memory.total)} of tensors at most, by estimate: when {memory.moment}"
            f"{when_compiled(settings)}",
            "precision": "fp32 weights, bf16 autocast" if self.bf16 else "fp32",
            "ranks": f"{runtime.world_size}, each {runtime.threads} CPU threads, "
            f"{engine.micro_batch} pictures x {engine.accumulation} passes a step; ZeRO stage {engine.stage}",
        }
        if settings.train.recompute != "none":
            run["recomputed"] = f"{RECOMPUTED[settings.train.recompute]}; neither FLOPs nor mfu count it"
        operators = {name: f"{resolved.impl}: {resolved.reason}" for name, resolved in implementations.items()}
        blocks = {"run": run, "tokenizer": tokenizer_facts, "operators": operators, "machine": self.facts}
        return header(settings, blocks)


def collapse_notes(evaluation: Evaluation) -> list[str]:
    """A warning when the tokenizer gives nearly every patch the same token, so that there is nothing to learn."""
    if evaluation.commonest_share < COLLAPSED:
        return []
    return [
        f"The tokenizer has collapsed: {evaluation.commonest_share:.0%} of the hidden patches have the same token, so "
        f"these figures say nothing about the model. Train the tokenizer longer, or with a lower tokenizer.lr."
    ]


def training_seconds(history: list[dict[str, Any]], global_batch: int) -> float:
    """Time spent in training steps over all sessions of a run, from the logged speeds."""
    steps = [row for row in history if row.get("images_per_s")]
    before = [0, *(row["step"] for row in steps)]
    return sum(
        (row["step"] - start) * global_batch / row["images_per_s"]
        for row, start in zip(steps, before, strict=False)
        if row["step"] > start
    )


def link_model(source: Path, target: Path) -> None:
    """Give the newest weights a stable name without storing them twice."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
        temporary.replace(target)
    except OSError:  # a file system without hard links
        checkpoint.replace_durably(target, lambda path: path.write_bytes(source.read_bytes()))


def resolve_implementations(settings: Settings) -> dict[str, Resolved]:
    """What `train.impl` means for each operator on this machine, and why."""
    impl = settings.train.impl
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if resolve_bf16(settings, device) else torch.float32
    try:
        attention = {"rel_pos_attention": resolve("rel_pos_attention", impl, device, dtype)}
        return attention | {name: resolve(name, impl_besides_attention(impl), device, dtype) for name in OPERATORS}
    except ImplUnavailable as error:
        raise UserError(f"train.impl = {impl}: {error}.") from None


def refuse_without_compiler() -> None:
    """Raise `UserError` where torch.compile would find no compiler for what it writes: C for a GPU, C++ for a CPU."""
    variable, names = ("CC", ["gcc", "clang"]) if torch.cuda.is_available() else ("CXX", ["g++"])
    given = os.environ.get(variable)
    wanted = [given] if given else names
    if not any(map(shutil.which, wanted)):
        raise UserError(
            f"train.compile needs a compiler, and there is no {' or '.join(wanted)} here; install one, name it in "
            f"{variable}, or leave --train.compile out."
        )


def check_tokenizer(settings: Settings, num_pictures: int) -> None:
    """Raise `UserError` when the tokenizer given cannot be read, or none can be trained on so few pictures."""
    tokenizer = settings.tokenizer
    if tokenizer.path is not None:
        load_tokenizer(tokenizer.path)
    elif tokenizer.batch_size > num_pictures:
        raise UserError(
            f"tokenizer.batch_size = {tokenizer.batch_size} is more than the {num_pictures} pictures to train on; "
            f"set it to {num_pictures} or less."
        )


def resolve_bf16(settings: Settings, device: torch.device) -> bool:
    if settings.train.precision == "auto":
        return device.type == "cuda"
    return settings.train.precision == "bf16"


def run_length(settings: Settings, num_pictures: int) -> tuple[int, int]:
    """Optimizer steps in an epoch and in the whole run.

    Raises:
        UserError: when the pictures are fewer than a step needs.
    """
    train = settings.train
    steps_per_epoch = num_pictures // train.global_batch
    if not steps_per_epoch:
        raise UserError(
            f"there are {num_pictures} pictures to train on, fewer than one step of train.global_batch = "
            f"{train.global_batch}; set train.global_batch to {num_pictures} or less, or add pictures."
        )
    return steps_per_epoch, train.max_steps or train.epochs * steps_per_epoch

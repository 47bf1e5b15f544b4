"""Train the tokenizer of a pre-training by itself: `python engine/train_tokenizer.py --preset NAME --data.path FOLDER`.

Takes pretrain.py's presets and its options about pictures and tokenizer. Into the output folder, by default the
preset's with `_tokenizer` added, go `tokenizer.safetensors`, `tokenizer_metrics.jsonl` and a sheet of held-out pictures
with their reconstructions. pretrain.py trains a tokenizer by itself when none is given; use this one to try settings,
or to use a tokenizer in several runs.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from fused_beit.engine.command_line import option, parse, run_script
from fused_beit.engine.config import Settings
from fused_beit.engine.errors import UserError

USED = ("preset", "config", "output_dir", "overwrite", "help", "data.", "tokenizer.", "model.patch_size")
USED_OF_TRAINING = ("train.seed", "train.precision", "train.threads")


def main(argv: Sequence[str]) -> None:
    refuse_useless_options(argv)
    # Nothing is masked here: one patch fits pictures of any size.
    settings = parse([*argv, "--mask.num_patches", "1"], description=__doc__ or "")
    folder = settings.output_dir
    if option(argv, "output_dir") is None:
        folder = Path(f"{settings.output_dir}_tokenizer")
    if settings.tokenizer.path is not None:
        raise UserError(
            f"tokenizer.path = {settings.tokenizer.path} is a trained tokenizer; leave it out to train one."
        )
    file = folder / "tokenizer.safetensors"
    if file.exists() and not settings.overwrite:
        raise UserError(f"{file} exists already; give another --output_dir, or --overwrite to replace it.")
    train(settings, folder, file)


def refuse_useless_options(argv: Sequence[str]) -> None:
    """Raise `UserError` for an option that only pretrain.py uses, rather than take it without effect."""
    for word in argv:
        name = word.removeprefix("--").replace("-", "_").partition("=")[0]
        if word.startswith("--") and not name.startswith(USED + USED_OF_TRAINING):
            raise UserError(f"--{name} has no effect on a tokenizer; leave it out, or give it to pretrain.py.")


def train(settings: Settings, folder: Path, file: Path) -> None:
    # Imported late: --help and a wrong setting are answered before torch is loaded.
    import torch
    from PIL import Image

    from fused_beit.engine.cpu import keep_freed_memory
    from fused_beit.engine.data.loading import val_batches
    from fused_beit.engine.data.pictures import open_pictures
    from fused_beit.engine.tokenizer import training
    from fused_beit.engine.tokenizer.files import identity, save_tokenizer
    from fused_beit.engine.tokenizer.quality import measure, sheet

    if settings.train.threads is not None:
        torch.set_num_threads(settings.train.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    pictures = open_pictures(settings.data, settings.train.seed)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"training a tokenizer of {settings.tokenizer.vocab_size} codes on {device}: {pictures.subject}", flush=True)

    with (folder / "tokenizer_metrics.jsonl").open("w") as metrics:

        def log(row: training.LogRow) -> None:
            metrics.write(json.dumps(dataclasses.asdict(row)) + "\n")
            metrics.flush()
            training.print_row(row)

        model = training.train(settings, pictures.train, device, on_log=log)
    save_tokenizer(model, file)
    print(f"wrote {file} ({identity(model)})")

    if pictures.val is not None:
        side = settings.grid * model.stride
        data = settings.data.model_copy(update={"image_size": side})
        held_out = val_batches(
            pictures.val,
            data,
            settings.mask,
            settings.grid,
            side,
            batch_size=settings.tokenizer.batch_size,
            seed=settings.train.seed,
        )
        views = [batch.token_view for batch in held_out]
        print(measure(model, views))
        picture = folder / "tokenizer_reconstructions.png"
        Image.fromarray(sheet(model, torch.cat(views[:8])[:24])).save(picture)
        print(f"wrote {picture}: held-out pictures, each row above its reconstructions")
    path = "" if settings.data.path is None else f"--data.path {settings.data.path} "
    print(f"use it: deepspeed engine/pretrain.py --preset {settings.preset} {path}--tokenizer.path {file}")


if __name__ == "__main__":
    run_script(main)

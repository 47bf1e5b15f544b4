"""Plan a pre-training before it starts: `python engine/plan.py --preset beit_large_in1k_800ep --gpus 64 --gpu h200`.

Says what it will need of memory, time, energy and money, which ZeRO stage, batch and recomputation to choose, and the
command that starts it so. Takes all options of pretrain.py; `--sweep FILE.svg` adds how it scales.
"""

from collections.abc import Sequence

from fused_beit.engine.command_line import parse_as, run_script
from fused_beit.engine.errors import UserError
from fused_beit.engine.planning.settings import PlanSettings, check, published_pictures, resolve_gpu


def main(argv: Sequence[str]) -> None:
    settings = parse_as(PlanSettings, argv, description=__doc__ or "", check=check)
    pictures, pictures_are = count_pictures(settings)
    # Imported late: --help and a wrong setting are answered before torch is loaded.
    from fused_beit.engine.planning.choice import choose
    from fused_beit.engine.planning.plot import draw
    from fused_beit.engine.planning.sweep import sweep
    from fused_beit.engine.planning.text import plan_text, run_steps, sweep_text
    from fused_beit.engine.tokenizer.flops import size_of

    if not run_steps(settings, pictures):
        raise UserError(
            f"there are {pictures:,} pictures to train on, fewer than one step of train.global_batch = "
            f"{settings.train.global_batch}; set train.global_batch to {pictures} or less, or add pictures."
        )
    tokenizer = size_of(settings.tokenizer)
    if settings.tokenizer.path is not None:
        from fused_beit.engine.tokenizer.files import load_tokenizer

        tokenizer = load_tokenizer(settings.tokenizer.path).encoder_size
    gpu = resolve_gpu(settings)
    chosen = choose(settings, gpu, tokenizer, settings.gpus)
    planned = settings.model_copy(
        update={
            "train": settings.train.model_copy(
                update={"micro_batch": chosen.micro_batch, "recompute": chosen.recompute}
            ),
            "zero": settings.zero
            if settings.zero.config is not None
            else settings.zero.model_copy(update={"stage": chosen.stage, "offload": chosen.offload}),
        }
    )
    print(plan_text(planned, gpu, tokenizer, chosen, pictures=pictures, pictures_are=pictures_are))
    if settings.sweep is not None:
        rows = sweep(settings, gpu, tokenizer, chosen)
        try:
            settings.sweep.write_text(draw(rows, f"{settings.preset} on {gpu.key}"))
        except OSError as error:
            raise UserError(f"sweep = {settings.sweep} cannot be written ({error.strerror}); give another.") from None
        print(sweep_text(rows, settings.sweep))


def count_pictures(settings: PlanSettings) -> tuple[int, str]:
    """How many pictures there are to train on, and how that is known.

    Raises:
        UserError: when nothing says it.
    """
    if settings.pictures is not None:
        return settings.pictures, "as given"
    published = published_pictures(settings.preset)
    if settings.data.path is None and published is not None:
        return published[0], f"{published[1]}, by the preset's name"
    if settings.data.path is None and settings.preset != "digits":
        raise UserError(
            f"preset {settings.preset} is for your own pictures; give their number as --pictures N, or their folder as "
            f"--data.path FOLDER."
        )
    from fused_beit.engine.data.pictures import open_pictures

    opened = open_pictures(settings.data, settings.train.seed)
    return len(opened.train), f"{opened.subject}, counted"


if __name__ == "__main__":
    run_script(main)

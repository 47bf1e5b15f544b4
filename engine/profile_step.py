"""Show where a training step's time goes: `python engine/profile_step.py --preset NAME --data.path FOLDER`.

Takes pretrain.py's presets and options, builds the very run that pretrain.py would, and takes some of its steps: as
they are and with marks around their parts in turn, then a few under torch's profiler. Prints where the time went, what
bounds the speed and what to change; into the output folder, by default the preset's with `_profile` added, go
`profile.html`, `profile.json` and `trace.json`. Where no tokenizer is given, an untrained one of the same shape stands
for it. Can be started by `deepspeed` and `torchrun` too; each rank is as in training, and rank 0 is what is shown.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from fused_beit.engine.command_line import option, parse, run_script
from fused_beit.engine.config import Settings
from fused_beit.engine.errors import UserError


def main(argv: Sequence[str]) -> None:
    settings = parse(argv, description=__doc__ or "")
    if settings.resume != "none":
        raise UserError(f"--resume {settings.resume} has no effect on a profile, which trains nothing; leave it out.")
    if settings.train.compile:
        raise UserError(
            "--train.compile joins the parts of a block, which a profile takes apart; leave it out, and see what it "
            "wins by the pictures/s of two runs."
        )
    if option(argv, "output_dir") is None:
        settings = settings.model_copy(update={"output_dir": Path(f"{settings.output_dir}_profile")})
    show(settings)


def show(settings: Settings) -> None:
    # Imported late: --help and a wrong setting are answered before torch and deepspeed are loaded.
    from fused_beit.engine.training import profiling, zero
    from fused_beit.engine.training.pretraining import open_run

    folder = settings.output_dir
    with open_run(settings, rehearsal=True) as run:
        profile = profiling.profile(run, folder / "trace.json")
        if run.first:
            (folder / "profile.json").write_text(json.dumps(profiling.figures(profile), indent=1))
            profiling.write_page(folder / "profile.html", profile, "trace.json")
            print(f"\n{profiling.table(profile)}\n\n{profiling.sentence(profile)}\n")
            print(f"  page     {folder / 'profile.html'}\n  figures  {folder / 'profile.json'}")
            print(f"  trace    {folder / 'trace.json'}, for ui.perfetto.dev or chrome://tracing", flush=True)
    zero.stop()


if __name__ == "__main__":
    run_script(main)

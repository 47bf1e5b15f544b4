"""Pre-train BEiT: `deepspeed engine/pretrain.py`, `torchrun engine/pretrain.py` or `python engine/pretrain.py`.

With no argument it trains a small model on handwritten digits, tokenizer included, in minutes on any machine.
`--preset NAME --data.path FOLDER` is a real recipe on one's own pictures; `--help` lists every setting.
"""

import sys
from collections.abc import Sequence

from fused_beit.engine.command_line import parse, run_script


def main(argv: Sequence[str]) -> None:
    settings = parse(argv, description=__doc__ or "")
    # Imported late: --help and a wrong setting are answered before torch and deepspeed are loaded.
    from fused_beit.engine.training import zero
    from fused_beit.engine.training.pretraining import pretrain

    reached_its_end = pretrain(settings)
    zero.stop()
    if not reached_its_end:
        sys.exit(75)  # "temporary failure": a scheduler puts the run into its queue again


if __name__ == "__main__":
    run_script(main)

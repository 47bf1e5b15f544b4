"""Two CPU ranks: every ZeRO stage gives the losses of stage 0, and those of one rank with the same global batch."""

import json
import sys

import pytest
from small_run import losses, make_tokenizer, small_argv, small_settings
from two_ranks import on_two_ranks

from fused_beit.engine.training.pretraining import pretrain

pytestmark = pytest.mark.distributed

# Several runs in one pair of processes: starting processes is what takes the time.
RUNS = """
import json, sys
from fused_beit.engine.command_line import parse
from fused_beit.engine.training import zero
from fused_beit.engine.training.pretraining import pretrain
for argv in json.loads(sys.argv[1]):
    assert pretrain(parse(argv, description=""))
zero.stop()
"""

AGAIN = [(0, "block"), (1, "mlp"), (2, "block"), (3, "mlp")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of 10-step runs: one rank at stage 0, two ranks at every stage, and a resumed one."""
    root = tmp_path_factory.mktemp("runs")
    tokenizer = make_tokenizer(root / "tokenizer.safetensors")
    how = {"train__max_steps": 10}
    pretrain(small_settings(root / "one", tokenizer, zero__stage=0, **how))
    # DeepSpeed keeps small weights whole at stage 3, so that a small model would not be sharded at all.
    sharded = root / "zero3.json"
    sharded.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    argvs = [small_argv(root / f"zero{stage}", tokenizer, zero__stage=stage, **how) for stage in (0, 1, 2)]
    argvs.append(small_argv(root / "zero3", tokenizer, zero__config=sharded, train__eval_every=4, **how))
    argvs.append(small_argv(root / "halves", tokenizer, zero__config=sharded, train__stop_at_step=5, **how))
    argvs.append(small_argv(root / "halves", tokenizer, zero__config=sharded, resume="auto", **how))
    for stage, recompute in AGAIN:
        changes = how | {"train__recompute": recompute, "train__stop_at_step": 4}
        changes |= {"zero__config": sharded} if stage == 3 else {"zero__stage": stage}
        argvs.append(small_argv(root / f"zero{stage}-{recompute}", tokenizer, **changes))
    on_two_ranks([sys.executable, "-c", RUNS, json.dumps(argvs)])
    return root


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharding_does_not_change_the_losses(runs, stage):
    assert losses(runs / f"zero{stage}") == pytest.approx(losses(runs / "zero0"), rel=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_as_one_with_the_same_global_batch(runs, stage):
    assert losses(runs / f"zero{stage}") == pytest.approx(losses(runs / "one"), rel=1e-5)


@pytest.mark.parametrize(("stage", "recompute"), AGAIN)
def test_computing_activations_again_changes_no_bit_at_any_stage(runs, stage, recompute):
    found = losses(runs / f"zero{stage}-{recompute}")
    assert len(found) == 4
    assert found == losses(runs / f"zero{stage}")[:4]


def test_two_ranks_resume_bit_for_bit_at_stage_3(runs):
    assert losses(runs / "halves") == losses(runs / "zero3")


def test_held_out_figures_do_not_depend_on_the_number_of_ranks(runs):
    def held_out(name):
        return json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])

    one, two = held_out("one"), held_out("zero3")
    assert two["token_entropy"] == one["token_entropy"]
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)


LONG_WORK_OF_RANK_0 = """
import time
from datetime import timedelta
from fused_beit.engine.config import Settings
from fused_beit.engine.training import zero
zero.COLLECTIVE_TIMEOUT = timedelta(seconds=8)
zero.start(Settings())
assert zero.on_first_rank(lambda: time.sleep(12) or "done") == "done"
zero.stop()
"""


def test_work_of_rank_0_may_take_longer_than_a_collective():
    on_two_ranks([sys.executable, "-c", LONG_WORK_OF_RANK_0])


def test_resume_with_another_number_of_ranks_is_refused_in_a_sentence(runs):
    from fused_beit.engine.errors import UserError

    tokenizer = runs / "tokenizer.safetensors"
    settings = small_settings(runs / "zero1", tokenizer, zero__stage=1, train__max_steps=10, resume="auto")
    with pytest.raises(UserError, match=r"written by 2 rank\(s\).*resume with 2"):
        pretrain(settings)

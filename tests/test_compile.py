"""Runs with `--train.compile`: the same losses, each kind of block compiled once, and what is said of it."""

import runpy

import pytest
import torch
from small_run import losses, make_tokenizer, small_settings

from fused_beit.engine.command_line import parse_as
from fused_beit.engine.errors import UserError
from fused_beit.engine.planning.choice import choose
from fused_beit.engine.planning.settings import PlanSettings, check, resolve_gpu
from fused_beit.engine.planning.text import memory_lines
from fused_beit.engine.tokenizer.flops import DALLE
from fused_beit.engine.training.pretraining import open_run, pretrain

# torch looks at every tensor that a compiled block is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors")


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_losses_stay_each_kind_of_block_is_compiled_once_and_evaluation_compiles_nothing(tmp_path, tokenizer, stage):
    """Kinds are a block before another one, and the last."""
    how = {"zero__stage": stage, "model__depth": 3, "data__val_max": 13, "train__eval_every": 2}
    pretrain(small_settings(tmp_path / "eager", tokenizer, **how))
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    pretrain(small_settings(tmp_path / "compiled", tokenizer, train__compile=True, **how))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=2e-5)
    if stage < 3:  # there DeepSpeed's hooks divide a block
        assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize("stage", [0, 3])
def test_losses_stay_where_compiled_blocks_are_computed_again(tmp_path, tokenizer, stage, recompute, precision):
    torch.compiler.reset()
    how = {"zero__stage": stage, "model__depth": 3, "train__precision": precision}
    pretrain(small_settings(tmp_path / "eager", tokenizer, **how))
    pretrain(small_settings(tmp_path / "compiled", tokenizer, train__compile=True, train__recompute=recompute, **how))
    close = 2e-5 if precision == "fp32" else 2e-3
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=close)


COMPILED_KEEP = "; compiled blocks keep another amount (train.compile)"


def test_the_header_says_that_its_estimate_of_memory_is_not_of_compiled_blocks(tmp_path, tokenizer, capsys):
    said = {}
    for compiled in (False, True):
        how = {"train__compile": True} if compiled else {}
        with open_run(small_settings(tmp_path / f"{compiled}", tokenizer, **how)):
            said[compiled] = next(line for line in capsys.readouterr().out.splitlines() if "memory a rank" in line)
    assert said[True] == said[False] + COMPILED_KEEP


def test_a_plan_says_it_too():
    said = {}
    for argv in ([], ["--train.compile"]):
        settings = parse_as(PlanSettings, ["--preset", "beit_base_in1k_800ep", *argv], description="", check=check)
        said[len(argv)] = memory_lines(settings, choose(settings, resolve_gpu(settings), DALLE, settings.gpus))[-1]
    assert said[1] == said[0] + COMPILED_KEEP


def test_a_profile_takes_no_compiled_block_apart(root, tmp_path):
    main = runpy.run_path(str(root / "engine" / "profile_step.py"))["main"]
    with pytest.raises(UserError, match=r"--train\.compile joins the parts of a block.* leave it out"):
        main(["--train.compile", "--output_dir", str(tmp_path / "profile")])
    assert not (tmp_path / "profile").exists()


def test_a_machine_without_a_compiler_is_told_before_training(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-compiler")  # what a GPU needs
    with pytest.raises(UserError, match=r"train\.compile needs a compiler, and there is no no-such-compiler here"):
        pretrain(small_settings(tmp_path / "run", tokenizer, train__compile=True))
    assert not (tmp_path / "run").exists()

"""Runs with `--train.compile`: the same losses, each kind of block compiled once, and a sentence where it cannot be."""

import pytest
import torch
from small_run import losses, make_tokenizer, small_settings

from fused_beit.engine.errors import UserError
from fused_beit.engine.training.pretraining import pretrain

# torch looks at every tensor that a compiled block is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors")


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_losses_stay_each_kind_of_block_is_compiled_once_and_evaluation_compiles_nothing(tmp_path, tokenizer, stage):
    how = {"zero__stage": stage, "model__depth": 3, "data__val_max": 13, "train__eval_every": 2}
    pretrain(small_settings(tmp_path / "eager", tokenizer, **how))
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    pretrain(small_settings(tmp_path / "compiled", tokenizer, train__compile=True, **how))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=2e-5)
    if stage < 3:  # there DeepSpeed's hooks divide a block
        assert counters["stats"]["unique_graphs"] == 2  # a block before another one, and the last


def test_a_machine_without_a_compiler_is_told_before_training(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"train\.compile needs a compiler, and there is no no-such-compiler here"):
        pretrain(small_settings(tmp_path / "run", tokenizer, train__compile=True))
    assert not (tmp_path / "run").exists()

"""What a run warns of before its first step, and where it keeps quiet."""

import pytest
import torch
from small_run import make_tokenizer, small_settings

from fused_beit.engine.command_line import parse, preset_names
from fused_beit.engine.training import run_warnings
from fused_beit.engine.training.pretraining import pretrain
from fused_beit.engine.training.run_warnings import long_warm_up, other_tokens, slow_precision


def settings_of(*argv):
    return parse(argv, description="")


@pytest.mark.parametrize(("bf16", "has_bf16", "warns"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_bf16_on_a_processor_without_it_is_warned_of(monkeypatch, bf16, has_bf16, warns):
    monkeypatch.setattr(run_warnings, "has_bf16", lambda: has_bf16)
    assert len(slow_precision(torch.device("cpu"), bf16=bf16)) == warns


def test_a_warm_up_that_takes_the_whole_run_is_warned_of_with_both_numbers():
    settings = settings_of("--optim.warmup_epochs", "10", "--train.max_steps", "100")
    assert long_warm_up(settings, total_steps=100, steps_per_epoch=23) == [
        "optim.warmup_epochs = 10 is a warm-up of 230 steps and the run has 100, so the learning rate rises to the end "
        "and never falls; lower optim.warmup_epochs or raise train.max_steps."
    ]


def test_a_warm_up_given_in_steps_is_called_by_its_own_name(tmp_path):
    settings = settings_of("--preset", "beit_base_in22k", "--data.path", str(tmp_path))
    assert "lower optim.warmup_steps or raise train.epochs" in long_warm_up(settings, 10_000, steps_per_epoch=66)[0]


def test_the_digits_are_not_warned_of():
    assert not long_warm_up(settings_of(), total_steps=700, steps_per_epoch=23)
    assert not other_tokens(settings_of())


@pytest.mark.parametrize("name", [name for name in preset_names() if name != "digits"])
def test_a_published_recipe_without_its_tokenizer_is_warned_of_and_one_for_own_pictures_is_not(tmp_path, name):
    warned = other_tokens(settings_of("--preset", name, "--data.path", str(tmp_path)))
    if name in ("beit_tiny", "beit_small"):
        assert not warned
    else:
        assert f"preset {name} predicts the tokens of DALL-E's encoder" in warned[0]
        assert "--tokenizer.path" in warned[0]


def test_a_tokenizer_of_another_size_does_not_make_the_targets_the_recipes(tmp_path):
    argv = ["--preset", "beit_base_in1k_800ep", "--data.path", str(tmp_path), "--tokenizer.vocab_size", "512"]
    assert other_tokens(settings_of(*argv))


def test_a_recipe_with_a_tokenizer_is_not_warned_of(tmp_path):
    argv = ["--preset", "beit_base_in1k_800ep", "--data.path", str(tmp_path), "--tokenizer.path", str(tmp_path)]
    assert not other_tokens(settings_of(*argv))


def test_the_run_says_it_before_its_first_step(tmp_path, capsys):
    tokenizer = make_tokenizer(tmp_path / "tokenizer.safetensors")
    pretrain(small_settings(tmp_path / "run", tokenizer, train__max_steps=1, optim__warmup_steps=7))
    said = capsys.readouterr().out
    assert said.index("warning: optim.warmup_steps = 7 is a warm-up of 7 steps and the run has 1") < said.index("loss")

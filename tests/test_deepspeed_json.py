"""The DeepSpeed JSON: one owner per setting, nothing ignored silently."""

import json

import pytest

from fused_beit.engine.config import Settings
from fused_beit.engine.errors import UserError
from fused_beit.engine.training.deepspeed_json import resolve_json, resolve_stage


def settings_with(tmp_path, text, **zero) -> Settings:
    file = tmp_path / "ds.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    return Settings.model_validate({"zero": {"config": file, **zero}, "train": {"global_batch": 8}})


def resolved(settings, stage=1):
    return resolve_json(settings, stage=stage, micro_batch=2, accumulation=2, world_size=2, bf16=False)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_built_in_json_of_every_stage_is_completed_with_our_settings(stage):
    settings = Settings.model_validate({"zero": {"stage": stage}})
    config = resolved(settings, stage)
    assert config["zero_optimization"]["stage"] == stage
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (8, 2)
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == (0.0 if stage == 0 else settings.optim.clip_grad)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_moves_the_optimizer_to_the_host(stage):
    config = resolved(Settings.model_validate({"zero": {"stage": stage, "offload": True}}), stage)
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_the_stage_is_the_settings_the_files_or_fits_the_ranks(tmp_path):
    assert [resolve_stage(Settings(), world_size) for world_size in (1, 2)] == [0, 1]
    assert resolve_stage(Settings.model_validate({"zero": {"offload": True}}), 1) == 1
    assert resolve_stage(Settings.model_validate({"zero": {"stage": 3}}), 1) == 3
    assert resolve_stage(settings_with(tmp_path, {"zero_optimization": {"stage": 2}}), 1) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"zero_optimizaton": {}}, ["'zero_optimizaton'", "did you mean 'zero_optimization'"]),
        ({"gradient_clipping": 7.0}, ["gradient_clipping = 7.0", "optim.clip_grad"]),
        ({"train_micro_batch_size_per_gpu": 3}, ["train_micro_batch_size_per_gpu = 3", "train.micro_batch"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "optim.*"]),
        ('{"log_level": 1, "log_level": 2}', ["'log_level' twice"]),
        ("{", ["not valid JSON"]),
        ("[]", ["one JSON object"]),
        ({"zero_optimization": 3}, ["must be an object"]),
    ],
    ids=str,
)
def test_a_wrong_json_is_refused_in_a_sentence(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        resolved(settings_with(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def test_a_value_equal_to_ours_or_auto_is_no_contradiction(tmp_path):
    config = resolved(settings_with(tmp_path, {"gradient_clipping": 3.0, "train_batch_size": "auto"}))
    assert (config["gradient_clipping"], config["train_batch_size"]) == (3.0, 8)


def test_two_stages_are_a_contradiction(tmp_path):
    with pytest.raises(UserError, match=r"zero\.stage = 3.*is 2"):
        resolve_stage(settings_with(tmp_path, {"zero_optimization": {"stage": 2}}, stage=3), 1)

"""Settings: presets, files, dotted options, and one sentence for every wrong one."""

import subprocess
import sys

import pytest

from fused_beit.engine.command_line import field_names, load_preset, options_of, parse, preset_names
from fused_beit.engine.config import Settings, result_settings, speed_settings
from fused_beit.engine.errors import UserError
from fused_beit.engine.launching import resume_command


def settings_of(*argv: str) -> Settings:
    return parse(argv, description="")


def error_of(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        settings_of(*argv)
    return str(caught.value)


def test_defaults_are_the_digits_preset():
    settings = settings_of()
    assert settings.preset == "digits"
    assert settings.data.path is None
    assert settings.output_dir.name == "digits"


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_changes_something(name, tmp_path):
    assert load_preset(name)
    path = () if name == "digits" else ("--data.path", str(tmp_path))
    assert settings_of("--preset", name, *path).preset == name


def test_published_values_of_the_base_recipe(tmp_path):
    settings = settings_of("--preset", "beit_base_in1k_800ep", "--data.path", str(tmp_path))
    assert (settings.model.width, settings.model.depth, settings.model.num_heads) == (768, 12, 12)
    assert (settings.optim.lr, settings.optim.min_lr, settings.optim.clip_grad) == (1.5e-3, 1e-5, 3.0)
    assert (settings.train.epochs, settings.train.global_batch, settings.optim.warmup_epochs) == (800, 2048, 10)
    assert (settings.mask.num_patches, settings.mask.min_block) == (75, 16)


def test_large_recipe_differs_in_clipping_and_layer_scale(tmp_path):
    settings = settings_of("--preset", "beit_large_in1k_800ep", "--data.path", str(tmp_path))
    assert (settings.model.width, settings.model.depth, settings.model.num_heads) == (1024, 24, 16)
    assert (settings.optim.clip_grad, settings.model.layer_scale) == (1.0, 1e-5)


def test_options_replace_a_file_which_replaces_the_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[optim]\nlr = 0.25\nmin_lr = 0.125\n")
    settings = settings_of("--config", str(file), "--optim.lr", "0.5")
    assert (settings.optim.lr, settings.optim.min_lr) == (0.5, 0.125)
    assert settings.optim.warmup_epochs == load_preset("digits")["optim"]["warmup_epochs"]


def test_the_launchers_rank_is_not_a_setting():
    assert settings_of("--local_rank=1", "--train.seed", "3").train.seed == 3


def test_hyphens_and_underscores_are_the_same():
    assert settings_of("--train.max-steps", "3") == settings_of("--train.max_steps", "3")


def test_every_setting_changes_either_the_result_or_the_speed():
    settings = Settings()
    result, speed = result_settings(settings), speed_settings(settings)
    assert not result.keys() & speed.keys()
    assert sorted(result.keys() | speed.keys()) == sorted(field_names(Settings))
    assert "optim.lr" in result
    assert "data.workers" in speed


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optim.lrr", "1"], ["--optim.lrr", "did you mean --optim.lr?"]),
        (["--warmup", "1"], ["--warmup", "--help"]),
        (["--preset", "digit"], ["'digit'", "did you mean 'digits'"]),
        (["--preset", "no_such"], ["'no_such'", "beit_base_in1k_800ep"]),
        (["--preset", "beit_tiny"], ["beit_tiny", "--data.path"]),
        (["--config", "/no/such.toml"], ["/no/such.toml", "cannot be read"]),
        (["--data.path", "/no/such"], ["data.path", "/no/such", "not a folder"]),
        (["--tokenizer.path", "/no/such"], ["tokenizer.path", "/no/such"]),
        (["--data.image_size", "30"], ["data.image_size = 30", "model.patch_size = 4", "28 or 32"]),
        (
            ["--mask.num_patches", "65"],
            ["mask.num_patches = 65", "64 patches", "for BEiT's share to 24"],
        ),
        (
            ["--mask.num_patches", "64"],
            ["mask.num_patches = 64", "all of the 64 patches", "for BEiT's share to 24"],
        ),
        (["--lr", "1e-3"], ["there is no option --lr", "did you mean --tokenizer.lr or --optim.lr?"]),
        (["--mask.min_block", "9", "--mask.max_block", "8"], ["mask.max_block = 8", "mask.min_block = 9"]),
        (["--model.num_heads", "5"], ["model.width = 64", "model.num_heads = 5"]),
        (["--data.workers", "-1"], ["data.workers = -1", "greater than or equal to 0"]),
        (["--data.horizontal_flip", "1.5"], ["data.horizontal_flip = 1.5", "less than or equal to 1"]),
        (["--optim.lr", "nan"], ["optim.lr", "finite"]),
        (["--optim.betas", "0.9", "1.0"], ["optim.betas", "below 1"]),
        (["--optim.lr", "1", "--optim.lr", "2"], ["--optim.lr", "1 and 2"]),
        (["--resume", "auto", "--overwrite"], ["--resume auto", "--overwrite"]),
        (["--zero.stage", "0", "--zero.offload"], ["zero.offload", "zero.stage"]),
        (["--optim.lr", "abc"], ["--optim.lr abc cannot be read", "a number"]),
        (["--optim.lr", "1", "2"], ["--optim.lr 1 2 cannot be read", "a number"]),
        (["--train.seed", "1", "--optim.lr"], ["--optim.lr cannot be read", "a number"]),
        (["--data.workers=1.5"], ["--data.workers 1.5 cannot be read", "a whole number"]),
        (["--optim.betas", "0.9"], ["--optim.betas 0.9 cannot be read", "two numbers"]),
        (["--train.max_steps", "ten"], ["--train.max_steps ten cannot be read", "a whole number or None"]),
        (["--zero.stage", "4"], ["--zero.stage 4 cannot be read", "one of 0, 1, 2, 3 or None"]),
        (["--train.impl", "fast"], ["--train.impl fast cannot be read", "one of auto, reference"]),
        (["--zero.offload", "yes"], ["--zero.offload yes cannot be read", "no value", "--zero.no_offload off"]),
        (["--train.compile=true"], ["--train.compile true cannot be read", "--train.compile alone turns it on"]),
        (["--train.no_compile", "1"], ["--train.no_compile 1", "--train.compile alone", "--train.no_compile off"]),
        (["--overwrite", "false"], ["--overwrite false cannot be read", "--overwrite alone", "--no_overwrite off"]),
        (["birds"], ["'birds' belongs to no option", "--help"]),
        (["-x", "1"], ["'-x' belongs to no option", "--help"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_value_is_named_with_what_is_allowed(argv, words):
    message = error_of(*argv)
    for word in words:
        assert word in message


def test_an_option_about_training_a_tokenizer_contradicts_a_trained_one(tmp_path):
    message = error_of("--tokenizer.path", str(tmp_path), "--tokenizer.vocab_size", "512")
    assert "--tokenizer.vocab_size" in message
    assert "leave one of them out" in message


def test_how_presets_and_files_train_a_tokenizer_is_left_out_beside_a_trained_one(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[tokenizer]\nvocab_size = 32\n")
    settings = settings_of("--config", str(file), "--tokenizer.path", str(tmp_path))
    assert [name for name in result_settings(settings) if name.startswith("tokenizer.")] == ["tokenizer.path"]
    assert "--tokenizer.vocab_size" not in options_of(settings)


@pytest.mark.parametrize(
    ("ranks", "local_ranks", "launcher"),
    [(1, 1, "python"), (8, 8, "deepspeed --num_gpus 8"), (16, 8, "deepspeed --hostfile HOSTS")],
)
def test_the_command_that_goes_on_starts_as_many_ranks(ranks, local_ranks, launcher):
    command = resume_command(settings_of("--train.micro_batch", "2"), 5, ranks=ranks, ranks_a_machine=local_ranks)
    options = "--preset digits --output_dir output/digits --train.micro_batch 2 --resume auto"
    assert command == f"{launcher} engine/pretrain.py {options}"


def test_the_command_that_goes_on_leaves_out_a_stop_that_is_behind_it():
    settings = settings_of("--train.stop_at_step", "5")
    assert "--train.stop_at_step 5" in resume_command(settings, 4, ranks=1, ranks_a_machine=1)
    assert "stop_at_step" not in resume_command(settings, 5, ranks=1, ranks_a_machine=1)


@pytest.mark.parametrize(
    ("text", "given", "meant"),
    [("[data]\nworker = 3", "data.worker", "data.workers"), ("[optimm]\nlr = 1", "optimm", "optim.lr")],
)
def test_a_misspelt_key_of_a_file_is_named_with_the_likely_one(tmp_path, text, given, meant):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    assert f"no setting {given!r}; did you mean {meant!r}" in error_of("--config", str(file))


@pytest.mark.parametrize("given", ['"please"', "2", "[true]"])
def test_what_a_file_gives_for_true_or_false_is_named_with_how_to_write_them(tmp_path, given):
    file = tmp_path / "mine.toml"
    file.write_text(f"[train]\ncompile = {given}\n")
    message = error_of("--config", str(file))
    assert "train.compile = " in message
    assert "true or false, without quotes" in message


def test_a_file_that_is_not_toml_is_named(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("lr: 3")
    assert "not valid TOML" in error_of("--config", str(file))


@pytest.mark.parametrize("argv", [["--optim.l", "3"], ["--data.workers", "many"], ["--model.rel_pos_bias", "both"]])
def test_the_script_ends_with_code_2_and_no_traceback(argv):
    script = (
        "from fused_beit.engine.command_line import parse, run_script; run_script(lambda a: parse(a, description=''))"
    )
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert argv[0] in done.stderr

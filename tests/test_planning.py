"""A plan's parts: hardware, traffic, time, choice, scaling; and what it says of inputs that cannot be planned."""

import re
from pathlib import Path

import pytest
import torch
from small_run import make_tokenizer
from torch.utils.flop_counter import FlopCounterMode

from fused_beit.engine import hardware
from fused_beit.engine.command_line import parse_as
from fused_beit.engine.errors import UserError
from fused_beit.engine.models import parameter_count, pretraining_flops
from fused_beit.engine.planning.choice import choose, describe, divisors, room, way
from fused_beit.engine.planning.count import PassShape, pass_operators
from fused_beit.engine.planning.plot import draw
from fused_beit.engine.planning.settings import PlanSettings, check, resolve_gpu
from fused_beit.engine.planning.step_time import host_traffic, link, traffic
from fused_beit.engine.planning.sweep import alone, counts, efficiency, sweep
from fused_beit.engine.planning.text import assumptions, run_steps, step
from fused_beit.engine.tokenizer.dvae import DiscreteVAE
from fused_beit.engine.tokenizer.files import load_tokenizer
from fused_beit.engine.tokenizer.flops import DALLE, encoder_parameters, encoding_flops, size_of

BASE = ["--preset", "beit_base_in1k_800ep"]
LARGE = ["--preset", "beit_large_in1k_800ep"]


def planned(*argv: str) -> PlanSettings:
    return parse_as(PlanSettings, argv, description="", check=check)


def chosen(*argv: str):
    settings = planned(*argv)
    return choose(settings, resolve_gpu(settings), size_of(settings.tokenizer), settings.gpus)


def error_of(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        chosen(*argv)
    return str(caught.value)


# The tokenizer's work.


def test_the_published_encoder_has_its_published_size():
    assert encoder_parameters(DALLE) == 53_786_240
    # The convolutions' outputs times the weights behind each, group by group: 14 x 14 cells of 8 x 8 pixels.
    pixels, macs, n_in = 112 * 112, 112 * 112 * 256 * 3 * 49, 256
    for width in (256, 512, 1024, 2048):
        hidden = width // 4
        for first in (True, False):
            wide = n_in if first else width
            macs += pixels * (wide * hidden * 9 + 2 * hidden * hidden * 9 + hidden * width)
            macs += pixels * wide * width if wide != width else 0
        n_in, pixels = width, pixels // 4
    macs += 14 * 14 * 2048 * 8192
    assert sum(encoding_flops(DALLE, 112)) == 2 * macs


@pytest.mark.parametrize("sizes", [(64, 8, 3, 1), (50, 16, 4, 2)], ids=str)
def test_a_tokenizers_work_is_what_torch_counts(sizes):
    tokenizer = DiscreteVAE(*sizes, output_channels=0)
    with FlopCounterMode(display=False) as counter:
        tokenizer.encode(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    assert counter.get_total_flops() == 3 * sum(encoding_flops(tokenizer.encoder_size, 32))
    assert encoder_parameters(tokenizer.encoder_size) == sum(p.numel() for p in tokenizer.parameters())


def test_a_tokenizer_is_loaded_in_fp32_as_the_plan_supposes(tmp_path):
    """One in half precision is to change `step_time`, which takes tf32 and fp32 rates for it."""
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "tokenizer.safetensors"))
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}


# Hardware.


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100_80"),
        ("NVIDIA A100-SXM4-40GB", "a100_40"),
        ("NVIDIA A100-PCIE-40GB", "a100_40"),
        ("NVIDIA A100 80GB PCIe", "a100_80"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_a_drivers_name_finds_the_published_rate(device, key):
    assert hardware.bf16_rate(device) == hardware.GPUS[key].bf16_tflops * 1e12


@pytest.mark.parametrize(
    "device",
    [
        "AMD EPYC",
        "NVIDIA GB200",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ],
)
def test_a_device_of_unknown_or_other_rates_has_none(device):
    assert hardware.bf16_rate(device) is None


def test_a_value_given_replaces_the_published_one():
    gpu = resolve_gpu(planned(*BASE, "--gpu", "h100", "--hardware.memory_gb", "64"))
    assert (gpu.memory_gb, gpu.watts) == (64, hardware.GPUS["h100"].watts)


def test_a_custom_gpu_is_described_in_full():
    values = {name: value for name, value in vars(hardware.GPUS["l40s"]).items() if name not in ("key", "name")}
    argv = [word for name, value in values.items() for word in (f"--hardware.{name}", str(value))]
    custom, known = chosen(*BASE, "--gpu", "custom", *argv), chosen(*BASE, "--gpu", "l40s")
    assert (custom.time, custom.memory) == (known.time, known.memory)


# Traffic and time.


def test_between_machines_the_adapters_of_a_machine_are_shared_by_its_rings():
    gpu = hardware.GPUS["a100_80"]
    assert link(gpu, 8) == 300e9
    assert link(gpu, 16) == 8 * 25e9
    assert link(hardware.GPUS["b200"], 16) == 8 * 50e9


def test_one_rank_sends_nothing():
    assert all(traffic(10**8, stage=stage, world_size=1, accumulation=3).total == 0 for stage in range(4))


def test_seconds_are_work_over_rate():
    settings = planned(*BASE, "--mfu", "0.5", "--zero.stage", "0", "--dispatch_us", "0")
    one = choose(settings, resolve_gpu(settings), DALLE, 1)
    flops = 2048 * pretraining_flops(settings.model, 224, 75, 8192)
    assert one.time.model == pytest.approx(flops / (0.5 * 989e12))
    inner, codes = encoding_flops(DALLE, 112)
    assert one.time.tokenizer == pytest.approx(2048 * (inner + codes) / 989e12 / 0.5)
    assert one.time.optimizer == pytest.approx(36 * 91_965_776 / (0.9 * 4.8e12))
    assert one.pictures_per_s == pytest.approx(2048 / one.time.total)


def test_in_fp32_the_tokenizers_convolutions_are_made_in_tf32_and_its_codes_are_not():
    settings = planned(*BASE, "--mfu", "0.5", "--zero.stage", "0", "--dispatch_us", "0", "--train.precision", "fp32")
    inner, codes = encoding_flops(DALLE, 112)
    one = choose(settings, resolve_gpu(settings), DALLE, 1)
    assert one.time.tokenizer == pytest.approx(2048 * (inner / 494e12 + codes / 67e12) / 0.5)


def test_traffic_is_waited_for_as_far_as_nothing_hides_it():
    argv = (*BASE, "--gpus", "8", "--train.micro_batch", "64", "--dispatch_us", "0", "--mfu", "0.3")
    whole = 4 * 91_965_776 * 7 / 8

    def at(stage, link_gb_s):
        settings = planned(*argv, "--zero.stage", str(stage), "--hardware.node_link_gb_s", str(link_gb_s))
        return choose(settings, resolve_gpu(settings), DALLE, 8)

    for link_gb_s in (0.5, 900):
        bandwidth = 1e9 * link_gb_s
        model = at(0, link_gb_s).time.model
        last = model / 4 * 2 / 3  # the backward of one of four passes
        assert at(0, link_gb_s).time.waits == pytest.approx(2 * whole / bandwidth)
        assert at(1, link_gb_s).time.waits == pytest.approx(max(0, 2 * whole / bandwidth - last) + whole / bandwidth)
        assert at(2, link_gb_s).time.waits == pytest.approx(
            max(0, 8 * whole / bandwidth - 4 * last) + whole / bandwidth
        )
        hidden = max(0, 4 * whole / bandwidth - 4 * last) + max(0, 4 * whole / bandwidth - 2 * last)
        assert at(3, link_gb_s).time.waits == pytest.approx(hidden)


@pytest.mark.parametrize(
    ("stage", "passes", "times"),
    # Of a rank's part: gradients and then weights.
    [(1, 1, 1 + 1), (1, 4, 1 + 1), (2, 1, 1 + 1), (2, 2, 4 + 1), (2, 4, 8 + 1), (3, 1, 3 + 1), (3, 4, 9 + 4)],
)
def test_offload_moves_gradients_and_weights_as_often_as_passes_need_it(stage, passes, times):
    part = 4 * 91_965_776 / 8
    moved = host_traffic(91_965_776, stage=stage, world_size=8, accumulation=passes)
    assert moved == pytest.approx(times * part)
    size = str(256 // passes)
    one = chosen(*BASE, "--gpus", "8", "--zero.offload", "--zero.stage", str(stage), "--train.micro_batch", size)
    assert one.accumulation == passes
    assert one.time.optimizer == pytest.approx(times * part / 64e9)


def test_what_offload_leaves_out_is_said():
    settings = planned(*BASE, "--hardware.host_link_gb_s", "7")
    said = assumptions(settings, resolve_gpu(settings))["offload"]
    assert "7 GB/s" in said and "AdamW" in said and "not counted" in said


def test_a_pass_takes_no_less_than_its_operations_take_to_start():
    one = chosen("--preset", "digits", "--gpus", "1", "--dispatch_us", "100")
    settings = planned("--preset", "digits")
    shape = PassShape(settings.model, 32, settings.mask.num_patches, settings.tokenizer.vocab_size, "auto", bf16=True)
    assert one.time.model == pytest.approx(100e-6 * sum(found.starts for found in pass_operators(shape, 64)))
    assert one.time.model > one.time.model_on_device


H100 = [*BASE, "--gpu", "h100", "--train.global_batch", "128"]


def test_a_step_is_predicted_by_implementation():
    """At a batch where the GPU binds; with compiled blocks, too, by Triton all is faster. The tokens are the same."""
    auto, compiled, triton = (chosen(*H100, *how).time for how in ([], ["--train.compile"], ["--train.impl", "triton"]))
    assert triton.model < compiled.model < auto.model
    assert triton.tokenizer == auto.tokenizer
    assert triton.model == triton.model_on_device


def test_a_measured_mfu_replaces_the_prediction():
    assert chosen(*H100, "--mfu", "0.4").time == chosen(*H100, "--mfu", "0.4", "--train.impl", "triton").time


def test_a_plan_says_what_was_assumed_and_what_the_other_implementation_would_take():
    for asked, other in (("auto", "triton"), ("triton", "auto")):
        settings = planned(*H100, "--train.impl", asked)
        gpu = resolve_gpu(settings)
        said = step(settings, gpu, DALLE, choose(settings, gpu, DALLE, 1))
        would = chosen(*H100, "--train.impl", other).time.total
        assert said["otherwise"].startswith(f"{1e3 * would:.3g} ms with --train.impl {other};")
        assert said["otherwise"].endswith("a step took 1.2 times what is predicted by auto, 2 times by triton")
        assert f"(--train.impl {asked})" in assumptions(settings, gpu)["counted"]


def test_the_mfu_that_is_said_is_the_models_flops_over_the_time():
    settings = planned(*H100)
    gpu = resolve_gpu(settings)
    one = choose(settings, gpu, DALLE, 1)
    flops = 128 * pretraining_flops(settings.model, 224, 75, 8192)
    own, whole = (flops / (989e12 * seconds) for seconds in (one.time.model, one.time.total))
    assert step(settings, gpu, DALLE, one)["mfu"].startswith(f"{own:.1%} of 989 TFLOP/s")
    assert f"{whole:.1%} of the whole step" in step(settings, gpu, DALLE, one)["mfu"]


def test_a_shape_that_triton_does_not_take_is_told_in_a_sentence():
    said = error_of(*H100, "--train.impl", "triton", "--model.width", "780", "--model.num_heads", "12")
    assert "heads of a multiple of 8 channels" in said and "65" in said
    settings = planned(*H100, "--model.width", "780")
    gpu = resolve_gpu(settings)
    assert "otherwise" not in step(settings, gpu, DALLE, choose(settings, gpu, DALLE, 1))


# The choice.


def test_one_gpu_shards_nothing_and_more_shard_the_optimizer():
    assert (chosen(*BASE).stage, chosen(*BASE, "--gpus", "8").stage) == (0, 1)


def test_the_largest_batch_that_fits_is_taken_and_the_next_does_not_fit():
    one = chosen(*LARGE, "--gpu", "rtx4090")
    settings = planned(*LARGE, "--gpu", "rtx4090")
    larger = [size for size in divisors(2048) if size > one.micro_batch]
    assert larger and one.fits(0.1)
    next_larger = way(
        settings, one.gpu, DALLE,
        gpus=1, stage=one.stage, offload=one.offload, recompute=one.recompute, micro_batch=larger[-1],
    )  # fmt: skip
    assert not next_larger.fits(0.1)
    assert one.global_batch == 2048


def test_a_simpler_sharding_is_left_where_another_is_more_than_a_tenth_faster():
    slow = ("--gpus", "8", "--hardware.node_link_gb_s", "8", "--train.micro_batch", "256")
    best, first = chosen(*BASE, *slow), chosen(*BASE, *slow, "--zero.stage", "1")
    assert best.stage != 1
    assert best.time.total * 1.1 < first.time.total


def test_what_is_asked_for_is_kept():
    one = chosen(*LARGE, "--gpus", "8", "--zero.stage", "2", "--train.micro_batch", "16")
    assert (one.stage, one.micro_batch, one.accumulation) == (2, 16, 16)


def test_a_machine_that_is_too_small_is_told_what_would_fit():
    said = error_of(*LARGE, "--hardware.memory_gb", "2", "--gpu", "rtx4090")
    least = re.search(r"the least, (.*), takes ([\d.]+) GB of the 1.8 GB", said)
    assert "offload" in least[1] and "passes of 1 image" in least[1]
    assert float(least[2]) > 1.8
    assert "h200, h100, b200, a100_80, a100_40, l40s or rtx4090 would have room for it." in said


def test_a_choice_that_is_too_large_is_told_the_one_that_fits():
    said = error_of(*LARGE, "--gpu", "rtx4090", "--train.micro_batch", "512")
    fits = chosen(*LARGE, "--gpu", "rtx4090")
    assert f"{describe(fits)} fits it" in said


def test_the_reserve_is_left_free():
    gpu = hardware.GPUS["l40s"]
    assert room(gpu, 0.25) == pytest.approx(36e9)
    tight = chosen(*BASE, "--gpu", "l40s", "--hardware.reserve", "0.5")
    assert tight.memory.total <= 24e9 < chosen(*BASE, "--gpu", "l40s", "--hardware.reserve", "0.0").memory.total


# Scaling.


def test_it_doubles_up_to_the_number_asked_for():
    assert counts(1) == [1]
    assert counts(8) == [1, 2, 4, 8]
    assert counts(12) == [1, 2, 4, 8, 12]


def scaled(*argv: str):
    settings = planned(*argv)
    gpu, tokenizer = resolve_gpu(settings), size_of(settings.tokenizer)
    return sweep(settings, gpu, tokenizer, choose(settings, gpu, tokenizer, settings.gpus))


def test_an_endless_network_scales_without_loss():
    fast = ["--hardware.node_link_gb_s", "1e12", "--hardware.network_gb_s", "1e12", "--dispatch_us", "0"]
    for row in scaled(*BASE, "--gpus", "64", *fast):
        for one in (row.strong, row.weak):
            assert efficiency(one, alone(one)) == pytest.approx(1, abs=1e-6)


def test_a_network_that_sends_nothing_scales_not_at_all():
    rows = scaled(*BASE, "--gpus", "64", "--zero.stage", "1", "--hardware.network_gb_s", "1e-3")
    within, between = [row for row in rows if 1 < row.gpus <= 8], [row for row in rows if row.gpus > 8]
    assert all(efficiency(row.strong, alone(row.strong)) > 0.9 for row in within)
    for row in between:  # the time of a step is that of its traffic: 12 n bytes through 8 MB/s, less what is hidden
        assert row.strong.time.total == pytest.approx(12 * 91_965_776 * (1 - 1 / row.gpus) / 8e6, rel=0.01)


def test_the_batch_of_the_recipe_stays_or_grows_with_the_gpus():
    rows = scaled(*BASE, "--gpus", "16")
    assert {row.strong.global_batch for row in rows} == {2048}
    assert [row.weak.global_batch for row in rows] == [128, 256, 512, 1024, 2048]
    assert rows[-1].strong.pictures_per_s == rows[-1].weak.pictures_per_s


def test_a_number_of_gpus_that_does_not_divide_the_batch_is_left_out():
    rows = scaled("--preset", "digits", "--train.global_batch", "12", "--gpus", "6")
    assert [row.gpus for row in rows if row.strong is None] == []
    rows = scaled("--preset", "digits", "--train.global_batch", "6", "--gpus", "6")
    assert [row.gpus for row in rows if row.strong is None] == [4]


def test_the_picture_has_a_point_for_each_row_and_is_the_same_every_time():
    rows = scaled(*LARGE, "--gpus", "64", "--gpu", "l40s", "--hardware.network_gb_s", "0.1")
    svg = draw(rows, "a <title>")
    assert svg == draw(rows, "a <title>")
    assert re.findall(r'class="strong[^"]*" data-gpus="(\d+)"', svg) == [str(row.gpus) for row in rows]
    hollow = [int(gpus) for gpus in re.findall(r'class="strong bound" data-gpus="(\d+)"', svg)]
    waiting = [row.gpus for row in rows if row.strong.time.waits > 0.2 * row.strong.time.total]
    assert hollow == waiting and 0 < len(hollow) < len(rows)
    assert "a &lt;title&gt;" in svg


# Inputs.


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpu", "h20"], ["gpu = 'h20'", "known are h200", "custom"]),
        (["--gpu", "custom"], ["--hardware.memory_gb", "--hardware.watts"]),
        (["--gpus", "3"], ["train.global_batch = 2048", "3 ranks", "such as 2046"]),
        (["--gpus", "8", "--train.micro_batch", "48"], ["train.micro_batch = 48", "divisor of 256", "such as 32"]),
        (["--gpus", "0"], ["gpus = 0"]),
        (["--mfu", "1.5"], ["mfu = 1.5"]),
        (["--gpu.memory", "3"], ["no option --gpu.memory", "--help"]),
        (["--hardware.memory", "3"], ["did you mean --hardware.memory_gb?"]),
        (["--gpus", "many"], ["--gpus many cannot be read", "a whole number"]),
        (["--sweep", "scaling.png"], ["sweep = scaling.png", ".svg"]),
        (["--data.image_size", "100"], ["data.image_size = 100"]),
        (["--data.path", "/no/such/folder"], ["data.path = /no/such/folder is not a folder"]),
        (["--zero.offload", "--zero.stage", "0"], ["zero.offload"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_wrong_input_is_told_in_a_sentence(argv, words):
    said = error_of(*BASE, *argv)
    for word in words:
        assert word in said
    assert "\n" not in said


def test_every_option_of_a_run_changes_a_plan():
    assert run_steps(planned(*BASE, "--train.epochs", "300"), 1_281_167) == 300 * 625
    deeper = planned(*BASE, "--model.depth", "24").model
    assert parameter_count(deeper, 224, 8192) > parameter_count(planned(*BASE).model, 224, 8192)


def test_a_custom_deepspeed_file_decides_the_stage(tmp_path: Path):
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000000}}')
    one = chosen(*BASE, "--gpus", "8", "--zero.config", str(file))
    assert one.stage == 2
    assert one.memory.parts["buckets"] == 8e6


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reduce_bucket_size", '"auto"'),
        ("reduce_bucket_size", "true"),
        ("reduce_bucket_size", "-5"),
        ("reduce_bucket_size", "0.5"),
        ("reduce_bucket_size", "NaN"),
        ("stage3_prefetch_bucket_size", '"auto"'),
        ("offload_optimizer", '"cpu"'),
        ("offload_param", "[]"),
    ],
)
def test_a_custom_deepspeed_file_that_cannot_be_counted_with_is_told_in_a_sentence(tmp_path: Path, key, value):
    file = tmp_path / "mine.json"
    file.write_text(f'{{"zero_optimization": {{"stage": 3, "{key}": {value}}}}}')
    said = error_of(*BASE, "--gpus", "8", "--zero.config", str(file))
    assert f"zero_optimization.{key} in {file} is {value}; give" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("value", "offloads"), [("null", False), ('{"device": "none"}', False), ('{"device": "cpu"}', True)]
)
def test_a_custom_deepspeed_file_decides_offload(tmp_path: Path, value, offloads):
    file = tmp_path / "mine.json"
    file.write_text(f'{{"zero_optimization": {{"stage": 2, "reduce_bucket_size": 1e6, "offload_optimizer": {value}}}}}')
    assert chosen(*BASE, "--gpus", "8", "--zero.config", str(file)).offload is offloads

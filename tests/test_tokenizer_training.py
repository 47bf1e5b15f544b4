"""Training a tokenizer: its formulas, dead codes, figures, repeatability and the script."""

import json
import math
import runpy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fused_beit.engine.command_line import parse
from fused_beit.engine.config import TokenizerSettings
from fused_beit.engine.data.digits import Digits
from fused_beit.engine.errors import UserError
from fused_beit.engine.tokenizer import training
from fused_beit.engine.tokenizer.dvae import DiscreteVAE
from fused_beit.engine.tokenizer.files import identity, load_tokenizer
from fused_beit.engine.tokenizer.quality import CodeUse, measure, sheet
from fused_beit.engine.tokenizer.revival import revive

SMALL = TokenizerSettings(vocab_size=16, width=8, groups=3, blocks_per_group=1, train_steps=4, batch_size=8, lr=3e-3)


def settings(**changes):
    return SMALL.model_copy(update=changes)


def new_model(tokenizer=SMALL, output_channels=3, seed=0):
    torch.manual_seed(seed)
    sizes = (tokenizer.vocab_size, tokenizer.width, tokenizer.groups, tokenizer.blocks_per_group)
    return DiscreteVAE(*sizes, output_channels=output_channels)


def strokes(count, side=16, seed=0):
    """Pictures of one bright bar each, uint8 `[count, 3, side, side]`."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    for picture in pixels:
        at, lies = torch.randint(side - 3, (), generator=generator), torch.randint(2, (), generator=generator)
        (picture if lies else picture.transpose(1, 2))[:, at : at + 3] = 255
    return pixels


def batches(tokenizer):
    return [strokes(tokenizer.batch_size, seed=step) for step in range(tokenizer.train_steps)]


def fitted(tokenizer=SMALL, *, seed=0, **kwargs):
    model = new_model(tokenizer, 6 if tokenizer.reconstruction == "logit_laplace" else 3)
    training.fit(model, batches(tokenizer), tokenizer, seed=seed, **({"on_log": lambda row: None} | kwargs))
    return model.eval()


def same_weights(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# --- formulas ---


def test_soft_codes_are_distributions_and_sharpen_as_the_temperature_falls():
    logits = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    warm, cold = (training.gumbel_softmax(logits, t, torch.Generator().manual_seed(1)) for t in (1.0, 0.01))
    torch.testing.assert_close(warm.sum(1), torch.ones(2, 3, 3))
    assert torch.equal(warm.argmax(1), cold.argmax(1))
    assert cold.amax(1).mean() > warm.amax(1).mean()


def test_the_likeliest_soft_code_is_a_draw_from_the_softmax_of_the_logits():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = 20_000
    soft = training.gumbel_softmax(
        logits.view(1, 4, 1, 1).expand(draws, 4, 1, 1), 0.5, torch.Generator().manual_seed(0)
    )
    shares = F.one_hot(soft.argmax(1).flatten(), 4).double().mean(0)
    expected = logits.double().softmax(0)
    standard_error = (expected * (1 - expected) / draws).sqrt()
    assert ((shares - expected).abs() < 5 * standard_error).all()


def test_divergence_is_zero_for_even_codes_and_log_v_for_certain_ones():
    certain = torch.full((1, 8, 2, 2), -1e4)
    certain[:, 3] = 0
    assert training.divergence_from_uniform(torch.zeros(1, 8, 2, 2)) == pytest.approx(0, abs=1e-6)
    assert training.divergence_from_uniform(certain) == pytest.approx(math.log(8))


def test_logit_laplace_is_the_density_of_the_sigmoid_of_a_laplace_variable():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(2, 6, 4, 4, generator=generator, dtype=torch.float64)
    target = torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    laplace = torch.distributions.Laplace(output[:, :3], output[:, 3:].exp())
    density = torch.distributions.TransformedDistribution(laplace, torch.distributions.SigmoidTransform())
    torch.testing.assert_close(
        training.reconstruction_error(output, target, "logit_laplace"), -density.log_prob(target)
    )


def test_a_constant_colour_cannot_make_logit_laplace_fall_without_end():
    target = torch.full((1, 3, 2, 2), 0.1)
    output = torch.cat([torch.logit(target), torch.full_like(target, -50)], 1)
    assert training.reconstruction_error(output, target, "logit_laplace").min() > -10


@pytest.mark.parametrize("kind, expected", [("l1", 0.5), ("l2", 0.25)])
def test_errors_are_in_units_of_pixels_from_zero_to_one(kind, expected):
    output = torch.full((1, 3, 2, 2), math.log(0.9 / 0.1))  # white
    target = torch.full((1, 3, 2, 2), 0.5)  # middle grey
    assert training.reconstruction_error(output, target, kind).mean() == pytest.approx(expected)


def test_the_learning_rate_rises_then_falls_to_a_hundredth():
    tokenizer = settings(train_steps=100, lr=1.0)
    rates = [training.learning_rate(tokenizer, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates.index(max(rates)) == 4
    assert rates[-1] == pytest.approx(0.01)


def test_the_temperature_goes_from_its_first_to_its_last_value():
    rows = []
    fitted(settings(temperature=(0.9, 0.2)), on_log=rows.append, log_every=1)
    assert [rows[0].temperature, rows[-1].temperature] == pytest.approx([0.9, 0.2])
    assert rows[0].temperature > rows[1].temperature > rows[2].temperature > rows[3].temperature


# --- repeatability ---


@pytest.mark.parametrize("reconstruction", ["l1", "l2", "logit_laplace"])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(reconstruction):
    tokenizer = settings(reconstruction=reconstruction, train_steps=27)  # past the first revival
    models = [new_model(tokenizer, 6 if reconstruction == "logit_laplace" else 3) for _ in range(2)]
    for global_seed, model in enumerate(models):
        torch.manual_seed(global_seed)  # must not matter
        training.fit(model, batches(tokenizer), tokenizer, seed=0, on_log=lambda row: None)
    assert same_weights(*models)


def test_another_seed_gives_other_noise():
    assert not same_weights(fitted(), fitted(seed=1))


def test_train_makes_its_first_weights_and_views_from_the_seed(tmp_path):
    def trained(seed):
        torch.manual_seed(seed + 100)
        return training.train(small_run(tmp_path, seed), Digits("val"), torch.device("cpu"), on_log=lambda row: None)

    assert same_weights(trained(0), trained(0))
    assert not same_weights(trained(0), trained(1))


# --- learning ---


def test_training_rebuilds_pictures_better_than_the_mean_picture_does():
    model = fitted(settings(train_steps=80, lr=1e-2, kl_weight=1e-3))
    held_out = strokes(64, seed=1000)
    mean_picture = held_out.float().mean(0) / 255
    mse_of_mean = (held_out / 255 - mean_picture).square().mean()
    assert measure(model, [held_out]).mse < mse_of_mean


def test_reviving_dead_codes_puts_more_codes_to_use(monkeypatch):
    tokenizer = settings(vocab_size=64, train_steps=120)
    with_revival = measure(fitted(tokenizer), [strokes(64, seed=1000)])
    monkeypatch.setattr(training, "REVIVE_UNTIL", 0.0)
    without = measure(fitted(tokenizer), [strokes(64, seed=1000)])
    assert with_revival.codes_used > without.codes_used


def test_a_loss_that_is_not_finite_stops_with_advice():
    with pytest.raises(UserError, match=r"lower tokenizer\.lr \(now 1e\+30\)"):
        fitted(settings(lr=1e30))


# --- revival ---


@pytest.fixture
def one_dead_code():
    """A model, its optimizer after a step, and a batch in which code 5 was never used."""
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    logits = model.encoder(model.prepare(strokes(8)))
    model.decoder(logits.softmax(1)).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        model.encoder.output.bias[5] = -100
        hidden = model.encoder.features(model.prepare(strokes(8))).permute(0, 2, 3, 1).flatten(0, 2)
    counts = torch.full((16,), 100)
    counts[5] = 0
    error = torch.zeros(len(hidden))
    error[7] = 1.0  # the one cell that is rebuilt badly
    ids = (hidden @ model.encoder.output.weight.detach().flatten(1).T + model.encoder.output.bias.detach()).argmax(1)
    return model, optimizer, counts, hidden, ids, error


def revive_it(model, optimizer, counts, hidden, ids, error):
    revive(
        model,
        optimizer,
        counts_V=counts,
        hidden_RD=hidden,
        ids_R=ids,
        error_R=error,
        generator=torch.Generator().manual_seed(0),
    )
    return hidden @ model.encoder.output.weight.detach().flatten(1).T + model.encoder.output.bias.detach()


def test_a_revived_code_wins_its_cell_and_leaves_its_parents_mean(one_dead_code):
    model, _, _, hidden, ids, _ = one_dead_code
    parent = int(ids[7])
    scores = revive_it(*one_dead_code)
    assert scores[7, 5] - scores[7, parent] == pytest.approx(1.0, rel=1e-3)
    mean = hidden[ids == parent].mean(0)
    last = model.encoder.output
    at_mean = mean @ last.weight.detach().flatten(1).T + last.bias.detach()
    assert at_mean[parent] - at_mean[5] == pytest.approx(1.0, rel=1e-3)


def test_a_code_revived_hard_by_its_parents_mean_wins_no_cells_far_away(one_dead_code):
    model, optimizer, counts, hidden, ids, error = one_dead_code
    theirs = ids == ids[7]
    others = theirs & (torch.arange(len(ids)) != 7)
    hidden[7] = hidden[others].mean(0) + 1e-3  # so is the cell next to the mean of all its parent's cells
    scores = revive_it(model, optimizer, counts, hidden, ids, error)
    assert scores[7, 5] > scores[7, ids[7]]
    assert not (scores.argmax(1) == 5)[~theirs].any()


def test_a_revived_code_starts_with_its_parents_decoding(one_dead_code):
    model, _, _, _, ids, _ = one_dead_code
    revive_it(*one_dead_code)
    first = model.decoder.input.weight
    assert torch.equal(first[:, 5], first[:, int(ids[7])])


def test_revival_leaves_living_codes_and_their_statistics_alone(one_dead_code):
    model, optimizer, counts, _, _, _ = one_dead_code
    living = counts > 0
    last, first = model.encoder.output, model.decoder.input
    before = [last.weight[living].clone(), last.bias[living].clone(), first.weight[:, living].clone()]
    moment = optimizer.state[last.weight]["exp_avg"][living].clone()
    revive_it(*one_dead_code)
    after = [last.weight[living], last.bias[living], first.weight[:, living]]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert torch.equal(optimizer.state[last.weight]["exp_avg"][living], moment)


# --- figures ---


def test_code_use_counts_entropy_and_shares():
    use = CodeUse(4)
    use.add(torch.tensor([[0, 0], [1, 3]]))
    assert use.used() == 3
    assert use.shares().tolist() == [0.5, 0.25, 0.0, 0.25]
    assert use.entropy() == pytest.approx(1.5 * math.log(2))
    use.clear()
    assert use.used() == 0


def test_measuring_does_not_depend_on_the_batches():
    model, pixels = fitted(), strokes(10)
    whole, parts = measure(model, [pixels]), measure(model, pixels.split(4))
    assert whole.pictures == parts.pictures == 10
    assert whole.mse == pytest.approx(parts.mse)
    assert (whole.entropy, whole.codes_used) == (parts.entropy, parts.codes_used)


def test_the_sheet_has_each_row_above_its_reconstructions():
    model, pixels = fitted(), strokes(3)
    picture = sheet(model, pixels, columns=2)
    rebuilt = model.decode(model.encode(pixels).view(3, 4, 4)).mul(255).round().byte()
    assert picture.shape == (4 * 16, 2 * 16, 3)
    assert np.array_equal(picture[:16, 16:], pixels[1].permute(1, 2, 0))
    assert np.array_equal(picture[16:32, 16:], rebuilt[1].permute(1, 2, 0))
    assert np.array_equal(picture[48:, :16], rebuilt[2].permute(1, 2, 0))
    assert not picture[32:, 16:].any()


def test_log_rows_cover_all_steps():
    rows = []
    fitted(settings(train_steps=23), on_log=rows.append, log_every=10)
    assert [row.step for row in rows] == [10, 20, 23]
    assert all(1 <= row.codes_used <= 16 and 1 <= row.perplexity <= row.codes_used for row in rows)


# --- pictures ---


class CountingDigits(Digits):
    loads = 0

    def load(self, index, needed=None):
        self.loads += 1
        return super().load(index, needed)


def small_run(output_dir, seed=0, **changes):
    return parse(small_options(output_dir, **{"train.seed": seed} | changes), description="")


def small_options(output_dir, **changes):
    values = {"vocab_size": 16, "width": 8, "train_steps": 3, "batch_size": 16}
    options = {f"tokenizer.{name}": value for name, value in values.items()}
    options |= {"data.workers": 0, "output_dir": output_dir} | changes
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_small_pictures_are_cut_twice_and_their_views_used_again(tmp_path):
    source = CountingDigits("val")
    views = list(training.token_views(source, small_run(tmp_path, **{"tokenizer.train_steps": 80})))
    an_epoch = len(source) // 16
    assert len(views) == 80
    assert source.loads == 2 * an_epoch * 16
    assert torch.equal(views[0], views[2 * an_epoch])
    assert not torch.equal(views[0], views[an_epoch])


def test_views_that_do_not_fit_are_cut_anew_in_every_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "KEPT_BYTES", 1000)
    source = CountingDigits("val")
    assert len(list(training.token_views(source, small_run(tmp_path, **{"tokenizer.train_steps": 40})))) == 40
    assert source.loads == 40 * 16


def test_a_batch_larger_than_the_pictures_is_refused(tmp_path):
    run = small_run(tmp_path, **{"tokenizer.batch_size": 400})
    with pytest.raises(UserError, match=r"tokenizer\.batch_size = 400 is more than the 297 pictures"):
        training.train(run, Digits("val"), torch.device("cpu"))


# --- the script ---


@pytest.fixture(scope="module")
def script_main(root):
    return runpy.run_path(str(root / "engine" / "train_tokenizer.py"))["main"]


def test_the_script_leaves_a_tokenizer_its_metrics_and_a_sheet(script_main, tmp_path, capsys):
    script_main(small_options(tmp_path))
    loaded = load_tokenizer(tmp_path / "tokenizer.safetensors")
    rows = [json.loads(line) for line in (tmp_path / "tokenizer_metrics.jsonl").read_text().splitlines()]
    said = capsys.readouterr().out
    assert (loaded.vocab_size, loaded.width) == (16, 8)
    assert rows[-1]["step"] == 3
    with Image.open(tmp_path / "tokenizer_reconstructions.png") as picture:
        assert picture.size == (8 * 32, 2 * 3 * 32)
    assert identity(loaded) in said
    assert "on 297 held-out pictures" in said
    assert f"--tokenizer.path {tmp_path / 'tokenizer.safetensors'}" in said


def test_the_script_takes_pictures_with_fewer_patches_than_the_preset_masks(script_main, tmp_path):
    script_main([*small_options(tmp_path), "--data.image_size", "16"])
    assert load_tokenizer(tmp_path / "tokenizer.safetensors").vocab_size == 16


def test_the_script_replaces_a_tokenizer_only_when_told_to(script_main, tmp_path):
    file = tmp_path / "tokenizer.safetensors"
    file.write_text("an earlier one")
    with pytest.raises(UserError, match="overwrite"):
        script_main(small_options(tmp_path))
    assert file.read_text() == "an earlier one"
    script_main([*small_options(tmp_path), "--overwrite"])
    assert load_tokenizer(file).vocab_size == 16


@pytest.mark.parametrize("given", ["--optim.lr=1", "--model.width 8", "--train.max-steps 4", "--resume auto"])
def test_the_script_refuses_options_that_would_have_no_effect(script_main, tmp_path, given):
    with pytest.raises(UserError, match="has no effect on a tokenizer"):
        script_main([*small_options(tmp_path), *given.split()])

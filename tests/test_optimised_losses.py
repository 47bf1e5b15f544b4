"""200 steps with all settings that make a step faster or smaller stay as near to the plain one as rounding noise does.

What a run has anyway, such as the optimizer that clips in the same pass, is in both. Every operator may round its last
bit otherwise, and training makes such differences grow. How far they may take the losses is measured: the reference is
run again with every weight moved by up to one unit in its last place after each step, twice, with noise of two seeds.
"""

import numpy as np
import pytest
import torch
from small_run import losses, make_tokenizer, small_settings

from fused_beit.engine.training import zero
from fused_beit.engine.training.pretraining import pretrain

pytestmark = [
    pytest.mark.slow,
    # torch looks at every tensor that a compiled block is given.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

STEPS = 200
MODEL = {"model__width": 64, "model__depth": 4, "model__num_heads": 4, "train__global_batch": 16}
OPTIMISED = [
    {"train__impl": "auto", "train__compile": True},
    {"train__impl": "auto", "train__compile": True, "train__recompute": "mlp"},
    {"train__impl": "auto", "train__compile": True, "train__recompute": "block"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Losses of a run of `STEPS` steps."""
    root = tmp_path_factory.mktemp("runs")
    tokenizer = make_tokenizer(root / "tokenizer.safetensors")

    def run(name, **changes):
        pretrain(small_settings(root / name, tokenizer, train__max_steps=STEPS, **MODEL, **changes))
        return np.array(losses(root / name))

    return run


@pytest.fixture(scope="module")
def reference(run):
    return run("reference", train__impl="reference")


@pytest.fixture(scope="module")
def noise(run, reference):
    """The largest difference up to each step that noise of either seed makes."""

    def differences(seed):
        generator = torch.Generator().manual_seed(seed)
        step = zero.ZeroEngine.step

        @torch.no_grad()
        def noisy_step(engine):
            step(engine)
            for weight in engine.module.parameters():
                weight *= 1 + torch.finfo(weight.dtype).eps * (2 * torch.rand(weight.shape, generator=generator) - 1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zero.ZeroEngine, "step", noisy_step)
            return np.abs(run(f"noise of seed {seed}", train__impl="reference") - reference)

    return np.maximum.accumulate(np.maximum(differences(1), differences(2)))


@pytest.mark.parametrize("how", OPTIMISED, ids=str)
def test_the_losses_of_the_optimised_step_lie_within_the_noise(run, reference, noise, how):
    difference = np.maximum.accumulate(np.abs(run(str(how), **how) - reference))
    print(f"largest difference after 10, 50, 200 steps: {difference[[9, 49, -1]]}, of noise {noise[[9, 49, -1]]}")
    assert 0 < noise[-1] < 0.01 * reference[0]
    assert (difference <= noise + 4 * np.finfo(np.float32).eps * reference[0]).all()


def test_a_step_that_computes_something_else_leaves_the_noise(run, reference, noise):
    """By a ten thousandth of the learning rate: so little shows."""
    difference = np.abs(run("other", train__impl="reference", optim__lr=2e-3 * (1 + 1e-4)) - reference)
    assert difference.max() > noise[-1]

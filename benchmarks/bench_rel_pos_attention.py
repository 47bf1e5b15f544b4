"""Attention with the relative position bias: ours, what people would use instead, and bounds, in each direction."""

import pytest
import torch

from .attention import DIRECTIONS, ON_CPU, ON_GPU, SMOKE
from .attention_providers import PROVIDERS
from .attention_rows import Checked, check_providers, time_providers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = ON_GPU if DEVICE.type == "cuda" else ON_CPU
    cases = SMOKE if metafunc.config.getoption("--sizes") == "smoke" else full
    metafunc.parametrize("checked", cases, ids=[case.name for case in cases], indirect=True, scope="module")


@pytest.fixture(scope="module")
def checked(request: pytest.FixtureRequest) -> Checked:
    """A case whose providers were all built and checked, once for all directions."""
    return check_providers(request.param, PROVIDERS, DEVICE)


@pytest.mark.parametrize("direction", DIRECTIONS, ids=[direction.replace(" ", "_") for direction in DIRECTIONS])
def test_rel_pos_attention(checked, drive, keep, limits, num_rounds, direction):
    assert not checked.failed, "; ".join(f"{name}: {why}" for name, why in checked.failed.items())
    keep(time_providers(checked, direction, rounds=num_rounds(30), limits=limits, drive=drive))

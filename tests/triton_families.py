"""For the tests of the Triton attention: small tiles for each family of kernels, so that few tokens make many tiles."""

import os

import numpy as np
import pytest

from fused_beit.kernels.rel_pos_attention.plan import Plan, Tile

NEEDS_INTERPRETER = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: TRITON_INTERPRET=1"
)

# No two sizes of a kernel are equal, so that one taken for the other shows.
POINTER = Plan("interpreter", False, Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1))
TMA = POINTER._replace(arch="sm_90", tma=True)
FAMILIES = {"pointer": POINTER, "tma": TMA}

_LARGE = POINTER._replace(forward=Tile(64, 32, 4, 1), backward_q=Tile(64, 64, 4, 1), backward_kv=Tile(32, 64, 4, 1))
LARGE_FAMILIES = {"pointer": _LARGE, "tma": _LARGE._replace(arch="sm_90", tma=True)}
"""For pictures of hundreds of tokens, of which the interpreter runs some ten tiles a second."""


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Round a matrix product of the interpreter once, as an exact one.

    It multiplies with numpy, whose rounding in fp32 depends on the processor, the size of the tile, and on which factor
    comes first: the backward, where the keys come first, would see other scores than the forward. On a GPU it does not.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def create_dot(self, a, b, accumulator, *options):
        total = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + accumulator.data
        return interpreter.TensorHandle(total.astype(accumulator.data.dtype), accumulator.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)

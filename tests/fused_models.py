"""How the tests of `fuse` judge a model: by the one rule, with the model itself in float64 as what is exact."""

import copy

import torch
from torch import nn

from fused_beit.kernels import fuse
from fused_beit.kernels.testing import assert_no_worse_than_eager


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter random, in evaluation: tables and biases start at zero and would hide what is done with them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "table" in name:
                parameter.copy_(values)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * values)
            else:
                parameter.copy_(values * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3))
    return model.eval()


class LowRank(nn.Module):
    """As LoRA is put around a linear layer: no attribute of the layer is passed on."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.down(x))


def assert_dead_rows_are_those_of_the_model(attention: nn.Module, mask_name: str, impl: str) -> None:
    """A mask of each head's own, [1, 2, 10, 10], that hides all keys of one query and one key of all."""
    attention = attention.double()
    mask = torch.randn(1, 2, 10, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mask[:, 0, 3] = -torch.inf
    mask[:, :, :, 7] = -torch.inf
    width = next(attention.parameters()).shape[-1]
    x = torch.randn(2, 10, width, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    expected = outputs_and_grads(attention, {NAMES_OF_X[mask_name]: x, mask_name: mask})
    assert all(found.isfinite().all() for found in expected.values())
    fuse(attention, impl=impl)
    actual = outputs_and_grads(attention, {NAMES_OF_X[mask_name]: x, mask_name: mask})
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


NAMES_OF_X = {"attn_mask": "x", "attention_mask": "hidden_states"}


def pictures(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def output_of(model: nn.Module, inputs: dict) -> torch.Tensor:
    """What comes first: the tensor itself for timm; for transformers the logits, hidden states or all feature maps."""
    found = model(**inputs)
    first = found if isinstance(found, torch.Tensor) else found[0]
    return first if isinstance(first, torch.Tensor) else torch.cat([each.flatten() for each in first])


def outputs_and_grads(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """The output and the gradient of every parameter that is trained, for one fixed random cotangent."""
    output = output_of(model, inputs)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(output, list(wanted.values()), cotangent.to(output.dtype), allow_unused=True)
    found = {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}
    return found | {"output": output.detach()}


def assert_fused_is_as_exact(model: nn.Module, inputs: dict, impl: str) -> None:
    """Fuse the model, and hold its output and its gradient to the rule of `fused_beit.kernels.testing`.

    The gradient is judged as one vector of all parameters: the largest of two or three rounding errors is a matter of
    luck where a parameter has only a few numbers.
    """
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    exact = outputs_and_grads(copy.deepcopy(model).double(), doubled)
    eager = outputs_and_grads(model, inputs)
    fuse(model, impl=impl)
    actual = outputs_and_grads(model, inputs)
    assert actual.keys() == exact.keys()
    for name in exact:
        # What is added to every key shifts all scores of a query alike, and softmax does not see it.
        assert exact[name].abs().max() > 1e-3 or "k_norm.bias" in name, f"{name} says nothing"
    assert_no_worse_than_eager("output", *(found.pop("output") for found in (actual, eager, exact)))
    gradients = (torch.cat([grad.flatten() for grad in found.values()]) for found in (actual, eager, exact))
    assert_no_worse_than_eager("gradient", *gradients)

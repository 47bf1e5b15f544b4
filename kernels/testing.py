"""Inputs for tests and benchmarks of the operators, and the one rule by which a kernel is judged.

The rule: against a float64 reference, a kernel's error is at most twice eager torch's own error in the same dtype, plus
one rounding band. The rule has no tolerance to tune.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor | None]
"""Keyword arguments of an operator."""


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rel_pos_attention_inputs(
    batch: int,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """qkv [B,N,3,H,D] from a unit normal and bias [H,N,N] of the same size as the scores."""
    generator = _generator(seed)
    qkv = torch.randn(batch, num_tokens, 3, num_heads, head_dim, generator=generator)
    table = torch.randn(num_heads, num_tokens, num_tokens, generator=generator)
    return {"qkv": qkv.to(device, dtype), "bias": table.to(device, dtype) if bias else None}


def masked_positions(
    batch: int,
    num_patches: int,
    num_masked: int,
    *,
    num_padding: int = 0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """int64 [B, num_masked + num_padding]: different patches of each picture in random order, then slots of -1."""
    order = torch.rand(batch, num_patches, generator=_generator(seed)).argsort(dim=1)
    padding = torch.full((batch, num_padding), -1)
    return torch.cat([order[:, :num_masked], padding], dim=1).to(device)


def embed_tokens_inputs(
    batch: int,
    num_patches: int,
    width: int,
    num_masked: int,
    *,
    num_padding: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """patches [B,P,D], mask_token [D], cls_token [D], pos_embed [P+1,D], masked_positions int64 [B,M]."""
    generator = _generator(seed)
    floats = {
        "patches": torch.randn(batch, num_patches, width, generator=generator),
        "mask_token": torch.randn(width, generator=generator),
        "cls_token": torch.randn(width, generator=generator),
        "pos_embed": torch.randn(num_patches + 1, width, generator=generator),
    }
    positions = masked_positions(batch, num_patches, num_masked, num_padding=num_padding, device=device, seed=seed)
    inputs: Inputs = {name: tensor.to(device, dtype) for name, tensor in floats.items()}
    return inputs | {"masked_positions": positions}


def keep_visible_inputs(
    batch: int,
    num_patches: int,
    width: int,
    num_visible: int,
    *,
    num_padding: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """patches [B,P,D], cls_token [D], pos_embed [P+1,D], visible_positions int64 [B,V]."""
    inputs = embed_tokens_inputs(
        batch, num_patches, width, num_visible, num_padding=num_padding, dtype=dtype, device=device, seed=seed
    )
    names = ("patches", "cls_token", "pos_embed")
    return {name: inputs[name] for name in names} | {"visible_positions": inputs["masked_positions"]}


def restore_tokens_inputs(
    batch: int,
    num_patches: int,
    width: int,
    num_visible: int,
    *,
    num_padding: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """x [B,V+1,D], mask_token [D], pos_embed [P+1,D], visible_positions int64 [B,V]."""
    generator = _generator(seed)
    floats = {
        "x": torch.randn(batch, num_visible + num_padding + 1, width, generator=generator),
        "mask_token": torch.randn(width, generator=generator),
        "pos_embed": torch.randn(num_patches + 1, width, generator=generator),
    }
    positions = masked_positions(batch, num_patches, num_visible, num_padding=num_padding, device=device, seed=seed)
    inputs: Inputs = {name: tensor.to(device, dtype) for name, tensor in floats.items()}
    return inputs | {"visible_positions": positions}


def gather_masked_inputs(
    batch: int,
    num_tokens: int,
    width: int,
    num_masked: int,
    *,
    num_padding: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """x [B,N,D] with a CLS token, masked_positions int64 [B,M], weight [D] about 1, bias [D]."""
    generator = _generator(seed)
    floats = {
        "x": torch.randn(batch, num_tokens, width, generator=generator),
        "weight": 1 + 0.1 * torch.randn(width, generator=generator),
        "bias": 0.1 * torch.randn(width, generator=generator),
    }
    positions = masked_positions(batch, num_tokens - 1, num_masked, num_padding=num_padding, device=device, seed=seed)
    cast = {name: tensor.to(device, dtype) for name, tensor in floats.items()}
    return {"x": cast["x"], "masked_positions": positions, "weight": cast["weight"], "bias": cast["bias"]}


def residual_norm_inputs(
    batch: int,
    num_tokens: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """x, y [B,N,D], gamma [D] about 0.1, keep [B] with every other picture dropped, weight [D] about 1, bias [D]."""
    generator = _generator(seed)
    floats = {
        "x": torch.randn(batch, num_tokens, width, generator=generator),
        "y": torch.randn(batch, num_tokens, width, generator=generator),
        "gamma": 0.1 + 0.01 * torch.randn(width, generator=generator),
        "keep": 2.0 * (torch.arange(batch) % 2 == 0),
        "weight": 1 + 0.1 * torch.randn(width, generator=generator),
        "bias": 0.1 * torch.randn(width, generator=generator),
    }
    return {name: tensor.to(device, dtype) for name, tensor in floats.items()}


def token_loss_inputs(
    num_rows: int,
    width: int,
    vocab_size: int,
    *,
    num_ignored: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """hidden [R,D], weight [V,D] for logits near unit size, bias [V], targets int64 [R]; the last rows ignored."""
    generator = _generator(seed)
    floats = {
        "hidden": torch.randn(num_rows, width, generator=generator),
        "weight": torch.randn(vocab_size, width, generator=generator) * width**-0.5,
        "bias": 0.1 * torch.randn(vocab_size, generator=generator),
    }
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    targets[num_rows - num_ignored :] = -100
    return {name: tensor.to(device, dtype) for name, tensor in floats.items()} | {"targets": targets.to(device)}


def nearest_code_inputs(
    num_rows: int,
    width: int,
    num_codes: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """x [R,D], codes [K,D], bias [K]."""
    generator = _generator(seed)
    floats = {
        "x": torch.randn(num_rows, width, generator=generator),
        "codes": torch.randn(num_codes, width, generator=generator),
        "bias": torch.randn(num_codes, generator=generator),
    }
    return {name: tensor.to(device, dtype) for name, tensor in floats.items()}


def assert_no_worse_than_eager(name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Fail unless max|actual - exact| <= 2 max|eager - exact| + eps max|exact|.

    actual: what the kernel gave; eager: what plain torch gives in the same dtype; exact: the float64 reference.
    eps is that of the dtype of `actual`, so that the last term is one rounding of the largest element.
    The message prints both errors, the limit and the worst element.
    """
    if actual.shape != exact.shape or actual.dtype != eager.dtype:
        raise AssertionError(
            f"{name}: expected shape {list(exact.shape)} and {eager.dtype}, got {list(actual.shape)} and {actual.dtype}"
        )
    if exact.numel() == 0:
        return
    exact = exact.double()
    error = (actual.double() - exact).abs()
    eager_error = (eager.double() - exact).abs().max().item()
    limit = 2 * eager_error + torch.finfo(actual.dtype).eps * exact.abs().max().item()
    # A NaN is larger than any limit, and argmax picks the first one.
    worst = int(error.argmax())
    if not error.flatten()[worst].item() <= limit:
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape))
        raise AssertionError(
            f"{name}: error {error.flatten()[worst].item():.3e} exceeds {limit:.3e} (eager torch's error in "
            f"{actual.dtype} is {eager_error:.3e}); worst at {where}: got {actual.flatten()[worst].item():.8g}, "
            f"exact {exact.flatten()[worst].item():.8g}"
        )


def outputs_and_grads(function: Callable[..., Any], inputs: Inputs, *, seed: int = 0) -> dict[str, Tensor]:
    """Outputs and input gradients of function(**inputs) for one fixed random cotangent of each output.

    Keys are "output 0", ... and "grad <input>"; inputs that are not floating point, or do not matter, have no gradient.
    """
    leaves = {
        name: tensor.detach().clone().requires_grad_() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    result = function(**leaves)
    outputs: Sequence[Tensor] = result if isinstance(result, tuple) else (result,)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    generator = _generator(seed)
    # The cotangents are drawn for every output, in fp32, so that they are the same numbers in every dtype.
    cotangents = [torch.randn(output.shape, generator=generator) for output in outputs]
    pairs = [(o, c.to(o.device, o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if pairs:
        wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
        grads = torch.autograd.grad(
            [output for output, _ in pairs],
            list(wanted.values()),
            [cotangent for _, cotangent in pairs],
            allow_unused=True,
        )
        found |= {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}
    return found


def assert_parity(
    function: Callable[..., Any], reference: Callable[..., Any], inputs: Inputs, *, seed: int = 0
) -> None:
    """Hold every output and gradient of `function` to the rule of this module.

    inputs: keyword arguments of both functions, in the dtype under test; the float64 run starts from the same numbers.
    """
    exact_inputs = {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    actual = outputs_and_grads(function, inputs, seed=seed)
    eager = outputs_and_grads(reference, inputs, seed=seed)
    exact = outputs_and_grads(reference, exact_inputs, seed=seed)
    if actual.keys() != exact.keys():
        raise AssertionError(f"expected {sorted(exact)}, got {sorted(actual)}")
    for name in exact:
        assert_no_worse_than_eager(name, actual[name], eager[name], exact[name])

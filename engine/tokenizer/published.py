"""DALL-E's published tokenizer: the names and shapes of its state dicts, read without running anything in the file.

The files as published are pickled modules: to open one is to run code from it, so they are refused here. A state dict
saved from them once (`.safetensors`, or `.pt`, `.pth`, `.bin` by `torch.save`) is data alone.

    theirs                                  ours, below `encoder.` or `decoder.`
    blocks.input.{w,b}                      input.{weight,bias}
    blocks.group_1.block_1.id_path.{w,b}    groups.0.0.id_path.{weight,bias}      (where the width changes)
    blocks.group_1.block_1.res_path.conv_1  groups.0.0.convs.0
    blocks.output.conv.{w,b}                output.{weight,bias}
"""

import pickle
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError
from .dvae import DiscreteVAE

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".pkl")

BLOCK = re.compile(r"blocks\.group_(\d+)\.block_(\d+)\.")


def load_published(path: Path) -> DiscreteVAE:
    """DALL-E's tokenizer from an encoder's file, or from a folder with `encoder.*` and perhaps `decoder.*`.

    Sizes are read off the shapes.

    Raises:
        UserError: where a file is missing, damaged, pickled code, or of another layout.
    """
    encoder_file, decoder_file = find_files(path)
    encoder = read_state(encoder_file)
    sizes = encoder_sizes(encoder, encoder_file)
    parts = [("encoder", encoder, encoder_file)]
    if decoder_file is not None:
        decoder = read_state(decoder_file)
        parts.append(("decoder", decoder, decoder_file))
        sizes["output_channels"] = output_channels(decoder, decoder_file)
    with torch.device("meta"):
        model = DiscreteVAE(**sizes)
    for prefix, state, file in parts:
        part = model.get_submodule(prefix)
        expected = {published_name(name): (name, value.shape) for name, value in part.state_dict().items()}
        refuse_other_names(set(state), set(expected), file)
        for name, (_, shape) in expected.items():
            if state[name].shape != shape:
                raise UserError(
                    f"{file} is not DALL-E's {prefix}: {name} has shape {list(state[name].shape)}, "
                    f"and {list(shape)} was expected beside the other weights; give the published file's weights."
                )
            if not state[name].isfinite().all():
                raise UserError(f"{file} is damaged: {name} holds values that are not finite; fetch the file again.")
        part.load_state_dict({ours: state[name].float() for name, (ours, _) in expected.items()}, assign=True)
    return model


def find_files(path: Path) -> tuple[Path, Path | None]:
    """The encoder's file and, in a folder, the decoder's if there is one."""
    if not path.is_dir():
        return path, None
    found = {part: [path / f"{part}{suffix}" for suffix in SUFFIXES] for part in ("encoder", "decoder")}
    present = {part: [file for file in files if file.is_file()] for part, files in found.items()}
    if not present["encoder"]:
        raise UserError(
            f"{path} holds no tokenizer: a tokenizer.safetensors, or DALL-E's encoder as a state dict named "
            f"encoder.safetensors or encoder.pt, was expected in it."
        )
    return present["encoder"][0], next(iter(present["decoder"]), None)


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by name; no code in the file is run."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        refuse_what_torch_never_wrote(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle protocol it may not know: what follows says more
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"the tokenizer {file} does not exist; give an existing file.") from None
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error):
            raise UserError(damaged(file)) from None
        raise UserError(
            f"{file} is a pickled module, which could run any code when opened, so it was not opened; where the dall_e "
            f"package is installed, convert it once: torch.save(torch.load({file.name!r}, weights_only=False)"
            f".state_dict(), {file.stem + '.pt'!r}), and give the new file."
        ) from None
    except (SafetensorError, RuntimeError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError):
        raise UserError(damaged(file)) from None
    except OSError as error:
        raise UserError(f"the tokenizer {file} cannot be read ({error.strerror}).") from None
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{file} holds no state dict (names and tensors); save module.state_dict() and give that file.")
    return {str(name): value for name, value in state.items()}


def refuse_what_torch_never_wrote(file: Path) -> None:
    """Raise `UserError` for a file that is neither a zip archive nor a pickle, such as a text; an empty one passes."""
    with file.open("rb") as opened:
        beginning = opened.read(16)
    if beginning and not beginning.startswith((b"PK", b"\x80")):
        raise UserError(
            f"{file} is no file of torch.save, which is a zip archive or a pickle: it begins with {beginning!r}; give "
            f"DALL-E's encoder as a state dict, or the tokenizer.safetensors that train_tokenizer.py or a pre-training "
            f"left."
        )


def damaged(file: Path) -> str:
    return f"{file} is damaged or no file of weights; fetch or convert it again."


def encoder_sizes(state: dict[str, Tensor], file: Path) -> dict[str, int]:
    """Constructor arguments of a `DiscreteVAE` without decoder."""
    first, last = state.get("blocks.input.w"), state.get("blocks.output.conv.w")
    blocks = {(int(match[1]), int(match[2])) for name in state if (match := BLOCK.match(name))}
    if first is None or last is None or not blocks or first.ndim != 4 or last.ndim != 4:
        raise UserError(
            f"{file} is not DALL-E's encoder: names such as blocks.input.w and blocks.output.conv.w were expected"
            f"{', and it begins with ' + min(state) if state else ''}; give that encoder's state dict, or "
            f"the tokenizer.safetensors that train_tokenizer.py or a pre-training left."
        )
    if first.shape[1:] != (3, 7, 7):
        raise UserError(
            f"{file} is not DALL-E's encoder: blocks.input.w has shape {list(first.shape)}, not [n, 3, 7, 7]"
            f"{', as the decoder has' if first.shape[2:] == (1, 1) else ''}; give the encoder's state dict."
        )
    groups, num_blocks = (len({block[axis] for block in blocks}) for axis in (0, 1))
    width = first.shape[0]
    if width < 4 or width % 4:
        raise UserError(f"{file} is not DALL-E's encoder: its first layer has {width} channels, no multiple of 4.")
    return {
        "vocab_size": last.shape[0],
        "width": width,
        "groups": groups,
        "blocks_per_group": num_blocks,
        "output_channels": 0,
    }


def output_channels(state: dict[str, Tensor], file: Path) -> int:
    """Channels of a decoder's pixels."""
    last = state.get("blocks.output.conv.w")
    if last is None or last.ndim != 4 or last.shape[0] not in (3, 6):
        raise UserError(f"{file} is not DALL-E's decoder: a blocks.output.conv.w of 3 or 6 channels was expected.")
    return int(last.shape[0])


def refuse_other_names(given: set[str], expected: set[str], file: Path) -> None:
    missing, unknown = sorted(expected - given), sorted(given - expected)
    if missing or unknown:
        found = [f"{names[0]} is {word}" for names, word in ((missing, "missing"), (unknown, "unknown")) if names]
        raise UserError(f"{file} is not of DALL-E's layout: {' and '.join(found)}; give the published file's weights.")


def published_name(name: str) -> str:
    """Our name of a weight, below `encoder.` or `decoder.`, to DALL-E's."""
    path, _, kind = name.rpartition(".")
    words = path.split(".")
    if words[0] == "groups":
        words[:3] = [f"group_{int(words[1]) + 1}", f"block_{int(words[2]) + 1}"]
        if words[2] == "convs":
            words[2:] = ["res_path", f"conv_{int(words[3]) + 1}"]
    elif words[0] == "output":
        words.append("conv")
    return ".".join(["blocks", *words, kind[0]])

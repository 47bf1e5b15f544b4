"""The models that are trained: plain torch modules that call the operators by name."""

from .drop_path import keep_scales
from .encoder import Encoder
from .flops import parameter_count, pretraining_flops
from .mim import MaskedImageModel, MimOutput

__all__ = ["Encoder", "MaskedImageModel", "MimOutput", "keep_scales", "parameter_count", "pretraining_flops"]

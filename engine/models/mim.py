"""Masked image modelling: the encoder, and a head that predicts the visual tokens of masked patches.

B pictures, S their side in pixels, P patches, N = P+1 tokens, M slots for masked patches (-1: empty), D channels,
V visual tokens, R = B*M.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fused_beit.kernels import resolve, token_loss

from ..config import ModelSettings
from .drop_path import keep_scales
from .encoder import Encoder, impl_besides_attention, init_normal_

MEAN_AND_STD = {
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Of red, green and blue in [0, 1]."""

IGNORED = -100
"""Target of an empty slot."""


class MimOutput(NamedTuple):
    """Mean loss and accuracy over the masked patches, fp32 scalars; the accuracy has no gradient."""

    loss: Tensor
    accuracy: Tensor


class TokenHead(nn.Linear):
    """The linear map to the vocabulary, and the loss over it."""

    def __init__(self, width: int, vocab_size: int, impl: str) -> None:
        super().__init__(width, vocab_size)
        resolve("token_loss", impl, None)
        self.impl = impl
        init_normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Any:
        """[R, D] -> logits [R, V]; with targets int64 [R] -> TokenLoss, the logits not kept."""
        if targets is None:
            return super().forward(input)
        return token_loss(input, self.weight, self.bias, targets, ignore_index=IGNORED, impl=self.impl)


class MaskedImageModel(nn.Module):
    """BEiT's pre-training (arXiv:2106.08254, section 2.3): which visual token does each masked patch have?

    settings:   shape of the encoder
    image_size: S, side of the pictures in pixels
    vocab_size: V, number of visual tokens
    normalize:  mean and deviation that the pixels are brought to: "inception" or "imagenet"
    impl:       implementation of the operators; sdpa, xformers and flex concern attention alone
    Raises ImplUnavailable for an `impl` that an operator does not have.
    """

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(
        self,
        settings: ModelSettings,
        image_size: int,
        vocab_size: int,
        *,
        normalize: Literal["inception", "imagenet"],
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.encoder = Encoder(settings, image_size, impl=impl)
        self.lm_head = TokenHead(settings.width, vocab_size, impl_besides_attention(impl))
        self.drops_paths = settings.drop_path > 0
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in MEAN_AND_STD[normalize])
        self.register_buffer("pixel_scale", 1 / (255 * std), persistent=False)
        self.register_buffer("pixel_shift", -mean / std, persistent=False)

    def normalize(self, patch_view: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> (pixel / 255 - mean) / std, fp32."""
        return torch.addcmul(self.pixel_shift, patch_view.to(self.pixel_scale.dtype), self.pixel_scale)

    def forward(
        self,
        patch_view: Tensor,
        masked_positions: Tensor,
        token_ids: Tensor,
        sample_ids: Tensor | None = None,
        seed: int = 0,
    ) -> MimOutput:
        """Loss and accuracy of the visual tokens at the masked patches.

        patch_view:       uint8 [B, 3, S, S]
        masked_positions: int64 [B, M]  masked patches, -1: empty slot, which counts in nothing
        token_ids:        int64 [B, P]  visual token of every patch
        sample_ids:       int64 [B]     place of each picture in the training stream; paths are dropped only in
                                        training and when these are given
        seed:             of the run, for the dropped paths
        -> MimOutput
        """
        keep = None
        if self.training and self.drops_paths and sample_ids is not None:
            keep = keep_scales(sample_ids, self.encoder.drop_path_rates, seed)
        h_RD = self.encoder(self.normalize(patch_view), masked_positions, keep, read_masked=True)
        targets_BM = token_ids.gather(1, masked_positions.clamp_min(0)).masked_fill(masked_positions < 0, IGNORED)
        loss, accuracy = self.lm_head(h_RD, targets_BM.flatten())
        return MimOutput(loss, accuracy)

    def logits(self, patch_view: Tensor, masked_positions: Tensor) -> Tensor:
        """Scores of every visual token at the masked patches, without dropped paths.

        patch_view [B, 3, S, S] uint8, masked_positions int64 [B, M] -> [B, M, V]; those of empty slots mean nothing.
        """
        logits_RV = self.lm_head(self.encoder(self.normalize(patch_view), masked_positions, read_masked=True))
        return logits_RV.unflatten(0, masked_positions.shape)

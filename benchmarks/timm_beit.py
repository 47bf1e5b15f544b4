"""timm's BEiT with our weights: the peer of a pre-training step.

timm has neither a mask token nor a head over visual tokens, nor a model with the bias shared by all blocks among its
named ones, but its class takes all of the shape. What its user has to add is added here as that user would: the mask
token, the head, the loss at the masked patches, which are gathered so that nothing waits for the device.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_beit.engine.config import ModelSettings

from .rounds import AbsentError


class MaskedBeit(nn.Module):
    """Masked image modelling around timm's `Beit`.

    B pictures, S their side in pixels, P patches, M masked ones, D channels, V visual tokens.
    """

    def __init__(self, beit: nn.Module, width: int, vocab_size: int) -> None:
        super().__init__()
        self.beit = beit
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.lm_head = nn.Linear(width, vocab_size)

    def logits(self, pixels: Tensor, masked_positions: Tensor) -> Tensor:
        """fp32 [B, 3, S, S], int64 [B, M] -> [B*M, V]."""
        beit = self.beit
        x_BPD = beit.patch_embed(pixels)
        masked_BP = torch.zeros(x_BPD.shape[:2], dtype=torch.bool, device=x_BPD.device)
        masked_BP = masked_BP.scatter(1, masked_positions, True)
        x_BPD = torch.where(masked_BP[..., None], self.mask_token, x_BPD)
        x_BND = torch.cat([beit.cls_token.expand(len(x_BPD), -1, -1), x_BPD], dim=1)
        bias = beit.rel_pos_bias()
        for block in beit.blocks:
            x_BND = block(x_BND, shared_rel_pos_bias=bias)
        x_BND = beit.norm(x_BND)
        places = (masked_positions + 1)[..., None].expand(-1, -1, x_BND.shape[-1])
        return self.lm_head(x_BND.gather(1, places).flatten(0, 1))

    def forward(self, pixels: Tensor, masked_positions: Tensor, targets: Tensor) -> Tensor:
        """The loss; targets int64 [B*M]."""
        return F.cross_entropy(self.logits(pixels, masked_positions), targets)


def rename(name: str) -> str:
    """Our name of a parameter (that of unilm) -> its name in a `MaskedBeit`; timm's are unilm's too."""
    inner = name.removeprefix("encoder.")
    return inner if inner == "mask_token" or inner.startswith("lm_head.") else f"beit.{inner}"


def build_peer(settings: ModelSettings, image_size: int, vocab_size: int, state: dict[str, Tensor]) -> MaskedBeit:
    """`MaskedBeit` with our weights.

    Raises:
        AbsentError: where timm is not installed.
    """
    try:
        from timm.models.beit import Beit
    except ImportError:
        raise AbsentError("not installed") from None

    beit = Beit(
        img_size=image_size,
        patch_size=settings.patch_size,
        num_classes=0,
        global_pool="",  # else its norm is one of the mean of the patches
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.num_heads,
        mlp_ratio=settings.mlp_ratio,
        drop_path_rate=settings.drop_path,
        init_values=settings.layer_scale,
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
    )
    model = MaskedBeit(beit, settings.width, vocab_size)
    model.load_state_dict({rename(name): value for name, value in state.items()})
    return model.train()

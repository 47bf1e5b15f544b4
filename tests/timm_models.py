"""timm's models, made small, as the tests of `fuse` have them."""

from fused_models import pictures, randomised

# Names as people have them, made small: two layers (Swin: each stage, and a shifted one), few heads, few patches.
SMALL_VIT = {"img_size": 48, "depth": 2, "embed_dim": 32, "num_heads": 2}
SMALL_SWIN = {"img_size": 64, "window_size": 7, "depths": (2, 1, 1, 1), "embed_dim": 16, "num_heads": (2, 2, 2, 2)}
SMALL = {
    "beit_base_patch16_224": SMALL_VIT,
    "beitv2_base_patch16_224": SMALL_VIT,
    "swin_tiny_patch4_window7_224": SMALL_SWIN,
    "vit_base_patch16_224": SMALL_VIT,
}


def made(name, **settings):
    import timm

    return randomised(timm.create_model(name, pretrained=False, num_classes=5, **(SMALL[name] | settings)))


def beit(**settings):
    return made("beit_base_patch16_224", **settings)


def swin(**settings):
    return made("swin_tiny_patch4_window7_224", **settings)


def vit(**settings):
    return made("vit_base_patch16_224", **settings)


def inputs(model, batch=2):
    return {"x": pictures(model.patch_embed.img_size[0], batch)}

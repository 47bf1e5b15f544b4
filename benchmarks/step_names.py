"""What is timed of the training step on a GPU, by name: it imports nothing, for the step itself needs the engine.

A group of providers is timed in one round, and all its models are on the device together; so are no others.
"""

SUBJECT = "train_step"
OURS = "fused_beit"
OURS_COMPILED = "fused_beit, compiled"
TRITON = "fused_beit, triton"
TRITON_COMPILED = "fused_beit, triton, compiled"
TIMM, TIMM_COMPILED = "timm", "timm, compiled"
TRANSFORMERS = ("transformers, sdpa", "transformers, eager")
TRANSFORMERS_COMPILED = "transformers, compiled"
IN_THE_LOOP = "fused_beit, tokenizer in the loop"
BESIDE = "fused_beit, tokenizer beside it"
ZERO_1 = "fused_beit, ZeRO 1"
NO_DEEPSPEED = "fused_beit, no DeepSpeed"

PEERS = (TIMM, *TRANSFORMERS, TIMM_COMPILED, TRANSFORMERS_COMPILED)
"""All others are ours."""


def by_triton(name: str) -> str:
    """Our step with the same thing changed, all its operators by Triton."""
    return name.replace(OURS, TRITON, 1)


CHANGED = (IN_THE_LOOP, BESIDE, ZERO_1, NO_DEEPSPEED)
AS_THEY_ARE, COMPILED, VARIED = "as they are", "compiled", "ours varied"
GROUPS: dict[str, tuple[str, ...]] = {
    AS_THEY_ARE: (OURS, TRITON, TIMM, *TRANSFORMERS),
    COMPILED: (OURS, TRITON, OURS_COMPILED, TRITON_COMPILED, TIMM_COMPILED, TRANSFORMERS_COMPILED),
    VARIED: (OURS, TRITON, *CHANGED, *map(by_triton, CHANGED)),
}
"""The first one is what the others of a group are compared with."""

# Case and group. On a GPU all of them are timed; a rehearsal does the first four, which the targets need. (Where LARGE
# was compiled in time, its target takes the faster of both.)
BASE, LARGE = "base-bf16", "large-bf16"
ROUNDS = (
    (BASE, AS_THEY_ARE),
    (LARGE, AS_THEY_ARE),
    (BASE, COMPILED),
    (BASE, VARIED),
    (LARGE, COMPILED),
    ("small-bf16", AS_THEY_ARE),
    ("tiny-bf16", AS_THEY_ARE),
    ("base-fp32", AS_THEY_ARE),
)
REHEARSED = ROUNDS[:4]

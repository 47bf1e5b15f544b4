"""Where a patch is in the list of positions of its picture: what lets a scatter be written as a gather."""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a kernel have the types that Triton finds at its launch.

import triton
import triton.language as tl


@triton.jit
def find_slots(positions_ptr, pictures, patches, inside, num_slots, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """int32 [ROWS]: m with positions[picture, m] == patch, the last of them; -1 where there is none.

    positions [B, M] are compared CHUNK at a time, in CHUNKS steps that have no loop, for a loop here would keep the
    compiler from loading ahead in the one around it that a backward has. Patches are 0 or more; others are in no slot.
    """
    slots = tl.full(patches.shape, -1, tl.int32)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        ptrs = positions_ptr + pictures.to(tl.int64)[:, None] * num_slots + columns[None, :]
        listed = tl.load(ptrs, mask=inside[:, None] & (columns < num_slots)[None, :], other=-1).to(tl.int32)
        found = (listed == patches[:, None]) & (listed >= 0)
        slots = tl.maximum(slots, tl.max(tl.where(found, columns[None, :], -1), axis=1))
    return slots

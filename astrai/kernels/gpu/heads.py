"""What the kernels share about one head: its norm, its rope, its place in the pages."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_inputs(PDL: tl.constexpr) -> None:
    """Before the first access to what the kernel before this one wrote or still reads."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_next(PDL: tl.constexpr) -> None:
    """The next kernel may start to load what does not depend on this one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_gains(
    weight: tl.tensor, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, NORM: tl.constexpr
) -> tl.tensor:
    """float32 [DIM_PADDED] twice: the norm's weight of each dimension, and of its partner."""
    d = tl.arange(0, DIM_PADDED)
    own = tl.full([DIM_PADDED], 1.0, tl.float32)
    other = own
    if NORM:
        own = tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)
        other = tl.load(weight + (d + DIM // 2) % DIM, mask=d < DIM, other=0.0).to(tl.float32)
    return own, other


@triton.jit
def load_angles(
    cosines: tl.tensor,
    sines: tl.tensor,
    position: tl.tensor,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROPE: tl.constexpr,
) -> tl.tensor:
    """float32 [DIM_PADDED] twice: cosine, and sine with the sign of the partner's share."""
    HALF: tl.constexpr = DIM // 2
    d = tl.arange(0, DIM_PADDED)
    cosine = tl.full([DIM_PADDED], 1.0, tl.float32)
    sine = tl.zeros([DIM_PADDED], tl.float32)
    if ROPE:
        at = position * HALF + d % HALF
        cosine = tl.load(cosines + at, mask=d < DIM, other=0.0)
        sine = tl.load(sines + at, mask=d < DIM, other=0.0)
        sine = tl.where(d < HALF, -sine, sine)
    return cosine, sine


@triton.jit
def load_heads(
    x: tl.tensor,
    live: tl.tensor,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROPE: tl.constexpr,
) -> tl.tensor:
    """float32 [rows, DIM_PADDED] twice: heads at pointers `x` [rows, 1], and their partners."""
    d = tl.arange(0, DIM_PADDED)
    there = live & (d < DIM)[None, :]
    own = tl.load(x + d[None, :], mask=there, other=0.0)
    other = own
    if ROPE:
        other = tl.load(x + ((d + DIM // 2) % DIM)[None, :], mask=there, other=0.0)
    return own.to(tl.float32), other.to(tl.float32)


@triton.jit
def _normed(
    own: tl.tensor, other: tl.tensor, own_gain: tl.tensor, other_gain: tl.tensor, eps: tl.tensor,
    DIM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    rstd = tl.rsqrt(tl.sum(own * own, axis=1) / DIM + eps)[:, None]
    return own * rstd * own_gain[None, :], other * rstd * other_gain[None, :]


@triton.jit
def turn_heads(
    own: tl.tensor,
    other: tl.tensor,
    own_gain: tl.tensor,
    other_gain: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    eps: tl.tensor,
    DIM: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
) -> tl.tensor:
    """float32 [rows, DIM_PADDED]: the heads normed, then turned by rope.

    Dimension i turns with its partner i + DIM // 2. All loads come before this, so that their
    latencies overlap.
    """
    if NORM:
        own, other = _normed(own, other, own_gain, other_gain, eps, DIM)
    if ROPE:
        own = own * cosine[None, :] + other * sine[None, :]
    return own


@triton.jit
def load_turned(
    x: tl.tensor, live: tl.tensor, weight: tl.tensor, cosines: tl.tensor, sines: tl.tensor,
    position: tl.tensor, eps: tl.tensor,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """float32 [rows, DIM_PADDED]: heads at pointers `x` [rows, 1], normed, turned to `position`
    [rows, 1]; 0 where not `live`, of which nothing is loaded."""
    HALF: tl.constexpr = DIM // 2
    if ROPE and DIM == DIM_PADDED:
        # Half by half, as each is the other's partner: every number and angle is loaded once, and
        # takes one register.
        h = tl.arange(0, HALF)
        low = tl.load(x + h[None, :], mask=live, other=0.0).to(tl.float32)
        high = tl.load(x + HALF + h[None, :], mask=live, other=0.0).to(tl.float32)
        if NORM:
            low_gain = tl.load(weight + h).to(tl.float32)
            high_gain = tl.load(weight + HALF + h).to(tl.float32)
        cosine = tl.load(cosines + position * HALF + h[None, :], mask=live, other=0.0)
        sine = tl.load(sines + position * HALF + h[None, :], mask=live, other=0.0)
        if NORM:
            # To the bit as in `turn_heads`: 8 neighbours are added up first, then the two halves.
            low_sum = tl.sum(tl.reshape(low * low, (low.shape[0], HALF // 8, 8)), axis=2)
            high_sum = tl.sum(tl.reshape(high * high, (low.shape[0], HALF // 8, 8)), axis=2)
            rstd = tl.rsqrt(tl.sum(low_sum + high_sum, axis=1) / DIM + eps)[:, None]
            low = low * rstd * low_gain[None, :]
            high = high * rstd * high_gain[None, :]
        own = tl.join(low * cosine + high * -sine, high * cosine + low * sine)
        own = tl.reshape(tl.permute(own, (0, 2, 1)), (low.shape[0], DIM))
    else:
        d = tl.arange(0, DIM_PADDED)[None, :]
        own, other = load_heads(x, live, DIM, DIM_PADDED, ROPE)
        own_gain, other_gain = load_gains(weight, DIM, DIM_PADDED, NORM)
        if ROPE:
            angle = position * HALF + d % HALF
            cosine = tl.load(cosines + angle, mask=live & (d < DIM), other=0.0)
            sine = tl.load(sines + angle, mask=live & (d < DIM), other=0.0)
        if NORM:
            own, other = _normed(own, other, own_gain, other_gain, eps, DIM)
        if ROPE:
            own = own * cosine + other * tl.where(d < HALF, -sine, sine)
    return own


@triton.jit
def frames_of(
    table: tl.tensor, block: tl.tensor, stop: tl.tensor, PAGE: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Page frames of a block's keys: one if the block lies in one page, else one per key before
    `stop`."""
    if PAGE % BLOCK == 0:
        frames = tl.load(table + block * BLOCK // PAGE)
    else:
        key = block * BLOCK + tl.arange(0, BLOCK)
        frames = tl.load(table + key // PAGE, mask=key < stop, other=0)
    return frames


@triton.jit
def load_keys(
    pages: tl.tensor, frames: tl.tensor, block: tl.tensor, head: tl.tensor, stop: tl.tensor,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, N_KV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """K, V [BLOCK, DIM_PADDED] of a block, 0 from `stop` on; WHOLE: all of it is before `stop`."""
    key = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM_PADDED)
    at = (frames.to(tl.int64) * (2 * N_KV) + head) * (PAGE * DIM) + (key % PAGE) * DIM
    there = (d < DIM)[None, :] if WHOLE else (key < stop)[:, None]
    if not WHOLE and DIM != DIM_PADDED:
        there = there & (d < DIM)[None, :]
    place = pages + at[:, None] + d[None, :]
    if WHOLE and DIM == DIM_PADDED:
        k = tl.load(place)
        v = tl.load(place + N_KV * PAGE * DIM)
    else:
        k = tl.load(place, mask=there, other=0.0)
        v = tl.load(place + N_KV * PAGE * DIM, mask=there, other=0.0)
    return k, v

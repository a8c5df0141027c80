"""logit_bias, penalties and min_tokens on the device, in the order of the general sampler.

Logits are edited into float32 scratch, which everything after reads instead. A dense pass applies
the penalties, which may touch any token; then the few tokens of a slot's list are computed anew,
for their bias comes before the penalties and their ban after.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from astrai.kernels.gpu.heads import release_next, wait_for_inputs
from astrai.kernels.gpu.launch import launch
from astrai.kernels.gpu.sampling.masses import CHUNK, load_chunk

# Tokens in the list of a slot; a power of two.
LISTED = 512
# In `seen`: the token is in the prompt. The bits below count it in the output.
IN_PROMPT = 1 << 30


class Edits(NamedTuple):
    """What each slot asks for."""

    listed: Tensor  # int32 [slots, 3, LISTED]: token, bias (float32), banned before this position
    # int32 [slots, 2]: how many are listed; positions of which `seen` has the tokens, -1 if the
    # slot is not penalised
    heads: Tensor
    penalties: Tensor  # float64 [slots, 3]: repetition (1 = off), presence, frequency
    seen: Tensor  # int32 [slots, vocab_size]


@triton.jit
def _count_kernel(
    slots: tl.tensor, positions: tl.tensor, last: tl.tensor, heads: tl.tensor, seen: tl.tensor,
    VOCAB: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """`seen` as it must be for the logits of `position`: with the tokens up to there, once each.

    The token at `position` was drawn by the launch before, perhaps unknown to the host, and is
    counted now. `heads` says up to where tokens are counted, so a position that is computed twice
    is counted once; and if the launch after it has run already, its token is taken out again.
    """
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row)
    counted = tl.load(heads + 2 * slot + 1)
    more = position + 1 - counted
    if (counted >= 0) & ((more == 1) | (more == -1)):
        at = tl.where(more == 1, position, position + 1)
        token = tl.load(last + 2 * slot + (at & 1))
        place = seen + slot * VOCAB + tl.minimum(tl.maximum(token, 0), VOCAB - 1)
        tl.store(place, tl.load(place) + more)
        tl.store(heads + 2 * slot + 1, position + 1)


@triton.jit
def _penalised(x: tl.tensor, seen: tl.tensor, penalties: tl.tensor, slot: tl.tensor) -> tl.tensor:
    """float32: `x` after the penalties; rounded step by step, as the general sampler does."""
    repetition = tl.load(penalties + 3 * slot).to(tl.float32)
    presence = tl.load(penalties + 3 * slot + 1)
    frequency = tl.load(penalties + 3 * slot + 2)
    count = seen & 0x3FFFFFFF
    minus = frequency * count.to(tl.float64) + tl.where(count > 0, presence, 0.0)
    repeated = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition) - minus.to(tl.float32)
    return tl.where(seen > 0, repeated, x)


@triton.jit
def _dense_kernel(
    logits: tl.tensor, slots: tl.tensor, heads: tl.tensor, penalties: tl.tensor, seen: tl.tensor,
    out: tl.tensor, VOCAB: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_chunk(logits, row, chunk, VOCAB, CHUNK)
    if tl.load(heads + 2 * slot + 1) >= 0:
        marks = tl.load(seen + slot * VOCAB + at, mask=at < VOCAB, other=0)
        if tl.max(marks, axis=0) > 0:  # most often few chunks hold a token of the text
            x = _penalised(x, marks, penalties, slot)
    tl.store(out + row * VOCAB + at, x, mask=at < VOCAB)


@triton.jit
def _listed_kernel(
    logits: tl.tensor, slots: tl.tensor, positions: tl.tensor, listed: tl.tensor,
    heads: tl.tensor, penalties: tl.tensor, seen: tl.tensor, out: tl.tensor,
    VOCAB: tl.constexpr, LISTED: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    n = tl.load(heads + 2 * slot)
    if n > 0:
        drawn = tl.load(positions + row) + 1  # the position of the token that is drawn
        i = tl.arange(0, LISTED)
        place = listed + slot * (3 * LISTED) + i
        token = tl.load(place, mask=i < n, other=0)
        bias = tl.load(place + LISTED, mask=i < n, other=0).to(tl.float32, bitcast=True)
        until = tl.load(place + 2 * LISTED, mask=i < n, other=0)
        x = tl.load(logits + row * VOCAB + token, mask=i < n, other=0.0).to(tl.float32) + bias
        if tl.load(heads + 2 * slot + 1) >= 0:
            marks = tl.load(seen + slot * VOCAB + token, mask=i < n, other=0)
            x = _penalised(x, marks, penalties, slot)
        x = tl.where(drawn < until, float("-inf"), x)
        tl.store(out + row * VOCAB + token, x, mask=i < n)


def edit(
    edits: Edits, logits: Tensor, slots: Tensor, positions: Tensor, last: Tensor, out: Tensor,
    pdl: bool = False,
) -> None:  # fmt: skip
    """out float32 [R, vocab_size]: `logits` [R, vocab_size] as their slots want them edited.

    positions int32 [R]: those whose logits these are; last: see `embed`.
    """
    n_rows, vocab = logits.shape
    launch(_count_kernel, (n_rows,))(
        slots, positions, last, edits.heads, edits.seen,
        VOCAB=vocab, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    # A product and a difference are rounded one after the other, as by the general sampler.
    launch(_dense_kernel, (n_rows, triton.cdiv(vocab, CHUNK)))(
        logits, slots, edits.heads, edits.penalties, edits.seen, out,
        VOCAB=vocab, CHUNK=CHUNK, PDL=pdl, num_warps=4, launch_pdl=pdl, enable_fp_fusion=False,
    )  # fmt: skip
    launch(_listed_kernel, (n_rows,))(
        logits, slots, positions, edits.listed, edits.heads, edits.penalties, edits.seen, out,
        VOCAB=vocab, LISTED=LISTED, PDL=pdl, num_warps=4, launch_pdl=pdl, enable_fp_fusion=False,
    )  # fmt: skip

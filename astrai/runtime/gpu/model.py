"""The forward pass on a GPU: the decoder's weights, fused kernels between the matrix products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from astrai.inference.cache.storage import PagedCache
from astrai.kernels.gpu.decode_attention import (
    DecodePlan,
    DecodeShape,
    decode_attention,
    plan_decode,
)
from astrai.kernels.gpu.elementwise import embed, rms_norm, silu_mul
from astrai.kernels.gpu.matvec import matvec
from astrai.kernels.gpu.prefill_attention import prefill_attention, write_keys
from astrai.kernels.gpu.product import Tile, add_norm, part_numbers, product, tile_of
from astrai.kernels.gpu.sampling.masses import BLOCK
from astrai.kernels.gpu.sampling.truncation import ROOM
from astrai.kernels.hopper import product as hopper
from astrai.kernels.hopper.build import available as hopper_available
from astrai.kernels.linear import DenseLinear, Linear
from astrai.kernels.rowwise import rope_tables
from astrai.models.config import ModelConfig
from astrai.models.decoder import Decoder
from astrai.runtime.gpu.sampling import edit_bytes
from astrai.runtime.gpu.uploads import SlotState
from astrai.runtime.sampling.sampler import DEVICE_ROWS

# Rows of logits beside one for every slot.
SPARE_ROWS = 64


class Rows(NamedTuple):
    """What the kernels must know of each row; all int32 [T]."""

    tokens: Tensor  # -1: the token last sampled for the slot
    slots: Tensor
    positions: Tensor  # -1: padding, which writes no page


class _Layer(NamedTuple):
    input_norm: Tensor
    qkv: DenseLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: DenseLinear
    mlp_norm: Tensor
    gate_up: DenseLinear
    down: DenseLinear
    pages: Tensor
    window: int | None
    rope: bool


class GpuModel:
    """Two ways through the layers: `decode` (one position per row), and `prefill` (ragged chunks,
    with such rows beside them).

    Owns rope tables, logits and the scratch memory of decode. Does not own weights (the decoder's),
    pages or slot state. `decode` allocates nothing, so that a graph of it holds fixed addresses.
    """

    def __init__(self, decoder: Decoder, kv: PagedCache, state: SlotState) -> None:
        self.config = c = decoder.config
        self.state = state
        self.device, self.dtype = decoder.device, decoder.dtype
        self.embedding = decoder.embedding
        self.norm = decoder.norm.weight
        self.head = _dense(decoder.head)
        self.layers = [
            _Layer(
                layer.input_norm.weight, _dense(layer.qkv),
                None if layer.q_norm is None else layer.q_norm.weight,
                None if layer.k_norm is None else layer.k_norm.weight,
                _dense(layer.output), layer.mlp_norm.weight, _dense(layer.gate_up),
                _dense(layer.down), kv.pages[i], c.layer_windows[i], c.layer_rope[i],
            )
            for i, layer in enumerate(decoder.layers)
        ]  # fmt: skip
        self._next_norms = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        reach = min(c.max_positions, state.width * kv.page_size)
        cosines, sines = rope_tables(c, reach)
        self.rope = (cosines.to(self.device), sines.to(self.device))
        capability = torch.cuda.get_device_capability(self.device) if self._on_gpu else (0, 0)
        self.pdl = capability >= (9, 0)
        # The tiles are for numbers of two bytes, as the matrix units take them.
        self._fused = self.dtype.itemsize == 2 or not self._on_gpu
        self._hopper = self.dtype.itemsize == 2 and hopper_available(self.device)
        self._scratch(kv, state.max_slots)

    @property
    def layer_flops(self) -> int:
        """Operations of one position in one layer, attention apart."""
        layer = self.layers[0]
        matrices = (layer.qkv, layer.output, layer.gate_up, layer.down)
        return 2 * sum(linear.weight.numel() for linear in matrices)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _scratch(self, kv: PagedCache, max_rows: int) -> None:
        c = self.config
        self.attention = DecodeShape(
            c.n_heads, c.n_kv_heads, c.head_dim, kv.page_size, max_rows, self.device
        )
        self._plans = {
            window: self.attention.new_plan() for window in dict.fromkeys(c.layer_windows)
        }
        self._buffers = {
            name: torch.zeros(max_rows, width, dtype=self.dtype, device=self.device)
            for name, width in _widths(c).items()
        }
        self._logits = self._new(max_rows + SPARE_ROWS, c.vocab_size)
        self._parts = torch.zeros(_part_numbers(c), device=self.device)

    def decode(self, rows: Rows) -> Tensor:
        """Logits [R, vocab_size] of one new position per row; the next call, or that of `logits`,
        overwrites them."""
        n, pdl = len(rows.slots), self.pdl
        buffers = {name: buffer[:n] for name, buffer in self._buffers.items()}
        hidden, logits = buffers["hidden"], self._logits[:n]
        embed(self.embedding, rows.tokens, rows.slots, rows.positions, self.state.last, hidden)
        plans = self._plan(rows)
        if n == 1:
            for layer in self.layers:
                self._vector_layer(layer, rows, plans[layer.window], buffers)
            head, eps = self.head, self.config.rms_norm_eps
            matvec(hidden, head.weight, logits, bias=head.bias, norm=self.norm, eps=eps, pdl=pdl)
        else:
            states = self._matrix_layers(
                buffers,
                lambda layer: self._attend(
                    layer, rows, plans[layer.window], buffers["qkv"], buffers["attended"]
                ),
            )
            self._multiply(self.head, states, logits)
        return logits

    def _plan(self, rows: Rows) -> dict[int | None, DecodePlan]:
        return {
            window: plan_decode(self.attention, rows.positions, rows.slots, plan, window, self.pdl)
            for window, plan in self._plans.items()
        }

    def _attend(
        self, layer: _Layer, rows: Rows, plan: DecodePlan, qkv: Tensor, out: Tensor
    ) -> None:
        decode_attention(
            self.attention, qkv, out, layer.pages, self.state.tables, rows.slots, rows.positions,
            plan,
            q_weight=layer.q_norm, k_weight=layer.k_norm, rope=self.rope if layer.rope else None,
            eps=self.config.rms_norm_eps, window=layer.window, pdl=self.pdl,
        )  # fmt: skip

    def _vector_layer(
        self, layer: _Layer, rows: Rows, plan: DecodePlan, buffers: Mapping[str, Tensor]
    ) -> None:
        pdl, eps = self.pdl, self.config.rms_norm_eps
        hidden, qkv = buffers["hidden"], buffers["qkv"]
        attended, acted = buffers["attended"], buffers["acted"]
        linear = layer.qkv
        matvec(
            hidden, linear.weight, qkv, bias=linear.bias, norm=layer.input_norm, eps=eps, pdl=pdl
        )
        self._attend(layer, rows, plan, qkv, attended)
        linear = layer.output
        matvec(attended, linear.weight, hidden, bias=linear.bias, add=True, pdl=pdl)
        linear = layer.gate_up
        matvec(
            hidden, linear.weight, acted, bias=linear.bias, norm=layer.mlp_norm, eps=eps,
            silu=True, pdl=pdl,
        )  # fmt: skip
        linear = layer.down
        matvec(acted, linear.weight, hidden, bias=linear.bias, add=True, pdl=pdl)

    def _matrix_layers(
        self,
        buffers: Mapping[str, Tensor],
        attend: Callable[[_Layer], None],
        pick: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:
        """From embeddings in `hidden` to the final norm, of the rows that `pick` leaves.

        attend: from `qkv` to `attended`. Other rows are of use no longer than to the last one.
        """
        hidden, normed = buffers["hidden"], buffers["normed"]
        rms_norm(hidden, self.layers[0].input_norm, normed, self.config.rms_norm_eps, pdl=self.pdl)
        for layer, next_norm in zip(self.layers, self._next_norms):
            self._multiply(layer.qkv, normed, buffers["qkv"])
            attend(layer)
            attended = buffers["attended"]
            if layer is self.layers[-1]:
                attended, hidden = pick(attended), pick(hidden)
                normed = normed[: len(hidden)]
                buffers = {name: buffer[: len(hidden)] for name, buffer in buffers.items()}
            if len(hidden):
                self._add(layer.output, attended, hidden, layer.mlp_norm, normed)
                self._gate(layer.gate_up, normed, buffers)
                self._add(layer.down, buffers["acted"], hidden, next_norm, normed)
        return normed

    def _tile(
        self, n_rows: int, linear: DenseLinear, silu: bool = False, parts: bool = False
    ) -> Tile | hopper.Cut | None:
        n, k = linear.weight.shape
        sizes = (n_rows, n // 2 if silu else n, k)
        cut = hopper.cut_of(*sizes, silu, parts) if self._hopper else None
        if cut is not None or not self._fused:
            return cut
        return tile_of(*sizes, silu, parts)

    def _multiply(self, linear: DenseLinear, x: Tensor, out: Tensor) -> None:
        if (tile := self._tile(len(x), linear)) is None:
            _product(linear, x, out)
        else:
            _tiled(x, linear.weight, out, tile, bias=linear.bias, pdl=self.pdl)

    def _gate(self, linear: DenseLinear, x: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """acted = silu(gate) * up."""
        acted = buffers["acted"]
        if (tile := self._tile(len(x), linear, silu=True)) is None:
            _product(linear, x, buffers["gate_up"])
            silu_mul(buffers["gate_up"], acted, pdl=self.pdl)
        else:
            _tiled(x, linear.weight, acted, tile, bias=linear.bias, silu=True, pdl=self.pdl)

    def _add(
        self, linear: DenseLinear, x: Tensor, hidden: Tensor, gain: Tensor, normed: Tensor
    ) -> None:
        """The product goes onto `hidden`, whose norm goes to `normed`."""
        pdl, eps = self.pdl, self.config.rms_norm_eps
        (n, size), weight = hidden.shape, linear.weight
        if (tile := self._tile(n, linear, parts=True)) is None:
            hidden.addmm_(x, weight.t())
            if linear.bias is not None:
                hidden.add_(linear.bias)
            rms_norm(hidden, gain, normed, eps, pdl=pdl)
        else:
            parts = self._parts[: tile.split * n * size].view(tile.split, n, size)
            _tiled(x, weight, parts, tile, pdl=pdl)
            add_norm(parts, hidden, gain, normed, eps, bias=linear.bias, pdl=pdl)

    def prefill(
        self, chunks: Rows, tiles: Tensor, n_tiles: int, steps: Rows, ends: Tensor | None
    ) -> Tensor:
        """States after the final norm, [S + E, hidden_size]: of S steps (one position per row,
        attended as `decode` does), then of the rows `ends` (int32 [E]) of ragged chunks; None: of
        all of them.

        The weights are read once for steps and chunks. tiles: see `prefill_attention`, of `chunks`.
        """
        n, eps, tables = len(steps.slots), self.config.rms_norm_eps, self.state.tables
        total = n + len(chunks.slots)
        buffers = {name: self._new(total, width) for name, width in _widths(self.config).items()}
        hidden, qkv, attended = buffers["hidden"], buffers["qkv"], buffers["attended"]
        for rows, out in ((steps, hidden[:n]), (chunks, hidden[n:])):
            if len(out):
                embed(self.embedding, rows.tokens, rows.slots, rows.positions, self.state.last, out)
        plans = self._plan(steps) if n else {}

        def attend(layer: _Layer) -> None:
            if n:
                self._attend(layer, steps, plans[layer.window], qkv[:n], attended[:n])
            rope = self.rope if layer.rope else None
            write_keys(
                qkv[n:], layer.pages, tables, chunks.slots, chunks.positions,
                k_weight=layer.k_norm, rope=rope, eps=eps,
            )  # fmt: skip
            prefill_attention(
                qkv[n:], attended[n:], layer.pages, tables, tiles, n_tiles,
                q_weight=layer.q_norm, rope=rope, eps=eps, window=layer.window,
            )  # fmt: skip

        return self._matrix_layers(
            buffers, attend, lambda x: x if ends is None else pick_ends(x, n, ends)
        )

    def logits(self, states: Tensor) -> Tensor:
        """[R, vocab_size] of R of the states that `prefill` returned, at most max_slots +
        SPARE_ROWS; the next call overwrites them."""
        out = self._logits[: len(states)]
        self._multiply(self.head, states, out)
        return out

    def compile_long(self, n_rows: int) -> None:
        """In the background, what a pass of so many rows needs and a short one does not."""
        linear = self.layers[0].gate_up
        tile = self._tile(n_rows, linear, silu=True)
        if isinstance(tile, hopper.Cut):
            bias = linear.bias is not None
            hopper.kernel_of(tile, self.dtype, silu=True, parts=False, bias=bias).warmup()

    def _new(self, rows: int, width: int) -> Tensor:
        return torch.empty(rows, width, dtype=self.dtype, device=self.device)


def pick_ends(x: Tensor, n_steps: int, ends: Tensor) -> Tensor:
    """Rows of x [S + T, n]: those of the steps, then `ends` (int32 [E]) of the T others."""
    return torch.cat((x[:n_steps], x[n_steps:].index_select(0, ends)))


def workspace_bytes(config: ModelConfig, itemsize: int, max_slots: int, max_chunk: int) -> int:
    """Device memory of activations beside weights and pages, with prefill at its largest.

    Decode's buffers, a prefill of `max_chunk` rows with a step of every slot beside it, and all
    logits; scratch of the samplers included, graphs (some MiB each) and the allocator's rounding
    not.
    """
    widths = _widths(config)
    step = sum(widths.values())
    picked = 2 * max_slots * (widths["hidden"] + widths["attended"])
    logits = (max_slots + SPARE_ROWS) * config.vocab_size
    scratch = 12 * min(max_slots, DEVICE_ROWS) * config.vocab_size + 4 * _part_numbers(config)
    scratch += 4 * max_slots * (ROOM + config.vocab_size // BLOCK)
    scratch += edit_bytes(config.vocab_size, max_slots)
    numbers = (max_chunk + 2 * max_slots) * step + picked + logits
    return itemsize * numbers + scratch


def _widths(c: ModelConfig) -> dict[str, int]:
    """Numbers per row of each activation, logits apart."""
    return {
        "hidden": c.hidden_size,
        "normed": c.hidden_size,
        "qkv": (c.n_heads + 2 * c.n_kv_heads) * c.head_dim,
        "attended": c.n_heads * c.head_dim,
        "gate_up": 2 * c.intermediate_size,
        "acted": c.intermediate_size,
    }


def _part_numbers(c: ModelConfig) -> int:
    """Numbers of the largest parts of a product that goes onto the residual stream."""
    sums = (c.n_heads * c.head_dim, c.intermediate_size)
    return max(of(c.hidden_size, k) for k in sums for of in (part_numbers, hopper.part_numbers))


def _dense(linear: Linear) -> DenseLinear:
    if not isinstance(linear, DenseLinear):
        raise TypeError(f"{type(linear).__name__}: the GPU path multiplies plain weights only")
    return linear


def _tiled(
    x: Tensor, weight: Tensor, out: Tensor, tile: Tile | hopper.Cut, *,
    bias: Tensor | None = None, silu: bool = False, pdl: bool = False,
) -> None:  # fmt: skip
    multiply: Callable[..., None] = hopper.product if isinstance(tile, hopper.Cut) else product
    multiply(x, weight, out, tile, bias=bias, silu=silu, pdl=pdl)


def _product(linear: DenseLinear, x: Tensor, out: Tensor) -> None:
    if linear.bias is None:
        torch.mm(x, linear.weight.t(), out=out)
    else:
        torch.addmm(linear.bias, x, linear.weight.t(), out=out)

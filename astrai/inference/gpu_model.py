"""The forward pass on a GPU: the decoder's weights, fused kernels between the matrix products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from astrai.inference.cache.storage import KVCache
from astrai.inference.gpu_state import SlotState
from astrai.inference.sampler import DEVICE_ROWS
from astrai.kernels.linear import DenseLinear, Linear
from astrai.kernels.triton.decode_attention import (
    DecodePlan,
    DecodeShape,
    decode_attention,
    plan_decode,
)
from astrai.kernels.triton.elementwise import embed, rms_norm, silu_mul
from astrai.kernels.triton.matvec import matvec
from astrai.kernels.triton.prefill_attention import prefill_attention, write_keys
from astrai.models.config import ModelConfig
from astrai.models.decoder import Decoder


class Rows(NamedTuple):
    """What the kernels must know of each row; all int32 [T]."""

    tokens: Tensor  # -1: the token last sampled for the slot
    slots: Tensor
    positions: Tensor  # -1: padding, which writes no page

    def first(self, n: int) -> Rows:
        return Rows(self.tokens[:n], self.slots[:n], self.positions[:n])


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
    """Two ways through the layers: `decode` (one position per row) and `prefill` (ragged chunks).

    Owns rope tables and the scratch memory of decode. Does not own weights (the decoder's), pages
    or slot state. `decode` allocates nothing, so that a graph of it holds fixed addresses.
    """

    def __init__(self, decoder: Decoder, kv: KVCache, state: SlotState) -> None:
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
        reach = min(c.max_positions, state.width * kv.page_size)
        inverse, factor = c.rope.frequencies(c.head_dim)
        angles = torch.outer(torch.arange(reach, dtype=torch.float32), inverse)
        self.rope = (
            (angles.cos() * factor).to(self.device),
            (angles.sin() * factor).to(self.device),
        )
        capability = torch.cuda.get_device_capability(self.device) if self._on_gpu else (0, 0)
        self.pdl = capability >= (9, 0)
        self._scratch(kv, state.max_slots)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _scratch(self, kv: KVCache, max_rows: int) -> None:
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

    def decode(self, rows: Rows) -> Tensor:
        """Logits [R, vocab_size] of one new position per row; the next call overwrites them."""
        n, pdl = len(rows.slots), self.pdl
        hidden = self._buffers["hidden"][:n]
        embed(self.embedding, rows.tokens, rows.slots, rows.positions, self.state.last, hidden)
        plans = {
            window: plan_decode(self.attention, rows.positions, rows.slots, plan, window, pdl)
            for window, plan in self._plans.items()
        }
        step = self._vector_layer if n == 1 else self._matrix_layer
        for layer in self.layers:
            step(layer, rows, plans[layer.window], hidden)
        logits = self._buffers["logits"][:n]
        eps = self.config.rms_norm_eps
        if n == 1:
            head = self.head
            matvec(hidden, head.weight, logits, bias=head.bias, norm=self.norm, eps=eps, pdl=pdl)
        else:
            normed = self._buffers["normed"][:n]
            rms_norm(hidden, self.norm, normed, eps, pdl=pdl)
            _product(self.head, normed, logits)
        return logits

    def _attend(
        self, layer: _Layer, rows: Rows, plan: DecodePlan, qkv: Tensor, out: Tensor
    ) -> None:
        decode_attention(
            self.attention, qkv, out, layer.pages, self.state.tables, rows.slots, rows.positions,
            plan,
            q_weight=layer.q_norm, k_weight=layer.k_norm, rope=self.rope if layer.rope else None,
            eps=self.config.rms_norm_eps, window=layer.window, pdl=self.pdl,
        )  # fmt: skip

    def _vector_layer(self, layer: _Layer, rows: Rows, plan: DecodePlan, hidden: Tensor) -> None:
        n, pdl, eps = len(hidden), self.pdl, self.config.rms_norm_eps
        qkv, attended = self._buffers["qkv"][:n], self._buffers["attended"][:n]
        acted = self._buffers["acted"][:n]
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

    def _matrix_layer(self, layer: _Layer, rows: Rows, plan: DecodePlan, hidden: Tensor) -> None:
        n, pdl, eps = len(hidden), self.pdl, self.config.rms_norm_eps
        buffers = {name: buffer[:n] for name, buffer in self._buffers.items()}
        rms_norm(hidden, layer.input_norm, buffers["normed"], eps, pdl=pdl)
        _product(layer.qkv, buffers["normed"], buffers["qkv"])
        self._attend(layer, rows, plan, buffers["qkv"], buffers["attended"])
        _add_product(layer.output, buffers["attended"], hidden)
        rms_norm(hidden, layer.mlp_norm, buffers["normed"], eps, pdl=pdl)
        _product(layer.gate_up, buffers["normed"], buffers["gate_up"])
        silu_mul(buffers["gate_up"], buffers["acted"], pdl=pdl)
        _add_product(layer.down, buffers["acted"], hidden)

    def prefill(self, rows: Rows, tiles: Tensor, n_tiles: int) -> Tensor:
        """Residual stream [T, hidden_size] after the last layer; see `logits`."""
        c, n, eps = self.config, len(rows.slots), self.config.rms_norm_eps
        tables = self.state.tables
        hidden = self._new(n, c.hidden_size)
        embed(self.embedding, rows.tokens, rows.slots, rows.positions, self.state.last, hidden)
        normed = self._new(n, c.hidden_size)
        qkv = self._new(n, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim)
        queries, attended = (self._new(n, c.n_heads * c.head_dim) for _ in range(2))
        gate_up, acted = self._new(n, 2 * c.intermediate_size), self._new(n, c.intermediate_size)
        for layer in self.layers:
            rms_norm(hidden, layer.input_norm, normed, eps)
            _product(layer.qkv, normed, qkv)
            write_keys(
                qkv, queries, layer.pages, tables, rows.slots, rows.positions,
                q_weight=layer.q_norm, k_weight=layer.k_norm,
                rope=self.rope if layer.rope else None, eps=eps,
            )  # fmt: skip
            prefill_attention(
                queries, attended, layer.pages, tables, tiles, n_tiles, window=layer.window
            )
            _add_product(layer.output, attended, hidden)
            rms_norm(hidden, layer.mlp_norm, normed, eps)
            _product(layer.gate_up, normed, gate_up)
            silu_mul(gate_up, acted)
            _add_product(layer.down, acted, hidden)
        return hidden

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """[R, vocab_size] of the rows (int32 [R]) of what `prefill` returned."""
        normed = self._new(len(rows), self.config.hidden_size)
        rms_norm(hidden, self.norm, normed, self.config.rms_norm_eps, rows=rows)
        out = self._new(len(rows), self.config.vocab_size)
        _product(self.head, normed, out)
        return out

    def _new(self, rows: int, width: int) -> Tensor:
        return torch.empty(rows, width, dtype=self.dtype, device=self.device)


def workspace_bytes(config: ModelConfig, itemsize: int, max_slots: int, max_chunk: int) -> int:
    """Device memory of activations beside weights and pages, with prefill at its largest.

    Decode's buffers and a prefill of `max_chunk` rows, `max_slots` of them sampling; scratch of the
    samplers included, graphs (some MiB each) and the allocator's rounding not.
    """
    widths = _widths(config)
    step = sum(widths.values())
    chunk = step - widths["logits"] + widths["attended"]  # queries stand beside what they attended
    sampled = max_slots * widths["logits"]
    scratch = 12 * min(max_slots, DEVICE_ROWS) * config.vocab_size
    return itemsize * (max_slots * step + max_chunk * chunk + sampled) + scratch


def _widths(c: ModelConfig) -> dict[str, int]:
    """Numbers per row of each activation."""
    return {
        "hidden": c.hidden_size,
        "normed": c.hidden_size,
        "qkv": (c.n_heads + 2 * c.n_kv_heads) * c.head_dim,
        "attended": c.n_heads * c.head_dim,
        "gate_up": 2 * c.intermediate_size,
        "acted": c.intermediate_size,
        "logits": c.vocab_size,
    }


def _dense(linear: Linear) -> DenseLinear:
    if not isinstance(linear, DenseLinear):
        raise TypeError(f"{type(linear).__name__}: the GPU path multiplies plain weights only")
    return linear


def _product(linear: DenseLinear, x: Tensor, out: Tensor) -> None:
    if linear.bias is None:
        torch.mm(x, linear.weight.t(), out=out)
    else:
        torch.addmm(linear.bias, x, linear.weight.t(), out=out)


def _add_product(linear: DenseLinear, x: Tensor, onto: Tensor) -> None:
    onto.addmm_(x, linear.weight.t())
    if linear.bias is not None:
        onto.add_(linear.bias)

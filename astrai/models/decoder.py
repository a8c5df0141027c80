"""One decoder for all families: what differs between them is data in ModelConfig."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from astrai.kernels.cpu.threads import alone
from astrai.kernels.linear import (
    Int4Linear,
    Int4Weight,
    Linear,
    Weight,
    make_linear,
    stacked,
)
from astrai.kernels.norm import RmsNorm
from astrai.kernels.rowwise import rows_of
from astrai.models.config import ModelConfig

# The likeliest tokens of a row, whose logits are computed in float32.
_SHARPENED = 8

# Hidden states, in elements, up to which a step is too small to share anything but its products
# (measured on two cores: 5 % of a decode step of 8 rows, and far more when others want the cores).
_FEW_ELEMENTS = 1 << 17

# attend(layer, q [T, n_heads, head_dim], k, v [T, n_kv_heads, head_dim]) -> [T, n_heads * head_dim]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Layer(NamedTuple):
    input_norm: RmsNorm
    qkv: Linear
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    output: Linear
    mlp_norm: RmsNorm
    gate_up: Linear
    down: Linear


class Decoder:
    """From token ids and positions to hidden states and logits.

    Owns the weights, packed for the device, and the row-wise operations. Owns no page: attention
    over them is the caller's `attend`. `weights` has the names of a Hugging Face checkpoint and is
    emptied while packing, so that the model is not in memory twice.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Weight],
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)

        def take(name: str) -> Tensor:
            if name not in weights:
                raise ValueError(f"weight {name!r} is missing")
            weight = weights.pop(name)
            if isinstance(weight, Int4Weight):
                weight = weight.dense(dtype)
            return weight.to(device=self.device, dtype=dtype)

        def norm(name: str, reads: torch.dtype = torch.float32) -> RmsNorm:
            return RmsNorm(take(f"{name}.weight"), config.rms_norm_eps, reads)

        def linear(*names: str) -> Linear:
            bias = [take(f"{name}.bias") for name in names if f"{name}.bias" in weights]
            keys = [f"{name}.weight" for name in names]
            if all(isinstance(weights.get(key), Int4Weight) for key in keys):
                weight = stacked([weights.pop(key) for key in keys])
            else:
                weight = stacked([take(key) for key in keys])
            return make_linear(weight, torch.cat(bias) if bias else None)

        with torch.inference_mode():
            self.embedding = take("model.embed_tokens.weight")
            self.layers = [
                _pack_layer(f"model.layers.{i}", config.qk_norm, dtype, norm, linear)
                for i in range(config.n_layers)
            ]
            self.norm = norm("model.norm")
            tied = config.tie_embeddings
            self.head = make_linear(self.embedding) if tied else linear("lm_head")
            self._sharpens = tied and self.device.type == "cpu" and dtype != torch.float32
            self._rows = rows_of(config, dtype, self.device)

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids, positions int64 [T] -> hidden states after the final norm [T, hidden_size].

        The hidden states are float32 whatever the dtype of the weights: what the layers add up
        would lose a little of every one of them in bfloat16.
        """
        c = self.config
        shape = (-1, c.n_heads + 2 * c.n_kv_heads, c.head_dim)
        rows = self._rows
        added: Tensor | None = None
        few = self.device.type == "cpu" and positions.numel() * c.hidden_size <= _FEW_ELEMENTS
        with torch.inference_mode(), alone(few):
            rows.begin(positions)
            hidden = F.embedding(ids, self.embedding).float()
            for i, layer in enumerate(self.layers):
                x = rows.add_norm(hidden, added, layer.input_norm)
                qkv = layer.qkv(x).view(shape)
                q, k, v = rows.turn(qkv, layer.q_norm, layer.k_norm, c.layer_rope[i])
                added = layer.output(attend(i, q, k, v))
                x = rows.add_norm(hidden, added, layer.mlp_norm)
                added = layer.down(rows.gate(layer.gate_up(x)))
            return self.norm(hidden if added is None else hidden.add_(added))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size] -> float32 [R, vocab_size]."""
        with torch.inference_mode():
            logits = self.head(hidden.to(self.dtype)).float()
            return self._sharpened(logits, hidden) if self._sharpens else logits

    def _sharpened(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """The largest logits again, in float32.

        The head's kernel rounds its results to bfloat16, whose steps are 1/16 to 1/8 where the
        logits that matter are: the likeliest tokens would often tie. Their rows are few.
        """
        largest = logits.topk(min(_SHARPENED, logits.shape[1]), dim=1).indices
        exact = torch.bmm(self.embedding[largest].float(), hidden.unsqueeze(2))
        return logits.scatter_(1, largest, exact.squeeze(2))

    @property
    def n_int4(self) -> int:
        """How many of its matrices are held as 4-bit codes."""
        return sum(isinstance(part, Int4Linear) for part in self._parts())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are held; a tied head that was packed counts again."""
        held = self._held()
        if id(self.embedding) not in {id(tensor) for tensor in held}:
            held.append(self.embedding)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def step_bytes(self) -> int:
        """Bytes of the weights that a decode step reads: of the embedding it takes only rows."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._held())

    def _held(self) -> list[Tensor]:
        """Every tensor that is multiplied with, once."""
        found = (t for part in self._parts() for t in vars(part).values() if isinstance(t, Tensor))
        return list({id(tensor): tensor for tensor in found}.values())

    def _parts(self) -> list[Linear | RmsNorm]:
        layers = [part for layer in self.layers for part in layer if part is not None]
        return [*layers, self.norm, self.head]


def _pack_layer(
    prefix: str,
    qk_norm: bool,
    dtype: torch.dtype,
    norm: Callable[..., RmsNorm],
    linear: Callable[..., Linear],
) -> Layer:
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return Layer(
        input_norm=norm(f"{prefix}.input_layernorm"),
        qkv=linear(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        q_norm=norm(f"{attention}.q_norm", dtype) if qk_norm else None,
        k_norm=norm(f"{attention}.k_norm", dtype) if qk_norm else None,
        output=linear(f"{attention}.o_proj"),
        mlp_norm=norm(f"{prefix}.post_attention_layernorm"),
        gate_up=linear(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        down=linear(f"{mlp}.down_proj"),
    )

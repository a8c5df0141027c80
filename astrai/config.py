"""One frozen dataclass per concern. `None` means: decided at start, and printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GroupDecode = Literal["length", "position", "off"]
Batching = Literal["continuous", "static"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The three budgets of admission and the order in it."""

    max_slots: int
    prefill_budget: int = 512  # prompt positions per tick: the longest a decode step can be held up
    ageing_ticks: int = 256  # waiting that outweighs one step of priority, so nothing starves
    group_decode: GroupDecode = "length"
    batching: Batching = "continuous"  # static: refill only when every slot is free

    def __post_init__(self) -> None:
        for name in ("max_slots", "prefill_budget", "ageing_ticks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that decides how an engine runs. A page is `page_size` tokens."""

    model: str = "smollm2"  # a preset or default name, a directory, a GGUF file, or a hub id
    dtype: str | None = None  # float32, bfloat16, float16, int4; None: fastest on the device
    device: str = "auto"  # "cpu", "cuda", "cuda:1"; auto: cuda if there is one
    load_format: str = "auto"  # "dummy": random weights in the model's real shape
    threads: int | None = None  # CPU threads; None: PyTorch's choice
    max_slots: int | None = None  # tasks that run at once; None: 8 on a CPU, 256 on a GPU
    page_size: int = 64
    kv_tokens: int | None = None  # positions in the pool; None: for every slot, within kv_bytes
    kv_bytes: int | None = None  # bound on the pool; None: 2 GiB on a CPU, 90 % of what is free
    max_model_len: int | None = None  # None: the model's own, or the pool's if that is less
    prefill_budget: int | None = None  # prompt tokens a tick; None: 512 on a CPU, 8192 on a GPU
    ageing_ticks: int = 256
    group_decode: GroupDecode = "length"  # of attention "cpu"; others take ragged lengths as is
    prefix_cache: bool = True
    batching: Batching = "continuous"  # static is there to be measured
    attention: str = "auto"  # a backend of kernels/attention; auto: by device
    max_waiting: int = 4096  # requests in the queue past which a new one is refused
    max_waiting_tokens: int = 1 << 20  # likewise, tokens of their prompts
    stall_seconds: float = 60.0  # a tick that takes longer is reported, with the engine's state
    seed: int = 0  # requests without a seed of their own get one derived from this and their number
    record: str | None = None  # write every decision to this JSONL file, to be replayed
    record_mib: int = 64  # a file that reaches this is followed by the next
    record_files: int = 16  # kept at most; without the first a recording cannot be replayed
    record_prompts: bool = False  # token ids of prompts and outputs as well

    def __post_init__(self) -> None:
        for name in (
            "page_size",
            "ageing_ticks",
            "max_waiting",
            "max_waiting_tokens",
            "record_mib",
            "record_files",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, expected at least 1")
        for name in (
            "threads",
            "max_slots",
            "prefill_budget",
            "kv_tokens",
            "kv_bytes",
            "max_model_len",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}, expected at least 1 or None")
        if not self.stall_seconds > 0:
            raise ValueError(f"stall_seconds = {self.stall_seconds}, expected more than 0")
        if self.page_size % 16:
            raise ValueError(f"page_size = {self.page_size}, expected a multiple of 16")
        if self.group_decode not in ("length", "position", "off"):
            raise ValueError(f"{self.group_decode = }, expected length, position or off")


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorConfig:
    """Who may come in to a server, from where, and what is written down of it."""

    api_keys: tuple[str, ...] = ()  # KEY or NAME KEY; besides those of the file and environment
    api_key_file: str | None = None
    open_metrics: bool = False  # /metrics without a key
    cors_origins: tuple[str, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"
    log_prompts: bool = False
    otlp_endpoint: str | None = None  # where spans are sent

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(
                f"tls_cert = {self.tls_cert}, tls_key = {self.tls_key}, expected both or none"
            )
        for origin in self.cors_origins:
            if origin != "*" and (
                not origin.startswith(("http://", "https://")) or origin[-1] == "/"
            ):
                raise ValueError(f"CORS origin {origin!r}, expected * or https://host[:port]")

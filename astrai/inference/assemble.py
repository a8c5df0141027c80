"""From a configuration to an engine: model, memory budget, books, scheduler, runner."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from astrai.config import EngineConfig, SchedulerConfig
from astrai.inference.cache.books import Books
from astrai.inference.cache.storage import KVCache
from astrai.inference.engine import Engine
from astrai.inference.events import EventLog, JsonlWriter
from astrai.inference.intake import Intake, Limits
from astrai.inference.runner import Runner
from astrai.inference.sampler import Sampler
from astrai.inference.scheduler import Scheduler
from astrai.inference.task import Update
from astrai.kernels.attention import load_backend
from astrai.models.config import ModelConfig
from astrai.models.loading import LoadedModel, load_model, parameter_count
from astrai.models.tokenizer import Tokenizer


class Budget(NamedTuple):
    """What the engine keeps in memory, in bytes, and what was decided at start."""

    weights: int
    kv: int
    kv_tokens: int
    max_model_len: int
    dtype: str
    device: str
    load_seconds: float

    def lines(self) -> list[str]:
        mib = 1 << 20
        return [
            f"weights  {self.weights / mib:8.1f} MiB  {self.dtype} on {self.device}",
            f"KV pool  {self.kv / mib:8.1f} MiB  {self.kv_tokens} tokens, taken as they are used",
            f"total    {(self.weights + self.kv) / mib:8.1f} MiB  in {self.load_seconds:.1f} s",
        ]


class Assembled(NamedTuple):
    engine: Engine
    intake: Intake
    tokenizer: Tokenizer
    events: EventLog
    recorder: JsonlWriter | None
    model_name: str
    budget: Budget


def assemble(config: EngineConfig, deliver: Callable[[list[Update]], None]) -> Assembled:
    """Load the model and wire the rooms together; the loop is not started.

    Raises FileNotFoundError or ValueError, naming file or field and numbers, and MemoryError
    if the pool cannot be allocated.
    """
    started = time.perf_counter()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loaded = load_model(
        config.model, config.dtype, config.device, config.load_format, seed=config.seed
    )
    device = loaded.decoder.device
    n_pages = _n_pages(config, loaded)
    try:
        kv = KVCache(
            loaded.config.n_layers,
            n_pages,
            config.page_size,
            loaded.config.n_kv_heads,
            loaded.config.head_dim,
            loaded.dtype,
            device,
        )
    except (RuntimeError, MemoryError) as error:
        size = n_pages * _bytes_per_page(config, loaded) / (1 << 20)
        raise MemoryError(
            f"the KV pool of {n_pages} pages ({size:.0f} MiB) does not fit: {error}"
        ) from error
    max_model_len = _max_model_len(config, loaded.config, n_pages)
    events = EventLog()
    recorder = JsonlWriter(config.record) if config.record else None
    if recorder:
        events.attach(recorder)
    scheduler = Scheduler(
        SchedulerConfig(
            max_slots=config.max_slots,
            prefill_budget=config.prefill_budget,
            ageing_ticks=config.ageing_ticks,
            group_decode=config.group_decode,
            batching=config.batching,
        ),
        Books(n_pages, config.page_size, config.prefix_cache, events),
        time.monotonic,
        events,
    )
    attention = load_backend(_backend_name(config, device))(kv, loaded.config)
    sampler = Sampler(loaded.config.vocab_size, config.max_slots, device)
    engine = Engine(scheduler, Runner(loaded.decoder, kv, attention, sampler), deliver)
    limits = Limits(
        max_model_len, loaded.config.vocab_size, loaded.eos_token_ids, config.max_waiting
    )
    budget = Budget(
        weights=parameter_count(loaded.config) * loaded.dtype.itemsize,
        kv=kv.bytes_per_page * n_pages,
        kv_tokens=n_pages * config.page_size,
        max_model_len=max_model_len,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(device),
        load_seconds=time.perf_counter() - started,
    )
    intake = Intake(limits, loaded.tokenizer, scheduler, config.seed)
    return Assembled(engine, intake, loaded.tokenizer, events, recorder, loaded.name, budget)


def _bytes_per_page(config: EngineConfig, loaded: LoadedModel) -> int:
    model = loaded.config
    per_token = 2 * model.n_layers * model.n_kv_heads * model.head_dim * loaded.dtype.itemsize
    return per_token * config.page_size


def _n_pages(config: EngineConfig, loaded: LoadedModel) -> int:
    """Pages of the pool: what was asked for, else a full context for every slot within kv_bytes."""
    if config.kv_tokens is not None:
        n_pages = config.kv_tokens // config.page_size
        if n_pages < 1:
            raise ValueError(f"{config.kv_tokens = }, expected at least {config.page_size = }")
        return n_pages
    context = config.max_model_len or loaded.config.max_positions
    wanted = -(-context // config.page_size) * config.max_slots
    affordable = config.kv_bytes // _bytes_per_page(config, loaded)
    if affordable < 1:
        raise ValueError(
            f"{config.kv_bytes = }, expected at least {_bytes_per_page(config, loaded)} (one page)"
        )
    return min(wanted, affordable)


def _max_model_len(config: EngineConfig, model: ModelConfig, n_pages: int) -> int:
    """The longest sequence a request may have: by the model, by the pool, by the configuration."""
    # The last token is sampled but never written, so a full pool holds one token less than fits.
    pool = n_pages * config.page_size + 1
    longest = min(model.max_positions, pool)
    if config.max_model_len is None:
        return longest
    if config.max_model_len > longest:
        raise ValueError(
            f"{config.max_model_len = }, expected at most {longest}: the model has "
            f"{model.max_positions} positions, the KV pool holds {pool - 1}"
        )
    return config.max_model_len


def _backend_name(config: EngineConfig, device: torch.device) -> str:
    if config.attention != "auto":
        return config.attention
    return "cpu" if device.type == "cpu" else "reference"

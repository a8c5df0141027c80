"""From a configuration to an engine: model, memory budget, books, scheduler, runner."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from astrai.config import EngineConfig, SchedulerConfig
from astrai.front.intake import Limits
from astrai.inference.cache.books import Books
from astrai.inference.cache.storage import PagedCache
from astrai.inference.engine import Engine, PlanRunner
from astrai.inference.events import EventLog
from astrai.inference.grammar import Grammars
from astrai.inference.scheduler import Scheduler
from astrai.kernels.attention import cpu_backend, load_backend
from astrai.models.config import ModelConfig
from astrai.models.loading import LoadedModel, load_model
from astrai.observe.recorder import record
from astrai.process.link import Assembled, Budget, Deliver, Front
from astrai.runtime import collector
from astrai.runtime.runner import Runner
from astrai.runtime.sampling.sampler import Sampler

_CPU_KV_BYTES = 2 << 30
# The rest of a GPU's free memory is for graphs, the libraries and the allocator's rounding.
_GPU_SHARE = 0.9


def assemble(config: EngineConfig, deliver: Deliver) -> Assembled:
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
    on_gpu = loaded.decoder.device.type == "cuda"
    config, slots, chunk = _decided(config, loaded)
    workspace = _workspace(loaded, slots, chunk) if on_gpu else 0
    n_pages = _n_pages(config, loaded, slots, workspace)
    max_model_len = _max_model_len(config, loaded.config, n_pages)
    kv = _allocate(config, loaded, n_pages)
    runner = _make_runner(config, loaded, kv, slots, chunk, max_model_len)
    events = EventLog()
    books = Books(n_pages, config.page_size, config.prefix_cache, events)
    planning = SchedulerConfig(
        slots, chunk, config.ageing_ticks, config.group_decode, config.batching
    )
    scheduler = Scheduler(planning, books, time.monotonic, events)
    recorder = record(config, scheduler, _about(loaded, runner.depth))
    limits = Limits(
        max_model_len, loaded.config.vocab_size, loaded.eos_token_ids, n_pages, config.page_size
    )
    budget = Budget(
        weights=loaded.decoder.weight_bytes,
        workspace=workspace,
        kv=kv.bytes_per_page * n_pages,
        kv_tokens=n_pages * config.page_size,
        max_model_len=max_model_len,
        dtype=loaded.precision,
        device=str(loaded.decoder.device),
        load_seconds=time.perf_counter() - started,
    )
    collector.settle()
    grammars = Grammars(loaded.tokenizer, loaded.config.vocab_size, loaded.eos_token_ids)
    front = Front(config, limits, loaded.tokenizer, loaded.name, budget)
    engine = Engine(scheduler, runner, deliver, config.stall_seconds, grammars)
    return Assembled(front, engine, recorder)


def _about(loaded: LoadedModel, depth: int) -> dict[str, Any]:
    """What a recording says of the engine besides its configuration."""
    return {
        "model": loaded.name,
        "dtype": loaded.precision,
        "device": str(loaded.decoder.device),
        "n_layers": loaded.config.n_layers,
        "n_kv_heads": loaded.config.n_kv_heads,
        "head_dim": loaded.config.head_dim,
        "depth": depth,
    }


class _Decided(NamedTuple):
    config: EngineConfig
    max_slots: int
    prefill_budget: int


def _decided(config: EngineConfig, loaded: LoadedModel) -> _Decided:
    """What None and "auto" mean on this device."""
    on_gpu = loaded.decoder.device.type == "cuda"
    slots = config.max_slots or (256 if on_gpu else 8)
    chunk = config.prefill_budget or (8192 if on_gpu else 512)
    attention = config.attention
    if attention == "auto" and not on_gpu:
        attention = cpu_backend(loaded.dtype, config.page_size, loaded.config.head_dim)
    # Only matmuls need rows of equal lengths: elsewhere groups would cost the host for nothing.
    groups = config.group_decode if attention == "cpu" else "off"
    config = replace(
        config, max_slots=slots, prefill_budget=chunk, attention=attention, group_decode=groups
    )
    return _Decided(config, slots, chunk)


def _workspace(loaded: LoadedModel, slots: int, chunk: int) -> int:
    from astrai.runtime.gpu.model import workspace_bytes

    return workspace_bytes(loaded.config, loaded.dtype.itemsize, slots, chunk)


def _make_runner(
    config: EngineConfig,
    loaded: LoadedModel,
    kv: PagedCache,
    slots: int,
    chunk: int,
    max_model_len: int,
) -> PlanRunner:
    """The GPU's runner, or the plain one over an attention backend."""
    decoder, device = loaded.decoder, loaded.decoder.device
    sampler = Sampler(loaded.config.vocab_size, slots, device)
    if device.type == "cuda" and config.attention == "auto":
        from astrai.runtime.gpu.runner import GpuRunner

        runner = GpuRunner(decoder, kv, sampler, slots, chunk, max_model_len)
        runner.warm()
        return runner
    return Runner(decoder, kv, load_backend(config.attention)(kv, loaded.config), sampler)


def _allocate(config: EngineConfig, loaded: LoadedModel, n_pages: int) -> PagedCache:
    try:
        return PagedCache(
            loaded.config.n_layers,
            n_pages,
            config.page_size,
            loaded.config.n_kv_heads,
            loaded.config.head_dim,
            loaded.dtype,
            loaded.decoder.device,
        )
    except (RuntimeError, MemoryError) as error:
        size = n_pages * _bytes_per_page(config, loaded) / (1 << 20)
        raise MemoryError(
            f"the KV pool of {n_pages} pages ({size:.0f} MiB) does not fit: {error}"
        ) from error


def _bytes_per_page(config: EngineConfig, loaded: LoadedModel) -> int:
    model = loaded.config
    per_token = 2 * model.n_layers * model.n_kv_heads * model.head_dim * loaded.dtype.itemsize
    return per_token * config.page_size


def _n_pages(config: EngineConfig, loaded: LoadedModel, slots: int, workspace: int) -> int:
    """Pages of the pool: what was asked for, else a full context for every slot within kv_bytes."""
    if config.kv_tokens is not None:
        n_pages = config.kv_tokens // config.page_size
        if n_pages < 1:
            raise ValueError(f"{config.kv_tokens = }, expected at least {config.page_size = }")
        return n_pages
    context = config.max_model_len or loaded.config.max_positions
    wanted = -(-context // config.page_size) * slots
    budget = config.kv_bytes
    if budget is None:
        budget = _CPU_KV_BYTES
        if loaded.decoder.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(loaded.decoder.device)
            budget = int(free * _GPU_SHARE) - workspace
    page = _bytes_per_page(config, loaded)
    if budget < page:
        raise ValueError(
            f"{budget} bytes are left for the KV pool beside a workspace of {workspace}, "
            f"expected at least one page of {page}"
        )
    return min(wanted, budget // page)


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

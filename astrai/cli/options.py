"""Flags that several commands share, and how a command takes them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from astrai.config import DoorConfig, EngineConfig

if TYPE_CHECKING:
    from astrai.front.sampling_params import SamplingParams

DEFAULT = EngineConfig()


class CliError(Exception):
    """Ends the command with one line and an exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class GroupDecodeFlag(StrEnum):
    length = "length"
    position = "position"
    off = "off"


_DEFAULT_GROUPS = GroupDecodeFlag(DEFAULT.group_decode)


def engine_config(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A known name, directory, GGUF file or hub id.")
    ] = DEFAULT.model,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or int4; default: fastest.")
    ] = DEFAULT.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = DEFAULT.device,
    load_format: Annotated[
        str, typer.Option(help="auto, or dummy: random weights in the model's shape.")
    ] = DEFAULT.load_format,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = DEFAULT.threads,
    max_slots: Annotated[
        int | None, typer.Option(help="Requests that run at once; default: by device.")
    ] = DEFAULT.max_slots,
    page_size: Annotated[int, typer.Option(help="Tokens in a page.")] = DEFAULT.page_size,
    kv_tokens: Annotated[
        int | None, typer.Option(help="Tokens the KV pool holds; default: by --kv-bytes.")
    ] = DEFAULT.kv_tokens,
    kv_bytes: Annotated[
        int | None, typer.Option(help="Bound on the KV pool; default: by device.")
    ] = DEFAULT.kv_bytes,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt + answer, in tokens; default: the model's.")
    ] = DEFAULT.max_model_len,
    prefill_budget: Annotated[
        int | None, typer.Option(help="Prompt tokens a tick computes at most; default: by device.")
    ] = DEFAULT.prefill_budget,
    ageing_ticks: Annotated[
        int, typer.Option(help="Ticks of waiting that outweigh one step of priority.")
    ] = DEFAULT.ageing_ticks,
    group_decode: Annotated[
        GroupDecodeFlag, typer.Option(help="What decode steps share one matmul (attention cpu).")
    ] = _DEFAULT_GROUPS,
    prefix_cache: Annotated[
        bool, typer.Option(help="Share the pages of equal prompt starts.")
    ] = DEFAULT.prefix_cache,
    attention: Annotated[
        str, typer.Option(help="Attention backend; auto: by device.")
    ] = DEFAULT.attention,
    max_waiting: Annotated[
        int, typer.Option(help="Requests in the queue past which a new one is refused.")
    ] = DEFAULT.max_waiting,
    max_waiting_tokens: Annotated[
        int, typer.Option(help="Prompt tokens in the queue past which a new request is refused.")
    ] = DEFAULT.max_waiting_tokens,
    stall_seconds: Annotated[
        float, typer.Option(help="A tick that takes longer is reported, with the engine's state.")
    ] = DEFAULT.stall_seconds,
    seed: Annotated[int, typer.Option(help="Seed of the requests that bring none.")] = DEFAULT.seed,
    record: Annotated[
        str | None, typer.Option(help="Write every decision to this JSONL file, for replay.")
    ] = DEFAULT.record,
    record_mib: Annotated[
        int, typer.Option(help="Size at which a recording goes on in the next file.")
    ] = DEFAULT.record_mib,
    record_files: Annotated[
        int, typer.Option(help="Files of a recording kept; past it the oldest is deleted.")
    ] = DEFAULT.record_files,
    record_prompts: Annotated[
        bool, typer.Option(help="Record the token ids of prompts and answers too.")
    ] = DEFAULT.record_prompts,
) -> EngineConfig:
    flags = dict(locals())
    flags["group_decode"] = group_decode.value
    try:
        return EngineConfig(**flags)
    except ValueError as error:
        raise CliError(str(error), 2) from None


class LogFormatFlag(StrEnum):
    text = "text"
    json = "json"


class LogLevelFlag(StrEnum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def door_config(
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME ]KEY",
            help="Who has it may come in; may be repeated. Also from ASTRAI_API_KEYS.",
        ),
    ] = None,
    api_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file of keys, one a line.")
    ] = None,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="/metrics without a key.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Site whose pages may ask in a browser, or *; may be repeated."),
    ] = None,
    tls_cert: Annotated[
        str | None, typer.Option(metavar="FILE", help="Certificate chain (PEM): serve HTTPS.")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="Its key (PEM).")] = None,
    log_format: Annotated[
        LogFormatFlag, typer.Option(help="Lines on standard error.")
    ] = LogFormatFlag.text,
    log_level: Annotated[
        LogLevelFlag, typer.Option(help="info: one line per request.")
    ] = LogLevelFlag.info,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log the bodies of requests too.")
    ] = False,
    otlp_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Send OpenTelemetry spans there.")
    ] = None,
) -> DoorConfig:
    try:
        return DoorConfig(
            api_keys=tuple(api_key or ()),
            api_key_file=api_key_file,
            open_metrics=open_metrics,
            cors_origins=tuple(cors_origin or ()),
            tls_cert=tls_cert,
            tls_key=tls_key,
            log_format=log_format.value,
            log_level=log_level.value,
            log_prompts=log_prompts,
            otlp_endpoint=otlp_endpoint,
        )
    except ValueError as error:
        raise CliError(str(error), 2) from None


def sampling_fields(
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at most; default: what fits.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Mass of the likeliest tokens kept.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Number of likeliest tokens kept.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Kept relative to the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1: none.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")
    ] = None,
    sampling_seed: Annotated[
        int | None, typer.Option(help="Seed of the draws: the same seed, the same text.")
    ] = None,
) -> dict[str, Any]:
    """Fields of SamplingParams that were given."""
    fields = dict(locals())
    fields["seed"] = fields.pop("sampling_seed")
    given = {name: value for name, value in fields.items() if value not in (None, [])}
    return {"max_tokens": None, **given}


def flags(**makers: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command takes the flags of `makers`; each makes the argument that it is named for."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(command, eval_str=True).parameters
        made = {name: inspect.signature(m, eval_str=True).parameters for name, m in makers.items()}

        @functools.wraps(command)
        def wrapper(**values: Any) -> Any:
            arguments = {name: values[name] for name in own if name not in makers}
            for name, maker in makers.items():
                arguments[name] = maker(**{flag: values[flag] for flag in made[name]})
            return command(**arguments)

        parameters = [p for p in own.values() if p.name not in makers]
        for shared in made.values():
            parameters += shared.values()
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        del wrapper.__wrapped__  # or its own signature would be read instead of this one
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


RecordingPath = Annotated[Path, typer.Argument(metavar="RUN.JSONL", help="A recording.")]


class PolicyFlag(StrEnum):
    continuous = "continuous"
    static = "static"


def params_of(fields: dict[str, Any]) -> SamplingParams:
    """Wrong flags end the command before a model is loaded."""
    from astrai.front.sampling_params import SamplingParams

    try:
        return SamplingParams(**fields)
    except ValueError as error:
        raise CliError(str(error), 2) from None

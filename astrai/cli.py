"""The command line. Every command imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import astrai
from astrai.config import DoorConfig, EngineConfig

if TYPE_CHECKING:
    from astrai.inference.sampling_params import SamplingParams

_DEFAULT = EngineConfig()
# UsageError and ClickException, wherever the installed typer keeps them.
_USAGE_ERROR, _CLICK_ERROR = typer.BadParameter.__mro__[1:3]

app = typer.Typer(
    name="astrai",
    help="LLM inference: continuous batching over a paged, prefix-shared KV cache.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


class CliError(Exception):
    """Ends the command with one line and an exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def main() -> NoReturn:
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """The exit code of a command line; what goes wrong is one line on stderr."""
    debug = "--debug" in args
    try:
        code = app([arg for arg in args if arg != "--debug"], "astrai", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"astrai: error: {_one_line(error)}", file=sys.stderr)
        if isinstance(error, CliError):
            return error.code
        return 2 if isinstance(error, _USAGE_ERROR) else 1


def _one_line(error: Exception) -> str:
    if isinstance(error, _CLICK_ERROR):
        message = str(error.format_message())  # type: ignore[attr-defined]
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, (CliError, ValueError, RuntimeError, OSError, MemoryError)):
        message = str(error) or type(error).__name__
    elif isinstance(error, ImportError):
        message = str(error)
    else:
        message = f"internal error: {type(error).__name__}: {error} (--debug shows where)"
    return " ".join(message.split())


# ── flags shared by several commands ────────────────────────────────────────────────────────────


class GroupDecodeFlag(StrEnum):
    length = "length"
    position = "position"
    off = "off"


class ToolParserFlag(StrEnum):
    auto = "auto"
    none = "none"
    hermes = "hermes"
    llama3 = "llama3"
    generic = "generic"


class ReasoningParserFlag(StrEnum):
    auto = "auto"
    none = "none"
    think = "think"


_DEFAULT_GROUPS = GroupDecodeFlag(_DEFAULT.group_decode)


def engine_config(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A known name, directory, GGUF file or hub id.")
    ] = _DEFAULT.model,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or int4; default: fastest.")
    ] = _DEFAULT.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = _DEFAULT.device,
    load_format: Annotated[
        str, typer.Option(help="auto, or dummy: random weights in the model's shape.")
    ] = _DEFAULT.load_format,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = _DEFAULT.threads,
    max_slots: Annotated[
        int | None, typer.Option(help="Requests that run at once; default: by device.")
    ] = _DEFAULT.max_slots,
    page_size: Annotated[int, typer.Option(help="Tokens in a page.")] = _DEFAULT.page_size,
    kv_tokens: Annotated[
        int | None, typer.Option(help="Tokens the KV pool holds; default: by --kv-bytes.")
    ] = _DEFAULT.kv_tokens,
    kv_bytes: Annotated[
        int | None, typer.Option(help="Bound on the KV pool; default: by device.")
    ] = _DEFAULT.kv_bytes,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt + answer, in tokens; default: the model's.")
    ] = _DEFAULT.max_model_len,
    prefill_budget: Annotated[
        int | None, typer.Option(help="Prompt tokens a tick computes at most; default: by device.")
    ] = _DEFAULT.prefill_budget,
    ageing_ticks: Annotated[
        int, typer.Option(help="Ticks of waiting that outweigh one step of priority.")
    ] = _DEFAULT.ageing_ticks,
    group_decode: Annotated[
        GroupDecodeFlag, typer.Option(help="What decode steps share one matmul (attention cpu).")
    ] = _DEFAULT_GROUPS,
    prefix_cache: Annotated[
        bool, typer.Option(help="Share the pages of equal prompt starts.")
    ] = _DEFAULT.prefix_cache,
    attention: Annotated[
        str, typer.Option(help="Attention backend; auto: by device.")
    ] = _DEFAULT.attention,
    max_waiting: Annotated[
        int, typer.Option(help="Requests in the queue past which a new one is refused.")
    ] = _DEFAULT.max_waiting,
    max_waiting_tokens: Annotated[
        int, typer.Option(help="Prompt tokens in the queue past which a new request is refused.")
    ] = _DEFAULT.max_waiting_tokens,
    stall_seconds: Annotated[
        float, typer.Option(help="A tick that takes longer is reported, with the engine's state.")
    ] = _DEFAULT.stall_seconds,
    seed: Annotated[
        int, typer.Option(help="Seed of the requests that bring none.")
    ] = _DEFAULT.seed,
    record: Annotated[
        str | None, typer.Option(help="Write every decision to this JSONL file, for replay.")
    ] = _DEFAULT.record,
    record_mib: Annotated[
        int, typer.Option(help="Size at which a recording goes on in the next file.")
    ] = _DEFAULT.record_mib,
    record_files: Annotated[
        int, typer.Option(help="Files of a recording kept; past it the oldest is deleted.")
    ] = _DEFAULT.record_files,
    record_prompts: Annotated[
        bool, typer.Option(help="Record the token ids of prompts and answers too.")
    ] = _DEFAULT.record_prompts,
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


# ── commands ────────────────────────────────────────────────────────────────────────────────────


def _version(asked: bool) -> None:
    if asked:
        print(f"astrai {astrai.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@flags(config=engine_config, door=door_config)
def serve(
    config: EngineConfig,
    door: DoorConfig,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name of the model in requests; may be repeated.")
    ] = None,
    max_body_mib: Annotated[int, typer.Option(help="Largest request body.", min=1)] = 8,
    drain_seconds: Annotated[
        int, typer.Option(help="Time for open answers to end at shutdown.", min=0)
    ] = 30,
    request_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds a request may take that does not say itself.", min=0.001),
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run the engine in the server's own process.")
    ] = False,
    tool_parser: Annotated[
        ToolParserFlag, typer.Option(help="How the model writes tool calls; auto: by its template.")
    ] = ToolParserFlag.auto,
    reasoning_parser: Annotated[
        ReasoningParserFlag,
        typer.Option(help="Whether <think>…</think> is split off; auto: by the chat template."),
    ] = ReasoningParserFlag.auto,
) -> None:
    """Serve the model over HTTP with OpenAI's API."""
    try:
        from astrai.server import run as server
    except ImportError as error:
        raise CliError(f"{error}: install it with pip install 'astrai[serve]'") from None
    code = server.serve(
        config,
        host=host,
        port=port,
        names=served_model_name or (),
        max_body_bytes=max_body_mib << 20,
        drain_seconds=drain_seconds,
        door=door,
        tool_parser=tool_parser.value,
        reasoning_parser=reasoning_parser.value,
        request_timeout=request_timeout,
        in_process=in_process,
    )
    if code:
        raise typer.Exit(code)


@app.command()
@flags(config=engine_config, sampling=sampling_fields)
def chat(
    config: EngineConfig,
    sampling: dict[str, Any],
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
) -> None:
    """Talk to the model in the terminal: /reset forgets, /exit leaves, Ctrl-C stops an answer."""
    from astrai import AsyncEngine
    from astrai.terminal import Chat

    params = _params(sampling)
    Chat(AsyncEngine(config), params, system).loop()


@app.command()
@flags(config=engine_config, sampling=sampling_fields)
def generate(
    config: EngineConfig,
    sampling: dict[str, Any],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="JSONL; -: standard input.")],
    output: Annotated[str, typer.Option("--output", "-o", help="JSONL; -: standard output.")] = "-",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Answer a bad line with an error object.")
    ] = False,
) -> None:
    """Answer a JSONL of prompts with a JSONL of results, in order.

    A line has "prompt", "messages" or "prompt_token_ids", and may have "id" and any sampling
    field, which then stands above the flags.
    """
    from astrai import batch

    _params(sampling)
    code = batch.generate(config, sampling, source, output, skip_bad)
    if code:
        raise typer.Exit(code)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A known name or hub id.")] = _DEFAULT.model,
) -> None:
    """Fetch a model, and print where it is."""
    from astrai.models.pull import resolve

    print(resolve(name))


class ScenePart(StrEnum):
    all = "all"
    batching = "batching"
    cache = "cache"


class FilmQuality(StrEnum):
    low = "low"
    medium = "medium"
    high = "high"
    uhd = "4k"


@app.command()
def animate(
    recording: Annotated[
        Path | None, typer.Argument(help="From --record; without it a small run is made.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The film.")] = Path("astrai.mp4"),
    scene: Annotated[ScenePart, typer.Option(help="Which of the two scenes.")] = ScenePart.all,
    quality: Annotated[FilmQuality, typer.Option(help="480p to 2160p.")] = FilmQuality.medium,
    gif: Annotated[bool, typer.Option("--gif", help="A GIF instead of an MP4.")] = False,
    batching: Annotated[
        Path | None,
        typer.Option(help="Output of astrai bench batching --json: the ratio of the closing bars."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="What the small run runs.")
    ] = _DEFAULT.model,
) -> None:
    """Draw a recording as a short film: continuous batching, and the paged KV cache."""
    from astrai.observe.animate import render

    render.animate(
        recording,
        output,
        scene=scene.value,
        quality=quality.value,
        gif=gif,
        batching=batching,
        model=model,
    )
    print(output)


class PolicyFlag(StrEnum):
    continuous = "continuous"
    static = "static"


RecordingPath = Annotated[Path, typer.Argument(metavar="RUN.JSONL", help="A recording.")]


@app.command()
def replay(
    recording: RecordingPath,
    pages: Annotated[int | None, typer.Option(help="What if: page frames.", min=1)] = None,
    page_size: Annotated[int | None, typer.Option(help="What if: tokens in a page.")] = None,
    slots: Annotated[int | None, typer.Option(help="What if: slots.", min=1)] = None,
    prefill_budget: Annotated[
        int | None, typer.Option(help="What if: prompt tokens a tick.", min=1)
    ] = None,
    ageing_ticks: Annotated[int | None, typer.Option(help="What if: ageing.", min=1)] = None,
    policy: Annotated[PolicyFlag | None, typer.Option(help="What if: batching.")] = None,
    prefix_cache: Annotated[
        bool | None, typer.Option(help="What if: pages of equal prompt starts shared or not.")
    ] = None,
    ignore_priority: Annotated[
        bool, typer.Option("--ignore-priority", help="What if: first come, first served.")
    ] = False,
    view: Annotated[bool, typer.Option("--view", help="Open it in the live page.")] = False,
    port: Annotated[int, typer.Option(help="Of the live page; 0: any.", min=0, max=65535)] = 0,
) -> None:
    """Run a recording through the scheduler again and compare every decision.

    With a what-if option: simulate the recorded load under another configuration.
    """
    from astrai.observe import commands
    from astrai.observe.whatif import Change

    change = Change(
        pages,
        page_size,
        slots,
        prefill_budget,
        ageing_ticks,
        policy.value if policy else None,
        prefix_cache,
        ignore_priority,
    )
    if view:
        _view(recording, port)
    elif change != Change():
        commands.what_if(recording, change)
    elif code := commands.replay(recording):
        raise typer.Exit(code)


@app.command()
def trace(
    recording: RecordingPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace, as JSON.")] = Path(
        "trace.json"
    ),
    ticks: Annotated[str, typer.Option(help="FIRST:LAST, of a long recording.")] = "",
) -> None:
    """Turn a recording into a trace for Perfetto or Chrome: phases, launches, slots, requests."""
    from astrai.observe import commands

    commands.trace(recording, output, ticks)


@app.command()
def simulate(
    step_time: Annotated[
        str,
        typer.Option(
            help="A recording to fit it to, or four numbers of seconds: base, a prompt token, a "
            "decoding row, a page read.",
        ),
    ],
    workload: Annotated[
        Path | None, typer.Argument(metavar="WORKLOAD.JSONL", help="Without it: generated.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Requests that run at once.", min=1)] = 64,
    pages: Annotated[int, typer.Option(help="Page frames.", min=1)] = 4096,
    page_size: Annotated[int, typer.Option(help="Tokens in a page.", min=1)] = 64,
    prefill_budget: Annotated[int, typer.Option(help="Prompt tokens a tick.", min=1)] = 2048,
    policy: Annotated[PolicyFlag, typer.Option(help="Batching.")] = PolicyFlag.continuous,
    prefix_cache: Annotated[bool, typer.Option(help="Share equal prompt starts.")] = True,
    overlap: Annotated[
        bool, typer.Option(help="Plan a step while the one before runs, as on a GPU.")
    ] = False,
    requests: Annotated[int, typer.Option(help="Generated: how many.", min=1)] = 10_000,
    rate: Annotated[float, typer.Option(help="Generated: a second; 0: all at once.", min=0)] = 10.0,
    prompt: Annotated[int, typer.Option(help="Generated: median prompt tokens.", min=1)] = 200,
    output: Annotated[int, typer.Option(help="Generated: median output tokens.", min=1)] = 100,
    sigma: Annotated[float, typer.Option(help="Generated: spread of lengths.", min=0)] = 1.0,
    shared: Annotated[
        float, typer.Option(help="Generated: share with a shared beginning.", min=0, max=1)
    ] = 0.0,
    prefixes: Annotated[int, typer.Option(help="Generated: shared beginnings.", min=1)] = 10,
    prefix_tokens: Annotated[int, typer.Option(help="Generated: tokens of one.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Generated: of the random lengths.")] = 0,
    pools: Annotated[bool, typer.Option(help="Show what the books cost in larger pools.")] = True,
) -> None:
    """Plan capacity: the real scheduler under a virtual clock. The last line is JSON.

    A line of the workload: {"at": seconds, "prompt": tokens, "output": tokens}, and where wanted
    "prefix", "prefix_tokens", "priority", "n".
    """
    from astrai.observe import commands
    from astrai.observe.simulate import Shape

    shape = Shape(prompt, output, sigma, prefixes, prefix_tokens, shared)
    load = commands.Load(workload, requests, rate, shape, seed)
    static = policy is PolicyFlag.static
    setting = commands.setting_of(
        slots, pages, page_size, prefill_budget, static, prefix_cache, overlap
    )
    commands.simulate(load, setting, commands.step_time_of(step_time), pools=pools)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which; without it, what there is.")] = None,
) -> None:
    """Measure: astrai bench NAME [--json] ...; the last line is one JSON object."""
    folder = Path(__file__).with_name("bench")
    known = sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if m.name[0] != "_")
    if name in (None, "--help", "-h"):
        print("astrai bench NAME [--json], NAME one of: " + ", ".join(known))
        return
    if name not in known:
        raise CliError(f"no benchmark {name!r}; there are: {', '.join(known)}", 2)
    code = importlib.import_module(f"astrai.bench.{name}").main(context.args)
    if isinstance(code, int) and code:
        raise typer.Exit(code)


def _view(recording: Path, port: int) -> None:
    """Serve the recording in the live page to this machine, until Ctrl-C."""
    import socket

    from astrai.observe.record import Recording

    try:
        import uvicorn

        from astrai.server.playback import create_playback_app
    except ImportError as error:
        raise CliError(f"{error}: install it with pip install 'astrai[serve]'") from None
    found = Recording(recording)
    found.require_whole("the live page")
    app = create_playback_app(found.events(), recording.name)
    with socket.create_server(("127.0.0.1", port)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/live", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        server.run(sockets=[listener])


def _params(fields: dict[str, Any]) -> SamplingParams:
    """Wrong flags end the command before a model is loaded."""
    from astrai.inference.sampling_params import SamplingParams

    try:
        return SamplingParams(**fields)
    except ValueError as error:
        raise CliError(str(error), 2) from None


if __name__ == "__main__":
    main()

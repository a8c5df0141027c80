"""Plans into launches on a GPU that the host does not wait for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from astrai.inference.cache.storage import KVCache
from astrai.inference.gpu_model import GpuModel, Rows
from astrai.inference.gpu_sampling import Need, SlotEdits
from astrai.inference.gpu_state import SlotState, Staging
from astrai.inference.runner import looks_back, outcome_of, pooled, sample_row
from astrai.inference.sampler import Draws, Sampler
from astrai.inference.task import NOTHING, Entry, Outcome, Plan, Task, TokenLogprob
from astrai.kernels.triton.elementwise import scatter
from astrai.kernels.triton.launch import compile_ahead
from astrai.kernels.triton.prefill_attention import TILE
from astrai.kernels.triton.sampling import SamplingScratch, sample
from astrai.models.decoder import Decoder

# Rows of the decode graphs: a batch runs in the next larger one. Weights cost the same for any
# number of rows up to some hundreds, so the steps may be wide.
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_BUCKET_STEP = 32
# Prompt positions of the prefill graphs. They pay as long as launching the kernels of a layer one
# by one takes longer than computing the layer.
_CHUNK_BUCKETS = (32, 64, 128, 256, 384, 512, 768, 1024)
_LAUNCH_SECONDS, _FLOPS_PER_SECOND = 300e-6, 600e12
_CHUNK_ENDS = 8  # sampling rows of a prefill graph
# Changes of slot state that fit the staging memory; more go in a copy of their own.
_CHANGES = 8192
# Prompt positions whose logits exist at once: bounds the memory of prompt_logprobs.
_LOGPROB_ROWS = 64
# Launches whose results may be unread, and one more that is being written.
_RING = 4


class _Drawn(NamedTuple):
    """One pass's results: views of pinned memory, valid once the launch's event has passed."""

    tokens: np.ndarray  # int32
    tops: np.ndarray  # float32, the largest logit of each row


class _Slow(NamedTuple):
    """Rows that the general sampler drew."""

    places: list[int]  # entry indices, in the order of the draws
    draws: Draws


class GpuLaunch:
    """A plan on its way. Owns what its results need until they are read once."""

    def __init__(self, entries: Sequence[Entry], event: torch.cuda.Event | None) -> None:
        self.entries = entries
        self.places: list[int] = []  # entry index of each result row
        self.drawn: list[_Drawn] = []
        self.slow: list[_Slow] = []
        self.scored: dict[int, list[TokenLogprob]] = {}
        self.hidden: dict[int, Tensor] = {}  # states of the rows of entries that pool
        self._event = event
        self._outcomes: list[Outcome] | None = None

    def wait(self) -> list[Outcome]:
        if self._outcomes is None:
            if self._event is not None:
                self._event.synchronize()
            self._outcomes = self._read()
            self.slow, self.scored, self.hidden = [], {}, {}
        return self._outcomes

    def token_of(self, task: Task) -> int | None:
        """The token this launch sampled for the task; None if it sampled none."""
        for entry, outcome in zip(self.entries, self.wait()):
            if entry.task is task and entry.samples:
                return outcome.token
        return None

    def _read(self) -> list[Outcome]:
        outcomes = [NOTHING] * len(self.entries)
        self._read_fast(outcomes)
        for slow in self.slow:
            for place, drawn in zip(slow.places, slow.draws.read()):
                outcomes[place] = outcome_of(drawn)
        for place, scored in self.scored.items():
            outcomes[place] = outcomes[place]._replace(prompt_logprobs=scored)
        for place, hidden in self.hidden.items():
            outcomes[place] = pooled(hidden, self.entries[place])
        return outcomes

    def _read_fast(self, outcomes: list[Outcome]) -> None:
        if not self.places:
            return
        tokens = np.concatenate([tokens for tokens, _ in self.drawn]).tolist()
        tops = np.concatenate([tops for _, tops in self.drawn])
        if np.isfinite(tops).all():
            for place, token in zip(self.places, tokens):
                outcomes[place] = Outcome(token)
        else:
            for place, token, top in zip(self.places, tokens, tops.tolist()):
                why = f"no token can be drawn: the largest logit is {top}"
                fine = math.isfinite(top)
                outcomes[place] = Outcome(token) if fine else Outcome(error=why)


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    output: Tensor  # where a replay leaves its result


class GpuRunner:
    """Runs plans without waiting: uploads what changed, prefill, then decode as one graph.

    Everything is ordered by one stream. A token that the host has not read yet is taken from the
    slot state, where the launch before this one left it.

    Owns the stream, graphs, slot state and staging memory, and the model's scratch. Does not own
    tasks or the books: it reads page tables and tokens of the tasks in the plan, in the owner
    thread.
    """

    depth = 1

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        sampler: Sampler,
        max_slots: int,
        max_chunk: int,
        max_model_len: int,
        graphs: bool = True,
    ) -> None:
        self.decoder = decoder
        self.kv = kv
        self.sampler = sampler
        self.device = decoder.device
        self.max_slots = max_slots
        self.max_chunk = max_chunk
        on_gpu = self.device.type == "cuda"
        self.graphs = graphs and on_gpu
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None
        with torch.cuda.stream(self.stream), torch.inference_mode():
            self.state = SlotState(max_slots, -(-max_model_len // kv.page_size), self.device)
            self.model = GpuModel(decoder, kv, self.state)
            vocab_size = decoder.config.vocab_size
            self._scratch = SamplingScratch(vocab_size, max_slots, self.device)
            self.edits = SlotEdits(vocab_size, max_slots, self.device)
            self._steps, self._chunks = self._staging()
            # tokens and tops of decode rows, tokens and tops of prefill rows
            self._results = torch.zeros(4, max_slots, dtype=torch.int32, device=self.device)
            self._read = [
                torch.zeros(4, max_slots, dtype=torch.int32, pin_memory=on_gpu)
                for _ in range(_RING)
            ]
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None
        # Of a bucket and what its sampling gives: nobody pays for what no row of a tick needs.
        self._decode_graphs: dict[tuple[int, Need], _Captured] = {}
        self._prefill_graphs: dict[tuple[int, Need], _Captured] = {}
        most = min(max_chunk, _LAUNCH_SECONDS * _FLOPS_PER_SECOND / self.model.layer_flops)
        self._chunk_buckets = [bucket for bucket in _CHUNK_BUCKETS if bucket <= most]
        # Of each slot, the launch that sampled for it last.
        self._sampled: list[GpuLaunch | None] = [None] * max_slots
        self._turn = 0
        # Bucket, slots and positions of the decode rows that the device will have next by itself.
        self._follows: tuple[int, list[int], list[int]] | None = None
        if on_gpu:
            torch.cuda.synchronize(self.device)  # what others put on other streams is done

    def _staging(self) -> tuple[Staging, Staging]:
        slots, rows = self.max_slots, self.max_chunk
        n_tiles = rows // TILE + max(slots, _CHUNK_ENDS) + 1
        steps = Staging(
            {"slots": slots, "positions": slots, "tokens": slots, "changes": 2 * _CHANGES},
            self.device,
        )
        chunks = Staging(
            {
                "end_rows": slots, "end_slots": slots, "end_positions": slots,
                "tiles": 4 * n_tiles, "slots": rows, "positions": rows, "tokens": rows,
            },
            self.device,
        )  # fmt: skip
        return steps, chunks

    def warm(self) -> None:
        """Compile the kernels and capture the graphs a first short request needs."""
        if self.graphs:
            with torch.cuda.stream(self.stream), torch.inference_mode():
                compile_ahead(self._launch_all)
                self._decode_graph(1, Need.HEAT)
                for bucket in self._chunk_buckets[:1]:
                    self._prefill_graph(bucket, Need.HEAT)
            torch.cuda.synchronize(self.device)

    def _launch_all(self) -> None:
        """What `warm` and the first uploads launch, on rows that stand nowhere."""
        scatter(self.state.arena, self._steps.views["changes"], 1)
        for name in ("positions", "tokens"):
            self._steps.views[name].fill_(-1)
        bucket = min(_CHUNK_BUCKETS[0], self.max_chunk)
        hidden = self._prefill_rows(bucket, _graph_tiles(bucket))
        n_ends = min(_CHUNK_ENDS, self.max_slots)
        # Kernels are compiled for any size: the tables of edits are made when they are needed.
        edits, self.edits = self.edits, SlotEdits(self._scratch.vocab_size, n_ends, self.device)
        for need in (Need.HEAT, Need.LIMITS, Need.EDITS):
            self._decode_rows(1, need)
            self._sample_ends(hidden, n_ends, need)
        self.edits = edits

    def launch(self, plan: Plan) -> GpuLaunch:
        with torch.cuda.stream(self.stream), torch.inference_mode():
            try:
                return self._launch(plan)
            except Exception:
                self.state.forget()
                self._follows = None
                raise

    def _launch(self, plan: Plan) -> GpuLaunch:
        entries = list(plan.entries.values())
        event = torch.cuda.Event() if self.device.type == "cuda" else None
        launch = GpuLaunch(entries, event)
        steps: list[int] = []
        chunks: list[int] = []
        for i, (task, _, n, samples, epoch) in enumerate(entries):
            self.state.follow(task, epoch)
            (steps if n == 1 and samples else chunks).append(i)
        self.edits.seat(self.state.take_seated())
        self.kv.clear_pages(plan.clears)
        for source, target in plan.copies:
            self.kv.copy_page(source, target)
        bucket = self._upload_steps(entries, steps)
        if chunks:
            self._prefill(launch, chunks)
        if steps:
            self._decode(launch, steps, bucket)
        self._turn = (self._turn + 1) % _RING
        results = self._read[self._turn]
        results.copy_(self._results, non_blocking=True)
        if event is not None:
            event.record()
        ends = [i for i in chunks if entries[i].samples]
        _point(launch, results, steps, ends)
        for task, _, _, samples, _ in entries:
            if samples:
                self._sampled[task.slot] = launch
        return launch

    # ── decode ──────────────────────────────────────────────────────────────────────────────────

    def _upload_steps(self, entries: list[Entry], steps: list[int]) -> int:
        """Rows of the decode entries and every change of slot state; the bucket they run in."""
        changes = self.state.take_changes()
        n = len(steps)
        bucket = self._bucket(n) if n else 0
        tasks = [entries[i].task for i in steps]
        slots = [task.slot for task in tasks]
        positions = [entries[i].start for i in steps]
        tokens = [_known(task, position) for task, position in zip(tasks, positions)]
        unknown = n > 0 and max(tokens) < 0
        # The same rows one position further: the device has moved them on by itself.
        if not (unknown and not len(changes) and self._follows == (bucket, slots, positions)):
            staging = self._steps
            staging.begin()
            staging.put("slots", slots, bucket, self.state.padding_slot)
            staging.put("positions", positions, bucket, -1)
            staging.put("tokens", tokens, bucket, 0)
            if 0 < len(changes) <= _CHANGES:
                staging.put("changes", changes.reshape(-1))
            staging.copy()
        following = [position + 1 for position in positions]
        self._follows = (bucket, slots, following) if unknown else None
        if len(changes) > _CHANGES:
            scatter(self.state.arena, torch.from_numpy(changes).to(self.device), len(changes))
        elif len(changes):
            scatter(self.state.arena, self._steps.views["changes"], len(changes))
        return bucket

    def _bucket(self, n: int) -> int:
        for bucket in _BUCKETS:
            if n <= bucket:
                return min(bucket, self.max_slots)
        return min(-(-n // _BUCKET_STEP) * _BUCKET_STEP, self.max_slots)

    def _decode(self, launch: GpuLaunch, steps: list[int], bucket: int) -> None:
        need = self._need(launch, steps)
        if self.graphs:
            captured = self._decode_graphs.get((bucket, need))
            captured = captured or self._decode_graph(bucket, need, restore=True)
            captured.graph.replay()
            logits = captured.output
        else:
            logits = self._decode_rows(bucket, need)
        self._draw_slow(launch, steps, logits)

    def _decode_rows(self, bucket: int, need: Need) -> Tensor:
        views = self._steps.views
        rows = Rows(views["tokens"], views["slots"], views["positions"]).first(bucket)
        logits = self.model.decode(rows)
        self._sample(logits, rows.slots, rows.positions, 0, need)
        return logits

    def _sample(
        self, logits: Tensor, slots: Tensor, positions: Tensor, line: int, need: Need
    ) -> None:
        n, state, pdl = len(slots), self.state, self.model.pdl
        if need is Need.EDITS:
            logits = self.edits.edited(logits, slots, positions, state.last, pdl)
        sample(
            self._scratch, logits, state.temperatures, state.seeds, slots, positions, state.last,
            self._results[line, :n], self._results[line + 1, :n].view(torch.float32),
            None if need is Need.HEAT else state.limits, pdl,
        )  # fmt: skip

    def _need(self, launch: GpuLaunch, places: list[int]) -> Need:
        """What the rows that the graph samples need of it, at most."""
        needs = [self.edits.needs[launch.entries[i].task.slot] for i in places]
        return max((need for need in needs if need is not Need.GENERAL), default=Need.HEAT)

    def _decode_graph(self, bucket: int, need: Need, restore: bool = False) -> _Captured:
        """Captured on padding rows, which write no page; `restore` brings this tick's rows back."""
        views = self._steps.views
        kept = {name: views[name].clone() for name in ("slots", "positions", "tokens")}
        views["slots"].fill_(self.state.padding_slot)
        views["positions"].fill_(-1)
        views["tokens"].zero_()
        self._follows = self._follows if restore else None
        captured = self._capture(lambda: self._decode_rows(bucket, need))
        self._decode_graphs[bucket, need] = captured
        if restore:
            for name, values in kept.items():
                views[name].copy_(values)
        return captured

    def _capture(self, work: Callable[[], Tensor]) -> _Captured:
        """Run once (kernels compile, libraries set themselves up), then record."""
        work()
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            output = work()
        finally:
            graph.capture_end()
        return _Captured(graph, output)

    # ── prefill ─────────────────────────────────────────────────────────────────────────────────

    def _prefill(self, launch: GpuLaunch, chunks: list[int]) -> None:
        entries = [launch.entries[i] for i in chunks]
        ends = [i for i in chunks if launch.entries[i].samples]
        n_rows = sum(entry.n for entry in entries)
        if n_rows > self.max_chunk:
            raise ValueError(f"{n_rows} prefill positions in a plan, expected <= {self.max_chunk}")
        scored = any(
            entry.task.wants_prompt_logprobs or entry.task.params.pooling for entry in entries
        )
        bucket = 0
        if self.graphs and len(ends) <= _CHUNK_ENDS and not scored and len(chunks) <= _CHUNK_ENDS:
            bucket = next((b for b in self._chunk_buckets if n_rows <= b), 0)
        need = self._need(launch, ends)
        if bucket and (bucket, need) not in self._prefill_graphs:
            self._prefill_graph(bucket, need)
        n_tiles = self._upload_chunks(entries, bucket)
        if bucket:
            captured = self._prefill_graphs[bucket, need]
            captured.graph.replay()
            logits = captured.output
        else:
            hidden = self._prefill_rows(n_rows, n_tiles)
            if scored:
                self._score_prompts(launch, chunks, hidden)
                self._keep_hidden(launch, chunks, hidden)
            if not ends:
                return
            logits = self._sample_ends(hidden, len(ends), need)
        self._draw_slow(launch, ends, logits)

    def _prefill_rows(self, n_rows: int, n_tiles: int) -> Tensor:
        views = self._chunks.views
        rows = Rows(views["tokens"], views["slots"], views["positions"]).first(n_rows)
        return self.model.prefill(rows, views["tiles"].view(-1, 4), n_tiles)

    def _sample_ends(self, hidden: Tensor, n: int, need: Need) -> Tensor:
        views = self._chunks.views
        logits = self.model.logits(hidden, views["end_rows"][:n])
        self._sample(logits, views["end_slots"][:n], views["end_positions"][:n], 2, need)
        return logits

    def _upload_chunks(self, entries: list[Entry], bucket: int) -> int:
        """Rows, tiles and sampling rows, padded to the bucket if there is one; tiles in all."""
        slots, positions, tokens = [], [], []
        tiles: list[int] = []
        end_rows, end_slots, end_positions = [], [], []
        row = 0
        for task, start, n, samples, _ in entries:
            slots.append(np.full(n, task.slot, np.int32))
            positions.append(np.arange(start, start + n, dtype=np.int32))
            known = task.tokens[start : start + n]
            tokens.append(np.array(known + [-1] * (n - len(known)), dtype=np.int32))
            for done in range(0, n, TILE):
                tiles += (row + done, start + done, min(TILE, n - done), task.slot)
            row += n
            if samples:
                end_rows.append(row - 1)
                end_slots.append(task.slot)
                end_positions.append(start + n - 1)
        padding, staging = self.state.padding_slot, self._chunks
        room = min(_CHUNK_ENDS, self.max_slots) if bucket else 0
        n_tiles = _graph_tiles(bucket) if bucket else len(tiles) // 4
        staging.begin()
        staging.put("end_rows", end_rows, room)
        staging.put("end_slots", end_slots, room, padding)
        staging.put("end_positions", end_positions, room, -1)
        staging.put("tiles", tiles, 4 * n_tiles)
        staging.put("slots", np.concatenate(slots), bucket, padding)
        staging.put("positions", np.concatenate(positions), bucket, -1)
        staging.put("tokens", np.concatenate(tokens), bucket)
        staging.copy()
        return n_tiles

    def _prefill_graph(self, bucket: int, need: Need) -> None:
        staging, padding = self._chunks, self.state.padding_slot
        staging.device.zero_()
        for name in ("slots", "end_slots"):
            staging.views[name].fill_(padding)
        for name in ("positions", "end_positions"):
            staging.views[name].fill_(-1)
        ends = min(_CHUNK_ENDS, self.max_slots)

        def work() -> Tensor:
            hidden = self._prefill_rows(bucket, _graph_tiles(bucket))
            return self._sample_ends(hidden, ends, need)

        self._prefill_graphs[bucket, need] = self._capture(work)

    def _score_prompts(self, launch: GpuLaunch, chunks: list[int], hidden: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the positions of each chunk."""
        first = 0
        for i in chunks:
            task, start, n, _, _ = launch.entries[i]
            top = task.params.prompt_logprobs
            targets = task.prompt[start + 1 : start + n + 1]
            if top is not None and task.wants_prompt_logprobs:
                scored: list[TokenLogprob] = []
                for at in range(0, len(targets), _LOGPROB_ROWS):
                    part = targets[at : at + _LOGPROB_ROWS]
                    rows = torch.arange(len(part), dtype=torch.int32, device=self.device)
                    logits = self.model.logits(hidden, rows + (first + at)).float()
                    scores = self.sampler.prompt_logprobs(logits, part, top)
                    scored += [TokenLogprob(token, *score) for token, score in zip(part, scores)]
                launch.scored[i] = scored
            first += n

    def _keep_hidden(self, launch: GpuLaunch, chunks: list[int], hidden: Tensor) -> None:
        """The states that pooling reads, normed, until the launch's event has passed."""
        first = 0
        for i in chunks:
            entry = launch.entries[i]
            if entry.task.params.pooling is not None:
                rows = torch.arange(first, first + entry.n, dtype=torch.int32, device=self.device)
                launch.hidden[i] = self.model.normed(hidden, rows)
            first += entry.n

    # ── what the fast path does not do ──────────────────────────────────────────────────────────

    def _draw_slow(self, launch: GpuLaunch, places: list[int], logits: Tensor) -> None:
        """Rows of which the graph lacks something, drawn by the general sampler."""
        entries = launch.entries
        needs = [self.edits.needs[entries[i].task.slot] for i in places]
        rows = [r for r, need in enumerate(needs) if need is Need.GENERAL]
        if not rows:
            return
        chosen = [places[r] for r in rows]
        wanted = [
            sample_row(e, self._output_ids(e) if looks_back(e.task) else [])
            for e in (entries[i] for i in chosen)
        ]
        at = torch.tensor(rows, device=self.device)
        draws = self.sampler.launch(logits[at].float(), wanted)
        slots = torch.tensor([entries[i].task.slot for i in chosen], device=self.device)
        turns = torch.tensor([row.position & 1 for row in wanted], device=self.device)
        self.state.last[slots, turns] = draws.tokens.to(torch.int32)
        launch.slow.append(_Slow(chosen, _to_host(draws)))

    def _output_ids(self, entry: Entry) -> list[int]:
        """The task's output; what a launch before this one sampled is waited for."""
        task = entry.task
        output_ids = task.tokens[task.n_prompt :]
        if entry.start + entry.n > len(task.tokens):
            launch = self._sampled[task.slot]
            token = None if launch is None else launch.token_of(task)
            if token is None:
                raise RuntimeError(
                    f"task {task.id}: position {len(task.tokens)} was sampled by no launch"
                )
            output_ids.append(token)
        return output_ids


def _known(task: Task, position: int) -> int:
    """The token at `position`, or -1 while only the device has it."""
    return task.tokens[position] if position < len(task.tokens) else -1


def _graph_tiles(bucket: int) -> int:
    return bucket // TILE + _CHUNK_ENDS


def _point(launch: GpuLaunch, results: Tensor, steps: list[int], ends: list[int]) -> None:
    """Where in `results` the launch finds its rows."""
    lines = results.numpy()
    for line, places in ((0, steps), (2, ends)):
        if places:
            n = len(places)
            launch.places += places
            launch.drawn.append(_Drawn(lines[line, :n], lines[line + 1, :n].view(np.float32)))


def _to_host(draws: Draws) -> Draws:
    """The same draws in pinned memory, to be read after the launch's event, not before."""

    def host(x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return x
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return pinned.copy_(x, non_blocking=True)

    parts = [
        part._replace(
            own=host(part.own), peak=host(part.peak), mass=host(part.mass), rank=host(part.rank),
            at=None if part.at is None else host(part.at),
            values=None if part.values is None else host(part.values),
        )
        for part in draws.scores
    ]  # fmt: skip
    return draws._replace(tokens=host(draws.tokens), peaks=host(draws.peaks), scores=parts)

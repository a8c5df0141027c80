"""Plans into launches on a GPU that the host does not wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from astrai.inference.cache.storage import PagedCache
from astrai.inference.task import Entry, Plan, Task, TokenLogprob
from astrai.kernels.gpu.elementwise import scatter
from astrai.kernels.gpu.launch import compile_ahead
from astrai.kernels.gpu.prefill_attention import TILE
from astrai.kernels.gpu.sampling.sampling import SamplingScratch
from astrai.models.decoder import Decoder
from astrai.runtime.gpu.launch import ENDS, STEPS, GpuLaunch, Slow, new_results, to_host
from astrai.runtime.gpu.model import SPARE_ROWS, GpuModel, Rows, pick_ends
from astrai.runtime.gpu.sampling import Need, SlotEdits, draw
from astrai.runtime.gpu.uploads import SlotState, Staging
from astrai.runtime.runner import looks_back, sample_row
from astrai.runtime.sampling.sampler import Sampler

# Rows of the decode graphs: a batch runs in the next larger one. Weights cost the same for any
# number of rows up to some hundreds, so the steps may be wide.
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_BUCKET_STEP = 32
# Prompt positions of the prefill graphs. They pay as long as launching the kernels of a layer one
# by one takes longer than computing the layer.
_CHUNK_BUCKETS = (32, 64, 128, 256, 384, 512, 768, 1024)
_LAUNCH_SECONDS, _FLOPS_PER_SECOND = 300e-6, 600e12
_CHUNK_ENDS = 8  # prompts of a prefill graph
# Up to this many prompt positions of a graph share the pass of a tick's steps, and the weights are
# read once for both.
_MIXED_CHUNK = 256
# Changes of slot state that fit the staging memory; more go in a copy of their own.
_CHANGES = 8192
# Launches whose results may be unread, and one more that is being written.
_RING = 4


class Form(NamedTuple):
    """What is computed together, padding included: a graph is captured for one form."""

    n_steps: int  # rows of one new position each
    n_rows: int  # prompt positions
    n_tiles: int  # of prefill attention
    n_ends: int  # prompts that sample
    need: Need  # nobody pays for what no row of a tick needs


def step_form(n_steps: int, need: Need) -> Form:
    return Form(n_steps, 0, 0, 0, need)


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits: Tensor  # where a replay leaves them: the steps', then the ends'


class _Pass(NamedTuple):
    """Some entries of a plan that go through the model together."""

    steps: list[int]  # entry indices
    chunks: list[int]
    ends: list[int]  # those of `chunks` that sample
    form: Form
    captured: _Captured | None  # None: launched kernel by kernel


class GpuRunner:
    """Runs plans without waiting: uploads what changed, then one pass for steps and chunks.

    A pass is a graph, or launched kernel by kernel where its chunks are too many or too long for
    one. Chunks of a middle length are a graph of their own before that of the steps: graphs for
    every pair would be too many. Everything is ordered by one stream. A token that the host has not
    read yet is taken from the slot state, where the launch before this one left it.

    Owns the stream, graphs, slot state and staging memory, and the model's scratch. Does not own
    tasks or the books: it reads page tables and tokens of the tasks in the plan, in the owner
    thread.
    """

    depth = 1

    def __init__(
        self,
        decoder: Decoder,
        kv: PagedCache,
        sampler: Sampler,
        max_slots: int,
        max_chunk: int,
        max_model_len: int,
    ) -> None:
        self.decoder = decoder
        self.kv = kv
        self.sampler = sampler
        self.device = decoder.device
        self.max_slots = max_slots
        self.max_chunk = max_chunk
        on_gpu = self.device.type == "cuda"
        self.graphs = on_gpu
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None
        with torch.cuda.stream(self.stream), torch.inference_mode():
            self.state = SlotState(max_slots, -(-max_model_len // kv.page_size), self.device)
            self.model = GpuModel(decoder, kv, self.state)
            vocab_size = decoder.config.vocab_size
            self._scratch = SamplingScratch(vocab_size, max_slots, self.device)
            self.edits = SlotEdits(vocab_size, max_slots, self.device)
            self._steps, self._chunks = self._staging()
            self._results = new_results(max_slots, self.device)
            self._read = [
                new_results(max_slots, torch.device("cpu"), pinned=on_gpu) for _ in range(_RING)
            ]
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None
        self._graphs: dict[Form, _Captured] = {}
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
                self._capture(step_form(1, Need.HEAT))
                for bucket in self._chunk_buckets[:1]:
                    self._capture(self._chunk_form(0, bucket, Need.HEAT))
            torch.cuda.synchronize(self.device)
            self.model.compile_long(self.max_chunk)

    def _launch_all(self) -> None:
        """What `warm` and the first uploads launch, on rows that stand nowhere."""
        scatter(self.state.arena, self._steps.views["changes"], 1)
        self._blank()
        bucket = min(_CHUNK_BUCKETS[0], self.max_chunk)
        chunk = self._chunk_form(0, bucket, Need.HEAT)
        # Kernels are compiled for any size: the tables of edits are made when they are needed.
        edits, vocab_size = self.edits, self._scratch.vocab_size
        self.edits = SlotEdits(vocab_size, chunk.n_ends, self.device)
        for need in (Need.HEAT, Need.LIMITS, Need.EDITS, Need.SCORES):
            self._compute(step_form(1, need))
            self._compute(chunk._replace(need=need))
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
        passes = self._passes(entries, steps, chunks)  # capturing writes where uploads go
        self._upload_steps(entries, steps)
        for each in passes:
            self._run(launch, each)
        scored = any(each.form.need is Need.SCORES for each in passes)
        self._send_results(launch, steps, [i for i in chunks if entries[i].samples], scored)
        for task, _, _, samples, _ in entries:
            if samples:
                self._sampled[task.slot] = launch
        return launch

    def _send_results(
        self, launch: GpuLaunch, steps: list[int], ends: list[int], scored: bool
    ) -> None:
        """On their way to the host, in memory that is written again `_RING` launches later."""
        self._turn = (self._turn + 1) % _RING
        results = self._read[self._turn]
        results.drawn.copy_(self._results.drawn, non_blocking=True)
        if scored:
            results.scores.copy_(self._results.scores, non_blocking=True)
        if launch.event is not None:
            launch.event.record()
        launch.point(results, STEPS, steps, scored)
        launch.point(results, ENDS, ends, scored)

    # ── what is computed together ───────────────────────────────────────────────────────────────

    def _passes(self, entries: list[Entry], steps: list[int], chunks: list[int]) -> list[_Pass]:
        """Chunks join the steps, unless they are long enough for a graph of their own."""
        n_rows = sum(entries[i].n for i in chunks)
        if n_rows > self.max_chunk:
            raise ValueError(f"{n_rows} prefill positions in a plan, expected <= {self.max_chunk}")
        bucket = 0
        if 0 < len(chunks) <= _CHUNK_ENDS and not any(_scored(entries[i]) for i in chunks):
            bucket = next((b for b in self._chunk_buckets if n_rows <= b), 0)
        if steps and chunks and bucket <= _MIXED_CHUNK:
            return [self._pass(entries, steps, chunks, bucket)]
        passes = [self._pass(entries, [], chunks, bucket)] if chunks else []
        return passes + ([self._pass(entries, steps, [], 0)] if steps else [])

    def _pass(
        self, entries: list[Entry], steps: list[int], chunks: list[int], bucket: int
    ) -> _Pass:
        """bucket: prompt positions of the graph for the chunks; 0: there is none, or no chunk."""
        ends = [i for i in chunks if entries[i].samples]
        need = self._need(entries, steps + ends)
        n_steps = self._bucket(len(steps)) if steps else 0
        if bucket:
            form = self._chunk_form(n_steps, bucket, need)
        else:
            counts = [entries[i].n for i in chunks]
            n_tiles = sum(-(-n // TILE) for n in counts)
            form = Form(n_steps, sum(counts), n_tiles, len(ends), need)
        captured = None
        if self.graphs and (bucket or not chunks):
            captured = self._graphs.get(form) or self._capture(form)
        return _Pass(steps, chunks, ends, form, captured)

    def _chunk_form(self, n_steps: int, bucket: int, need: Need) -> Form:
        n_ends = min(_CHUNK_ENDS, self.max_slots)
        return Form(n_steps, bucket, bucket // TILE + _CHUNK_ENDS, n_ends, need)

    def _bucket(self, n: int) -> int:
        for bucket in _BUCKETS:
            if n <= bucket:
                return min(bucket, self.max_slots)
        return min(-(-n // _BUCKET_STEP) * _BUCKET_STEP, self.max_slots)

    def _need(self, entries: Sequence[Entry], places: list[int]) -> Need:
        """What the rows that the graph samples need of it, at most."""
        needs = [self.edits.needs[entries[i].task.slot] for i in places]
        return max((need for need in needs if need is not Need.GENERAL), default=Need.HEAT)

    def _capture(self, form: Form) -> _Captured:
        """Run once on rows that stand nowhere (kernels compile), then record."""
        self._blank()
        self._compute(form)
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            logits = self._compute(form)
        finally:
            graph.capture_end()
        captured = self._graphs[form] = _Captured(graph, logits)
        return captured

    def _blank(self) -> None:
        """Rows that write no page, in the place of uploaded ones."""
        self._follows = None
        for staging in (self._steps, self._chunks):
            staging.device.zero_()
            for name, view in staging.views.items():
                if name.endswith("slots"):
                    view.fill_(self.state.padding_slot)
                elif name.endswith("positions"):
                    view.fill_(-1)

    # ── uploads ─────────────────────────────────────────────────────────────────────────────────

    def _upload_steps(self, entries: list[Entry], steps: list[int]) -> None:
        """Rows of the steps, padded to their bucket, and every change of slot state."""
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

    def _upload_chunks(self, entries: list[Entry], form: Form) -> None:
        """Rows, tiles and sampling rows of the chunks, padded to the form."""
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
        staging.begin()
        staging.put("end_rows", end_rows, form.n_ends)
        staging.put("end_slots", end_slots, form.n_ends, padding)
        staging.put("end_positions", end_positions, form.n_ends, -1)
        staging.put("tiles", tiles, 4 * form.n_tiles)
        staging.put("slots", np.concatenate(slots), form.n_rows, padding)
        staging.put("positions", np.concatenate(positions), form.n_rows, -1)
        staging.put("tokens", np.concatenate(tokens), form.n_rows)
        staging.copy()

    # ── computing ───────────────────────────────────────────────────────────────────────────────

    def _run(self, launch: GpuLaunch, each: _Pass) -> None:
        entries, form = launch.entries, each.form
        if each.chunks:
            self._upload_chunks([entries[i] for i in each.chunks], form)
        if each.captured is not None:
            each.captured.graph.replay()
            logits = each.captured.logits
        else:
            scored = any(_scored(entries[i]) for i in each.chunks)
            keep = (lambda states: self._keep(launch, each.chunks, states)) if scored else None
            logits = self._compute(form, keep)
        rows = [*range(len(each.steps)), *range(form.n_steps, form.n_steps + len(each.ends))]
        self._draw_slow(launch, each.steps + each.ends, rows, logits)

    def _compute(self, form: Form, keep: Callable[[Tensor], None] | None = None) -> Tensor:
        """Logits of the steps, then of the ends, after sampling from them.

        keep: is shown the states of all rows of the chunks [n_rows, hidden_size].
        """
        model, views = self.model, self._chunks.views
        n_steps, n_ends = form.n_steps, form.n_ends
        steps = _rows(self._steps, n_steps)
        if form.n_rows:
            chunks, tiles = _rows(self._chunks, form.n_rows), views["tiles"].view(-1, 4)
            ends = views["end_rows"][:n_ends]
            if keep is None:
                states = model.prefill(chunks, tiles, form.n_tiles, steps, ends)
            else:
                states = model.prefill(chunks, tiles, form.n_tiles, steps, None)
                keep(states[n_steps:])
                states = pick_ends(states, n_steps, ends)
            logits = model.logits(states)
        else:
            logits = model.decode(steps)
        if n_steps:
            self._draw(logits[:n_steps], steps.slots, steps.positions, STEPS, form.need)
        if n_ends:
            slots, positions = views["end_slots"][:n_ends], views["end_positions"][:n_ends]
            self._draw(logits[n_steps:], slots, positions, ENDS, form.need)
        return logits

    def _draw(
        self, logits: Tensor, slots: Tensor, positions: Tensor, line: int, need: Need
    ) -> None:
        out = self._results.line(line, len(slots))
        draw(
            self._scratch, self.edits, self.state, logits, slots, positions, out, need,
            self.model.pdl,
        )  # fmt: skip

    # ── what the fast path does not do ──────────────────────────────────────────────────────────

    def _keep(self, launch: GpuLaunch, chunks: list[int], states: Tensor) -> None:
        self._score_prompts(launch, chunks, states)
        self._keep_states(launch, chunks, states)

    def _score_prompts(self, launch: GpuLaunch, chunks: list[int], states: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the positions of each chunk."""
        first = 0
        for i in chunks:
            task, start, n, _, _ = launch.entries[i]
            top = task.params.prompt_logprobs
            targets = task.prompt[start + 1 : start + n + 1]
            if top is not None and task.wants_prompt_logprobs:
                scored: list[TokenLogprob] = []
                for at in range(0, len(targets), SPARE_ROWS):
                    part = targets[at : at + SPARE_ROWS]
                    begin = first + at
                    logits = self.model.logits(states[begin : begin + len(part)]).float()
                    scores = self.sampler.prompt_logprobs(logits, part, top)
                    scored += [TokenLogprob(token, *score) for token, score in zip(part, scores)]
                launch.scored[i] = scored
            first += n

    def _keep_states(self, launch: GpuLaunch, chunks: list[int], states: Tensor) -> None:
        """Those that pooling reads, until the launch's event has passed."""
        first = 0
        for i in chunks:
            entry = launch.entries[i]
            if entry.task.params.pooling is not None:
                launch.hidden[i] = states[first : first + entry.n].clone()
            first += entry.n

    def _draw_slow(
        self, launch: GpuLaunch, places: list[int], rows: list[int], logits: Tensor
    ) -> None:
        """Those of `rows` of which the graph lacks something, drawn by the general sampler."""
        entries = launch.entries
        lacking = [
            (place, row)
            for place, row in zip(places, rows)
            if self.edits.needs[entries[place].task.slot] is Need.GENERAL
        ]
        if not lacking:
            return
        chosen = [place for place, _ in lacking]
        wanted = [
            sample_row(e, self._output_ids(e) if looks_back(e.task) else [])
            for e in (entries[i] for i in chosen)
        ]
        at = torch.tensor([row for _, row in lacking], device=self.device)
        draws = self.sampler.launch(logits[at].float(), wanted)
        slots = torch.tensor([entries[i].task.slot for i in chosen], device=self.device)
        turns = torch.tensor([row.position & 1 for row in wanted], device=self.device)
        self.state.last[slots, turns] = draws.tokens.to(torch.int32)
        launch.slow.append(Slow(chosen, to_host(draws)))

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


def _rows(staging: Staging, n: int) -> Rows:
    views = staging.views
    return Rows(views["tokens"][:n], views["slots"][:n], views["positions"][:n])


def _scored(entry: Entry) -> bool:
    """Its states are read, not only sampled from."""
    return entry.task.wants_prompt_logprobs or entry.task.params.pooling is not None

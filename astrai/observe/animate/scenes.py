"""The two scenes, drawn with Manim from what `story` tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from manim import (
    BLACK,
    DOWN,
    LEFT,
    RIGHT,
    UP,
    WHITE,
    AnimationGroup,
    Arrow,
    Circle,
    Create,
    CurvedArrow,
    FadeIn,
    FadeOut,
    GrowFromEdge,
    LaggedStart,
    ManimColor,
    Mobject,
    Rectangle,
    RoundedRectangle,
    Scene,
    Text,
    Transform,
    VGroup,
    Write,
)

from astrai.observe.animate.story import CacheStory, Moment, PoolState, Step, label, occupied_mask

_INK = ManimColor("#e8eaf0")
_DIM = ManimColor("#8a93a6")
_LINE = ManimColor("#46506a")
_PANEL = ManimColor("#1b2233")
_GROUND = ManimColor("#10141f")
_FREE = ManimColor("#2b3550")
_CACHED = ManimColor("#6b7280")
_OTHER = ManimColor("#aab2c5")  # held by a request that is not one of the actors
# Told apart by brightness too, for those who do not see all colours.
_HUES = [
    ManimColor(h)
    for h in (
        "#4cc9f0", "#f9a03f", "#90be6d", "#e56b6f", "#c792ea", "#ffd166",
        "#2a9d8f", "#f4b6c2", "#7b8cff", "#c2c5aa", "#ff7f50", "#b5e48c",
    )
]  # fmt: skip
_MONO = "DejaVu Sans Mono"
_SANS = "DejaVu Sans"

_PHASES = ("CLEANUP", "REFILL", "PREFILL", "DECODE")
_SHOWN_FRAMES = 16  # page frames of a larger pool that fit legibly in a row
_SLOW, _FAST = 0.55, 0.12  # seconds for a tick worth looking at, and for any other


@dataclass(frozen=True, slots=True)
class Facts:
    """What a scene says about the run besides its events."""

    model: str
    n_slots: int
    n_pages: int
    page_size: int
    n_layers: int
    n_kv_heads: int
    head_dim: int
    grouping: str  # "position" or "length": what the tasks of a decode group have in common
    ratio: float | None  # static / continuous in time, as measured; None: not measured
    measured_slots: int | None


class Film(Scene):
    """Scenes one after the other. Owns nothing but what is on the screen."""

    def __init__(
        self, facts: Facts, told: Sequence[Moment], cache: CacheStory | None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.facts = facts
        self.told = told
        self.cache = cache
        self.camera.background_color = _GROUND

    def construct(self) -> None:
        if self.told:
            _Batching(self).play()
        if self.cache is not None:
            _Cache(self, self.cache).play()

    def clear_stage(self) -> None:
        if self.mobjects:
            self.play(*(FadeOut(m) for m in self.mobjects), run_time=0.6)

    def title(self, name: str, under: str) -> None:
        head = _text(name, 52, weight="BOLD")
        below = _text(under, 22, _DIM).next_to(head, DOWN, buff=0.35)
        self.play(Write(head), run_time=1.0)
        self.play(FadeIn(below, shift=0.2 * UP), run_time=0.5)
        self.wait(1.0)
        self.clear_stage()


def _text(words: str, size: float, color: ManimColor = _INK, **options: Any) -> Text:
    return Text(words, font=_SANS, font_size=size, color=color, **options)


def _code(words: str, size: float, color: ManimColor = _INK) -> Text:
    return Text(words, font=_MONO, font_size=size, color=color)


def _hue(number: int) -> ManimColor:
    return _HUES[number % len(_HUES)]


def _bits(mask: int, width: int) -> str:
    return f"0b{mask:0{width}b}"


class _Batching:
    """Tokens of the run's requests moving through the loop, tick by tick."""

    def __init__(self, film: Film) -> None:
        self.film = film
        self.told = film.told
        order = list(dict.fromkeys(t for m in self.told for t in (*m.waiting, *m.slots, *m.ended)))
        self.number = {task: i for i, task in enumerate(sorted(order))}
        self.tokens: dict[int, VGroup] = {}
        self.shown_groups = False

    def play(self) -> None:
        facts = self.film.facts
        self.film.title(
            "Continuous Batching",
            f"{len(self.number)} requests of one run of {facts.model}, {facts.n_slots} slots",
        )
        self._stage()
        quiet = 0
        for moment in self.told:
            eventful = moment.eventful or self._new_group(moment)
            quiet = 0 if eventful else quiet + 1
            # A long stretch of plain decode steps is shown by its counter alone.
            if eventful or quiet <= 2 or quiet % 8 == 0:
                self._tick(moment, _SLOW if eventful else _FAST)
        self.film.wait(0.6)
        if facts.ratio is not None:
            self.film.clear_stage()
            self._bars(facts.ratio, facts.measured_slots)
        self.film.wait(1.2)
        self.film.clear_stage()

    def _stage(self) -> None:
        self.boxes: dict[str, RoundedRectangle] = {}
        parts: list[Mobject] = []
        for i, name in enumerate(_PHASES):
            box = RoundedRectangle(
                width=2.7, height=2.3, corner_radius=0.15, color=_LINE, fill_color=_PANEL,
                fill_opacity=1, stroke_width=2,
            )  # fmt: skip
            box.move_to((-4.8 + 3.2 * i, 1.1, 0))
            self.boxes[name] = box
            parts += [box, _text(name, 20, weight="BOLD").next_to(box.get_top(), DOWN, buff=0.12)]
        arrows = [
            Arrow(
                self.boxes[a].get_right(), self.boxes[b].get_left(), buff=0.06, color=_DIM,
                stroke_width=4, max_tip_length_to_length_ratio=0.4,
            )
            for a, b in pairwise(_PHASES)
        ]  # fmt: skip
        loop = CurvedArrow(
            self.boxes["DECODE"].get_top() + 0.05 * UP,
            self.boxes["CLEANUP"].get_top() + 0.05 * UP,
            angle=0.42,
            color=_DIM,
        )
        each = _text("per token", 20, _DIM).move_to((0, 3.35, 0))
        self.count = _code("tick", 22).to_corner(UP + LEFT, buff=0.3)
        self.queue_title = _text("waiting", 18, _DIM).move_to((-6.2, -0.85, 0))
        self.slot_row = self._slot_row({})
        self.film.play(LaggedStart(*(FadeIn(p) for p in parts), lag_ratio=0.08), run_time=1.2)
        self.film.play(*(Create(a) for a in (*arrows, loop)), FadeIn(each), run_time=0.9)
        self.film.play(FadeIn(self.slot_row), FadeIn(self.queue_title), FadeIn(self.count))

    def _slot_row(self, slots: dict[int, int]) -> VGroup:
        """The slots and, beside them, their mask; `slots` is task → slot."""
        n = self.film.facts.n_slots
        holder = {slot: self.number[task] for task, slot in slots.items()}
        mask, size = occupied_mask(holder), min(0.6, 6.4 / n)
        row = VGroup()
        for slot in range(n):
            free = slot not in holder
            square = Rectangle(
                width=size, height=size, color=_LINE, stroke_width=1.5,
                fill_color=_FREE if free else _hue(holder[slot]), fill_opacity=1,
            )  # fmt: skip
            bit = _code("1" if free else "0", 20 * size / 0.6, _INK if free else BLACK)
            row.add(VGroup(square, bit.move_to(square)))
        row.arrange(LEFT, buff=0.06).move_to((-3.6, -2.6, 0))
        # Past this many bits a mask is no longer read by eye.
        shown = n <= 16
        occupied = f"occupied_mask = {_bits(mask, n)}" if shown else "occupied_mask"
        free_bits = ~mask & ((1 << n) - 1)
        formula = "free_slots = ~occupied_mask" + (f" = {_bits(free_bits, n)}" if shown else "")
        words = VGroup(_code(occupied, 19, _DIM), _code(formula, 19))
        words.arrange(DOWN, aligned_edge=LEFT, buff=0.16).move_to((3.1, -2.6, 0))
        name = _text("slots, lowest bit right; 1 = free", 16, _DIM).next_to(row, UP, buff=0.15)
        return VGroup(row, words, name)

    def _token(self, task: int) -> VGroup:
        number = self.number[task]
        disc = Circle(radius=0.21, color=_hue(number), fill_color=_hue(number), fill_opacity=1)
        name = _text(label(number), 17, BLACK, weight="BOLD").move_to(disc)
        return VGroup(disc, name)

    def _new_group(self, moment: Moment) -> bool:
        return not self.shown_groups and any(len(group) > 1 for group in moment.together)

    def _tick(self, moment: Moment, seconds: float) -> None:
        film = self.film
        self._meet(moment)
        moves = self._leave(moment)
        moves += self._queue(moment)
        for name, tasks in (("PREFILL", list(moment.prefill)), ("DECODE", moment.decode)):
            moves += self._seat(name, [t for t in tasks if name == "DECODE" or t in self.tokens])
        # Digits change at once: half of a 3 and half of a 4 is not a number.
        self.count.become(_code(f"tick {moment.tick}", 22).to_corner(UP + LEFT, buff=0.3))
        self.slot_row.become(self._slot_row(moment.slots))
        film.play(*moves, run_time=seconds)
        if self._new_group(moment):
            self._show_group(moment)

    def _meet(self, moment: Moment) -> None:
        """Requests that were not seen before stand in the queue first."""
        fresh = [t for t in (*moment.waiting, *moment.slots) if t not in self.tokens]
        for i, task in enumerate(fresh):
            token = self._token(task).move_to((-5.2 + 0.55 * i, -0.85, 0))
            self.tokens[task] = token
        if fresh:
            arrive = [FadeIn(self.tokens[t], shift=0.3 * RIGHT) for t in fresh]
            self.film.play(LaggedStart(*arrive, lag_ratio=0.1), run_time=0.5)

    def _leave(self, moment: Moment) -> list[Any]:
        leaving = [(t, self.tokens.pop(t)) for t in moment.ended if t in self.tokens]
        if not leaving:
            return []
        door = self.boxes["CLEANUP"].get_center()
        self.film.play(*(token.animate.move_to(door) for _, token in leaving), run_time=0.4)
        return [FadeOut(token, shift=0.6 * UP) for _, token in leaving]

    def _queue(self, moment: Moment) -> list[Any]:
        places = [t for t in moment.waiting if t in self.tokens]
        moves = [
            self.tokens[t].animate.move_to((-5.2 + 0.55 * i, -0.85, 0))
            for i, t in enumerate(places)
        ]
        words = f"waiting: {moment.reason}" if moment.reason else "waiting"
        title = _text(words, 18, _DIM).move_to((-6.2, -1.35, 0), aligned_edge=LEFT)
        if not moment.reason:
            title.move_to((-6.2, -0.85, 0))
        self.queue_title.become(title)
        return moves

    def _seat(self, name: str, tasks: Sequence[int]) -> list[Any]:
        box, columns = self.boxes[name], 4
        moves = []
        for i, task in enumerate(tasks):
            x, y = i % columns, i // columns
            at = box.get_center() + (0.55 * (x - 1.5)) * RIGHT + (0.35 - 0.52 * y) * UP
            moves.append(self.tokens[task].animate.move_to(at))
        return moves

    def _show_group(self, moment: Moment) -> None:
        group = max(moment.together, key=len)
        self.shown_groups = True
        # One ring each: a box around tokens in two rows would take others in.
        frame = VGroup(
            *(
                Circle(radius=0.27, color=WHITE, stroke_width=4).move_to(self.tokens[t])
                for t in group
            )
        )
        alike = "same position" if self.film.facts.grouping == "position" else "similar length"
        words = _text(f"{alike} → single matmul", 20).next_to(self.boxes["DECODE"], DOWN, buff=0.2)
        words.shift(min(0, 6.9 - words.get_right()[0]) * RIGHT)
        self.film.play(Create(frame), FadeIn(words), run_time=0.6)
        self.film.wait(1.0)
        self.film.play(FadeOut(frame), FadeOut(words), run_time=0.3)

    def _bars(self, ratio: float, slots: int | None) -> None:
        where = f" ({slots} slots)" if slots else ""
        head = _text(f"Throughput, same requests, same kernels{where}", 28).to_edge(UP, buff=0.9)
        self.film.play(FadeIn(head), run_time=0.5)
        unit = 7.5 / max(ratio, 1.0)
        rows = (("Static", 1.0, _CACHED), ("Continuous", ratio, _HUES[0]))
        for i, (name, value, color) in enumerate(rows):
            y = 0.9 - 1.6 * i
            title = _text(name, 26).move_to((-5.0, y, 0))
            bar = Rectangle(
                width=unit * value, height=0.8, stroke_width=0, fill_color=color, fill_opacity=1
            )
            bar.move_to((-3.4, y, 0), aligned_edge=LEFT)
            number = _text(f"{value:.1f}x", 28, weight="BOLD").next_to(bar, RIGHT, buff=0.2)
            self.film.play(FadeIn(title), GrowFromEdge(bar, LEFT), run_time=0.9)
            self.film.play(FadeIn(number), run_time=0.3)
        self.film.wait(1.0)


class _Cache:
    """Page frames, the free mask, refs and the page tables of A, B and C."""

    def __init__(self, film: Film, story: CacheStory) -> None:
        self.film = film
        self.story = story
        self.n_shown = min(story.n_pages, _SHOWN_FRAMES)
        self.held: dict[int, list[int]] = {}  # actor → page table
        self.owner: dict[int, int] = {}  # frame → actor whose colour it has
        self.tables: dict[int, VGroup] = {}
        self.words = VGroup()

    def play(self) -> None:
        self.film.title("Paged KV Cache", f"{self.film.facts.model}, one run")
        self._shapes()
        self._stage()
        for step in self.story.steps:
            if all(f < self.n_shown for f in (*step.frames, *step.table)):
                self._step(step)
        self.film.wait(1.5)
        self.film.clear_stage()

    def _shapes(self) -> None:
        f = self.film.facts
        lines = VGroup(
            _code("PagedCache(", 24),
            _code(f"n_layers={f.n_layers}, n_pages={f.n_pages}, page_size={f.page_size},", 24),
            _code(f"n_kv_heads={f.n_kv_heads}, head_dim={f.head_dim})", 24),
            _code(
                f"k_cache, v_cache: [{f.n_layers}, {f.n_pages}, {f.page_size}, "
                f"{f.n_kv_heads}, {f.head_dim}]", 24, _HUES[0],
            ),
        ).arrange(DOWN, aligned_edge=LEFT, buff=0.25)  # fmt: skip
        lines[1:3].shift(0.8 * RIGHT)
        lines[3].shift(0.3 * DOWN)
        self.film.play(LaggedStart(*(FadeIn(x) for x in lines), lag_ratio=0.3), run_time=1.6)
        self.film.wait(1.2)
        self.film.clear_stage()

    def _stage(self) -> None:
        state = PoolState((0,) * self.story.n_pages, frozenset())
        self.frames = [self._frame(i, state) for i in range(self.n_shown)]
        self.mask = self._mask(state)
        more = self.story.n_pages - self.n_shown
        names = [(0.72, "bit, 1 = free"), (-0.72, "refs")]
        titles = VGroup(*(_text(w, 14, _DIM).move_to((-6.35, 1.7 + y, 0)) for y, w in names))
        rest = _text(f"and {more} more page frames", 16, _DIM).move_to((5.4, 0.5, 0))
        self.film.play(LaggedStart(*(FadeIn(f) for f in self.frames), lag_ratio=0.06), run_time=1)
        self.film.play(FadeIn(self.mask), FadeIn(titles), *([FadeIn(rest)] if more else []))

    def _place(self, frame: int) -> tuple[float, float]:
        """Frame 0 is on the right, as bit 0 of the mask is."""
        return 5.4 - frame * (10.8 / max(self.n_shown - 1, 1)), 1.7

    def _frame(self, i: int, state: PoolState) -> VGroup:
        x, y = self._place(i)
        width = min(1.15, 9.6 / self.n_shown)
        refs, cached = state.refs[i], i in state.cached
        fill = _CACHED if cached else _FREE
        if refs:
            fill = _hue(self.owner[i]) if i in self.owner else _OTHER
        box = Rectangle(
            width=width, height=0.8, color=WHITE if refs > 1 else _LINE, fill_color=fill,
            fill_opacity=1 if refs or cached else 0.6, stroke_width=5 if refs > 1 else 2,
        ).move_to((x, y, 0))  # fmt: skip
        number = _code(str(i), 24, BLACK if refs else _INK).move_to(box)
        free = not refs and not cached
        bit = _code("1" if free else "0", 20, _INK if free else _DIM).next_to(box, UP, buff=0.15)
        below = "cached" if cached else str(refs)
        count = _code(below, 14 if cached else 20, _INK if refs else _DIM)
        return VGroup(box, number, bit, count.next_to(box, DOWN, buff=0.15))

    def _mask(self, state: PoolState) -> Text:
        shown = state.free_mask & ((1 << self.n_shown) - 1)
        dots = "…" if self.n_shown < self.story.n_pages else ""
        words = f"free_mask = {dots}{_bits(shown, self.n_shown)}"
        return _code(words, 24).move_to((0, 3.2, 0))

    def _step(self, step: Step) -> None:
        film, who = self.film, label(step.actor)
        color = _hue(step.actor)
        said = VGroup(*(_code(line, 20, c) for line, c in self._say(step, who, color)))
        said.arrange(DOWN, aligned_edge=LEFT, buff=0.16).move_to((-6.6, -2.75, 0))
        said.align_to((-6.6, 0, 0), LEFT)
        if len(self.words):
            film.play(FadeOut(self.words), run_time=0.25)
        self.words = said
        film.play(FadeIn(said, shift=0.15 * UP), run_time=0.5)
        self._own(step)
        self._repaint(step.pool)
        self._draw_table(step, color)
        if step.kind in ("alloc", "share"):
            self._write_kv(step, color)
        film.wait(1.0)

    def _own(self, step: Step) -> None:
        """A frame has the colour of the first of the actors that holds it."""
        if step.kind == "end":
            self.held.pop(step.actor, None)
        else:
            self.held[step.actor] = step.table
        for frame in step.table:
            holders = [actor for actor, table in self.held.items() if frame in table]
            if holders:
                self.owner[frame] = holders[0]
            else:
                self.owner.pop(frame, None)

    def _say(self, step: Step, who: str, color: ManimColor) -> list[tuple[str, ManimColor]]:
        size = self.film.facts.page_size
        n = step.positions
        need = f"n_pages_for({n}) = ({n} + {size - 1}) // {size} = {-(-n // size)}"
        frames = ", ".join(map(str, step.frames))
        if step.kind == "alloc":
            return [
                (f"tick {step.tick}: {who} arrives with {n} tokens", color),
                (need, _INK),
                (f"lowest set bits of free_mask: alloc() → {frames}", _INK),
            ]
        if step.kind == "grow":
            return [
                (f"tick {step.tick}: {who} decodes position {n - 1}, its pages are full", color),
                (f"alloc() → {frames}", _INK),
            ]
        if step.kind == "share":
            shared = len(step.frames) * size
            return [
                (f"tick {step.tick}: {who} arrives, its first {shared} tokens are known", color),
                (f"share({frames}): refs go up, nothing is computed or copied", _INK),
                (f"own pages for the rest of its {n} tokens", _INK),
            ]
        free = [f for f in step.frames if step.pool.refs[f] == 0 and f not in step.pool.cached]
        kept = [f for f in step.frames if f in step.pool.cached]
        held = [f for f in step.frames if step.pool.refs[f]]
        lines = [(f"tick {step.tick}: {who} ends at {n} positions, refs of its pages drop", color)]
        for words, which in (
            ("bit comes back", free),
            ("refs 0, content kept: cached, evictable", kept),
            ("still held by another", held),
        ):
            if which:
                lines.append((f"{', '.join(map(str, sorted(which)))}: {words}", _INK))
        return lines

    def _repaint(self, pool: PoolState) -> None:
        new = [self._frame(i, pool) for i in range(self.n_shown)]
        self.mask.become(self._mask(pool))
        for frame, after in zip(self.frames, new):
            for i in (1, 2, 3):  # number, bit, refs: they change at once, the box in between
                frame[i].become(after[i])
        self.film.play(
            AnimationGroup(*(Transform(a, b) for a, b in zip(self.frames, new))), run_time=0.7
        )

    def _draw_table(self, step: Step, color: ManimColor) -> None:
        film = self.film
        old = self.tables.pop(step.actor, None)
        if step.kind == "end":
            if old is not None:
                film.play(FadeOut(old), run_time=0.6)
            return
        left, y = -6.4 + 4.5 * step.actor, -1.2
        name = _code(f"{label(step.actor)}.page_table", 18, color)
        name.move_to((left, y - 0.55, 0), aligned_edge=LEFT)
        drawn = VGroup(name)
        for page, frame in enumerate(step.table):
            cell = Rectangle(width=0.7, height=0.5, color=color, stroke_width=2)
            cell.move_to((left + 0.35 + 0.74 * page, y, 0))
            x, top = self._place(frame)
            # A shared frame is reached beside the arrows of the others.
            end = (x + 0.16 * (step.actor - 1), top - 1.0, 0)
            arrow = Arrow(
                cell.get_top(), end, color=color, stroke_width=2.5, buff=0.05,
                max_tip_length_to_length_ratio=0.08,
            )  # fmt: skip
            drawn.add(cell, _code(str(frame), 18).move_to(cell), arrow)
        if old is not None:
            film.remove(old)
        film.play(FadeIn(drawn), run_time=0.5)
        self.tables[step.actor] = drawn

    def _write_kv(self, step: Step, color: ManimColor) -> None:
        """A band fills each page of the table as far as its positions are written."""
        size, bands = self.film.facts.page_size, []
        for page, frame in enumerate(step.table):
            if step.kind == "share" and frame in step.frames:
                continue
            filled = min(max(step.positions - page * size, 0), size) / size
            box = self.frames[frame][0]
            band = Rectangle(
                width=box.width * filled, height=0.14, stroke_width=0, fill_color=WHITE,
                fill_opacity=0.85,
            )  # fmt: skip
            bands.append(band.align_to(box, DOWN).align_to(box, LEFT))
        if bands:
            self.film.play(
                LaggedStart(*(GrowFromEdge(b, LEFT) for b in bands), lag_ratio=0.5), run_time=0.9
            )
            self.film.play(*(FadeOut(b) for b in bands), run_time=0.3)

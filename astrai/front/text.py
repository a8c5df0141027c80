"""Token ids to text and back to a decision: the only place of the engine that knows text.

The text of a token sequence is the UTF-8 reading of the bytes its tokens contribute, one after
the other, with U+FFFD for what is not UTF-8. So a character may span tokens, and a delta is
what those bytes say that no later byte can change.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from astrai.front.sampling_params import SamplingParams
    from astrai.models.tokenizer import Tokenizer


class IncrementalDecoder:
    """Token ids to text, one at a time: the joined deltas are the full decode.

    Where single bytes are tokens of their own (<0xAB>), a run of them is read as a whole: if it
    is not UTF-8, each of its bytes is a U+FFFD. So a run is held until another token ends it.

    Owns: the bytes of an unfinished character, or of a run. Does not own: the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._byte_ids = _byte_ids(tokenizer)
        self._run = b""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_leading_space

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token)
        if token in self._byte_ids or not data:  # an id that is no token does not end a run
            self._run += data
            return ""
        return self._started(self._end_run() + self._utf8.decode(data))

    def flush(self) -> str:
        """The end: a run as it is, what is left of an unfinished character as U+FFFD."""
        return self._started(self._end_run() + self._utf8.decode(b"", final=True))

    def held(self) -> str:
        """The characters of a held run: the rest of the text if it ended here."""
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            return ""
        return text.removeprefix(" ") if self._at_start else text

    def _end_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _started(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


class StopMatcher:
    """Finds the stop string that is complete first (the longest, if several end together).

    Holds back only the longest tail that may still become a stop string. How the text is cut
    into pushes changes nothing but the deltas' borders. One Knuth-Morris-Pratt automaton per
    stop string, so the cost is per character and does not grow with the strings' lengths.

    Owns: the held tail. Does not own: what was released.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        if not all(stops):
            raise ValueError(f"{stops = }, expected strings that are not empty")
        self.matched: str | None = None
        self._include = include
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in stops]
        self._states = [0] * len(stops)  # how much of each stop the text so far ends with
        self._held = ""

    def push(self, text: str, armed: bool = True) -> str:
        """What can be released of the text so far. Unarmed, a complete stop string is only text."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        seen = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            complete = self._step(char)
            if complete and armed:
                self.matched = max(complete, key=len)
                self._held = ""
                return seen[: end if self._include else end - len(self.matched)]
        # A state is below its stop's length here, and no state is longer than `seen`:
        # every state before this push was at most len(self._held).
        keep = max(self._states)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def would_match(self, text: str) -> bool:
        seen = self._held + text
        return any(stop in seen for stop in self._stops)

    def flush(self) -> str:
        """The end: the tail becomes text, since nothing can complete it."""
        tail, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return tail

    def _step(self, char: str) -> list[str]:
        complete = []
        for i, stop in enumerate(self._stops):
            state, borders = self._states[i], self._borders[i]
            while state and stop[state] != char:
                state = borders[state]
            state += stop[state] == char
            if state == len(stop):
                complete.append(stop)
                state = borders[state]
            self._states[i] = state
        return complete


class TextStream:
    """The text of one completion: deltas as tokens come, cut at a stop string, flushed at the end.

    Owns: the decoder's and the matcher's state. Does not own: tokens, nor the text released.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._decoder = IncrementalDecoder(tokenizer, params.skip_special_tokens)
        self._matcher = StopMatcher(params.stop, params.include_stop_str_in_output)
        self._show_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._n_tokens = 0

    @property
    def stop_reason(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._matcher.matched

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens release. After a stop string: nothing."""
        delta = []
        for token in tokens:
            self._n_tokens += 1
            armed = self._n_tokens >= self._min_tokens
            delta.append(self._matcher.push(self._decoder.push(token), armed))
            # A stop string that is complete in a held run ends the task here, and so the run.
            held = self._decoder.held()
            if held and armed and self._matcher.would_match(held):
                delta.append(self._matcher.push(held))
        return "".join(delta)

    def finish(self, stop_token: int | None = None) -> str:
        """The last delta. `stop_token`: the id that ended the task, if one did and it was not
        pushed; its text shows only with include_stop_str_in_output."""
        delta = ""
        if stop_token is not None and self._show_stop:
            delta = self._matcher.push(self._decoder.push(stop_token), armed=False)
        delta += self._matcher.push(self._decoder.flush(), armed=False)
        return delta + self._matcher.flush()


class StopWatcher:
    """Tells the loop, in the tick of the token, that a stop string is complete.

    Owns: a decoder and a matcher of its own, which agree with the `TextStream` of the same
    parameters and tokens. Raises what the tokenizer raises: the caller makes it that task's error.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._stream = TextStream(tokenizer, params)

    def __call__(self, token: int) -> str | None:
        self._stream.push((token,))
        return self._stream.stop_reason


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """One token on its own, for log-probabilities: half a character shows as U+FFFD."""
    return tokenizer.token_bytes(token).decode("utf-8", errors="replace")


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences of each word, at the start of a text and after a space; none twice.

    Other ways to spell the same text in tokens are not found.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip(" ")):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids:
                found[tuple(ids)] = None
    return tuple(found)


@lru_cache(maxsize=4)
def _byte_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that are written <0xAB>.

    A letter's own token may contribute the same byte as one of them. Beside a byte that is no
    character the letter stays, and the byte becomes a second U+FFFD.
    """
    if not tokenizer.byte_fallback:
        return frozenset()
    pieces = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    single = {i: piece[0] for i, piece in pieces.items() if len(piece) == 1}
    high = [i for i, byte in single.items() if byte >= 0x80]
    return frozenset(high) | {
        i
        for i, byte in single.items()
        if byte < 0x80 and high and tokenizer.decode([i, high[0]], False).count("\ufffd") == 2
    }


def _borders(stop: str) -> list[int]:
    """borders[n]: the longest proper prefix of stop[:n] that is also its suffix, n = 0 .. len."""
    borders = [0, 0]
    for n in range(1, len(stop)):
        length = borders[n]
        while length and stop[n] != stop[length]:
            length = borders[length]
        borders.append(length + (stop[n] == stop[length]))
    return borders

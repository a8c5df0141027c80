from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers

from astrai.front.sampling_params import SamplingParams
from astrai.front.text import (
    IncrementalDecoder,
    StopMatcher,
    StopWatcher,
    TextStream,
    bad_word_ids,
    token_text,
)
from astrai.models.gguf import GGUFFile
from astrai.models.pull import resolve
from astrai.models.tokenizer import ByteTokenizer, Tokenizer

WORDS = ["▁", "▁a", "a", "b", "ab", "▁▁", "你", "好", "é", "\n", ".", "▁x▁", "😀", "�"]
TEXTS = [
    "Hello world",
    "你好，世界。こんにちは 안녕",
    "😀👩‍👩‍👧‍👦🇩🇪 flags",
    " lead and trail ",
    "naïve café\n\tcode()\r\n",
    "Ω≈ç√∫˜µ≤≥÷ e\u0301",
    "",
]


def byte_fallback_tokenizer(strip: bool = True) -> Tokenizer:
    """Sentencepiece-like: <s>, </s>, 256 byte tokens, a few words; strips a leading space."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *WORDS]
    vocab = {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))
    return Tokenizer(backend, bos_token_id=1, eos_token_ids=(2,))


TOKENIZERS = {
    "bytes": ByteTokenizer(),
    "sentencepiece": byte_fallback_tokenizer(),
    "sentencepiece, no strip": byte_fallback_tokenizer(strip=False),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def deltas_of(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip)
    return [decoder.push(i) for i in ids] + [decoder.flush()]


# Any ids (one beyond the vocabulary too), with short runs of single bytes likely.
def id_lists(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    any_id = st.integers(0, tokenizer.vocab_size)
    low_id = st.integers(0, min(300, tokenizer.vocab_size))
    text = st.text(max_size=8).map(lambda t: tokenizer.encode(t, add_special_tokens=False))
    return st.lists(
        st.one_of(any_id.map(lambda i: [i]), low_id.map(lambda i: [i]), text), max_size=12
    ).map(lambda parts: [i for part in parts for i in part])


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(sorted(TOKENIZERS)), st.booleans())
def test_joined_deltas_are_the_full_decode(data: st.DataObject, kind: str, skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(id_lists(tokenizer))
    assert "".join(deltas_of(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_and_no_delta_holds_half_a_character(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    deltas = deltas_of(tokenizer, ids, True)
    assert "".join(deltas) == tokenizer.decode(ids)
    assert not any("�" in delta for delta in deltas)


def test_byte_level_bytes_are_held_no_longer_than_a_character() -> None:
    decoder = IncrementalDecoder(ByteTokenizer())
    assert [decoder.push(b) for b in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert [decoder.push(b) for b in (0xE2, 0x82, 0x41, 0xFF)] == ["", "", "�A", "�"]
    assert decoder.push(0xF0) + decoder.flush() == "�"


def test_letter_tokens_are_not_taken_for_byte_tokens() -> None:
    tokenizer = byte_fallback_tokenizer()
    a, byte_a, bad = 259 + WORDS.index("a"), 3 + 0x61, 3 + 0xE4
    assert tokenizer.token_bytes(a) == tokenizer.token_bytes(byte_a) == b"a"
    assert deltas_of(tokenizer, [bad, a], True) == ["", "�a", ""]
    assert deltas_of(tokenizer, [bad, byte_a], True) == ["", "", "��"]
    space, byte_space = 259 + WORDS.index("▁"), 3 + 0x20
    assert tokenizer.token_bytes(space) == tokenizer.token_bytes(byte_space) == b" "
    assert deltas_of(tokenizer, [bad, space], True) == ["", "� ", ""]
    assert deltas_of(tokenizer, [bad, byte_space], True) == ["", "", "��"]


def oracle(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """Character by character: the first to be complete, the longest of those."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


small_text = st.text(alphabet="abc", max_size=14)
small_stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4).map(tuple)


@settings(max_examples=500, deadline=None)
@given(small_text, small_stops, st.booleans(), st.data())
def test_stop_matcher_agrees_with_the_oracle_at_every_split(
    text: str, stops: tuple[str, ...], include: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    for parts in (pieces, list(text), [text]):
        matcher = StopMatcher(stops, include)
        released = ""
        for i, part in enumerate(parts):
            released += matcher.push(part)
            seen = "".join(parts[: i + 1])
            if matcher.matched is None:
                held = seen.removeprefix(released)
                # Held back: exactly the longest tail that a stop string begins with.
                tails = [seen[n:] for n in range(len(seen) + 1)]
                assert held == next(
                    t for t in tails if any(s.startswith(t) for s in stops) or not t
                )
        assert (released + matcher.flush(), matcher.matched) == oracle(text, stops, include)


def test_a_long_stop_string_costs_no_more_per_character() -> None:
    matcher = StopMatcher(("a" * 20_000 + "b",))
    assert matcher.push("a" * 60_000) == "a" * 40_000
    assert matcher.push("b!") == ""
    assert matcher.matched is not None


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="not empty"):
        StopMatcher(("",))


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(sorted(TOKENIZERS)), small_stops, st.booleans())
def test_stream_is_the_full_decode_cut_at_the_stop(
    data: st.DataObject, kind: str, stops: tuple[str, ...], include: bool
) -> None:
    tokenizer = TOKENIZERS[kind]
    text = data.draw(st.text(alphabet="abc你 é", max_size=14))
    ids = tokenizer.encode(text, add_special_tokens=False)
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    stream, watcher = TextStream(tokenizer, params), StopWatcher(tokenizer, params)
    at = next((n for n, i in enumerate(ids) if watcher(i) is not None), None)
    ids = ids if at is None else ids[: at + 1]  # the loop ends the task there
    cut = data.draw(st.integers(0, len(ids)))
    joined = stream.push(ids[:cut]) + stream.push(ids[cut:]) + stream.finish()
    assert (joined, stream.stop_reason) == oracle(tokenizer.decode(ids), stops, include)
    # Every stop string that the text holds was seen in the tick of its last token.
    assert (at is None) == (oracle(tokenizer.decode(ids), stops, include)[1] is None)


def test_a_stop_string_in_a_byte_run_ends_the_task_in_its_tick() -> None:
    tokenizer = byte_fallback_tokenizer()
    params = SamplingParams(stop="\r\n")
    watcher, stream = StopWatcher(tokenizer, params), TextStream(tokenizer, params)
    ids = [3 + b for b in b"hi\r\n"]
    assert [watcher(i) for i in ids] == [None, None, None, "\r\n"]
    assert stream.push(ids) == "hi"
    assert (stream.push([3]), stream.finish(), stream.stop_reason) == ("", "", "\r\n")


def test_a_leading_space_that_no_text_shows_completes_no_stop_string() -> None:
    tokenizer = byte_fallback_tokenizer()
    watcher = StopWatcher(tokenizer, SamplingParams(stop=" x"))
    assert [watcher(3 + b) for b in b" x x"] == [None, None, None, " x"]


def test_stop_strings_wait_for_min_tokens() -> None:
    params = SamplingParams(stop="ab", min_tokens=4)
    watcher = StopWatcher(ByteTokenizer(), params)
    assert [watcher(b) for b in b"ababab"] == [None, None, None, "ab", "ab", "ab"]
    stream = TextStream(ByteTokenizer(), params)
    assert stream.push(list(b"aba")) == "ab"
    assert stream.push(list(b"b")) == ""
    # A match may begin before min_tokens are out.
    late = TextStream(ByteTokenizer(), SamplingParams(stop="aab", min_tokens=3))
    assert late.push(list(b"aab")) == ""
    # What was passed over may be the beginning of what ends the task.
    watcher = StopWatcher(ByteTokenizer(), SamplingParams(stop="aba", min_tokens=4))
    assert [watcher(b) for b in b"ababa"] == [None, None, None, None, "aba"]


@pytest.mark.parametrize(("include", "text"), [(False, "hi"), (True, "hi<eos>")])
def test_the_text_of_a_stop_token_shows_only_if_asked_for(include: bool, text: str) -> None:
    params = SamplingParams(
        stop="zz", skip_special_tokens=False, include_stop_str_in_output=include
    )
    stream = TextStream(ByteTokenizer(), params)
    assert stream.push(list(b"hi")) + stream.finish(stop_token=257) == text


def test_a_held_tail_is_released_at_the_end() -> None:
    stream = TextStream(ByteTokenizer(), SamplingParams(stop="END"))
    assert stream.push(list(b"the EN")) == "the "
    assert stream.finish() == "EN"
    assert stream.stop_reason is None


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [256, *b"hi", 257]
    assert "".join(deltas_of(ByteTokenizer(), ids, True)) == "hi"
    assert "".join(deltas_of(ByteTokenizer(), ids, False)) == "<bos>hi<eos>"


def test_token_text_shows_half_a_character() -> None:
    assert token_text(ByteTokenizer(), 0x61) == "a"
    assert token_text(ByteTokenizer(), 0xE2) == "�"


def test_bad_words_have_both_spellings_once() -> None:
    tokenizer = ByteTokenizer()
    assert bad_word_ids(tokenizer, ["no", " no"]) == (tuple(b"no"), tuple(b" no"))


def test_a_broken_tokenizer_is_the_callers_error() -> None:
    class Broken(ByteTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            raise RuntimeError("broken state")

    with pytest.raises(RuntimeError, match="broken state"):
        StopWatcher(Broken(), SamplingParams(stop="x"))(65)


def test_decoding_is_linear_in_a_long_byte_run() -> None:
    tokenizer = byte_fallback_tokenizer()
    ids = [3 + b for b in "😀".encode()] * 1000
    stream = TextStream(tokenizer, SamplingParams(stop="x"))
    assert stream.push(ids) + stream.finish() == "😀" * 1000


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile(resolve("smollm2")))


@pytest.mark.parametrize("text", TEXTS)
def test_real_tokenizer_gives_the_text_back(smollm2: Tokenizer, text: str) -> None:
    deltas = deltas_of(smollm2, smollm2.encode(text, add_special_tokens=False), True)
    assert "".join(deltas) == text
    assert not any("�" in delta for delta in deltas)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.booleans())
def test_real_tokenizer_on_any_ids(smollm2: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(id_lists(smollm2))
    assert "".join(deltas_of(smollm2, ids, skip)) == smollm2.decode(ids, skip)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, trainers

from astrai.models.gguf import GGUFFile
from astrai.models.tokenizer import ByteTokenizer, Tokenizer
from tests.models import tiny

# Text that tokenizers trip over: spaces, newlines, digits, accents, CJK, emoji, specials.
PIECES = [
    *("  ", "\n\n", "\t", "123456", "don't", "I'LL", "naïve", "日本語", "👩\u200d👩\u200d👧", "🙂"),
    *(
        "\ufffd",
        "\x00",
        "_",
        "ﬁ",
        "é",
        "a\u0301",
        "<|im_end|>",
        "<|im_start|>",
        "</s>",
        " the",
        "!?",
    ),
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join)


def write_vocabulary(path: Path, fields: dict[str, Any]) -> Tokenizer:
    """A GGUF file that holds only a tokenizer, read back."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add.get(type(value), writer.add_array)(f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Tokenizer.from_gguf(GGUFFile(path))


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile(smollm2_path))


# Bytes the vocabulary has no token for: of some control characters and of unassigned planes.
UNKNOWN_BYTES = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
CHAT_IDS = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018,
            411, 407, 19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 9354, 47, 2, 198, 1, 520,
            9531, 198]  # fmt: skip


class TestSmolLM2:
    def test_special_ids_follow_the_file(self, smollm2: Tokenizer) -> None:
        assert smollm2.eos_token_ids == (2,)
        assert smollm2.bos_token_id == 1
        assert smollm2.vocab_size == 49152
        assert smollm2.special_ids == frozenset(range(17))

    def test_chat_prompt(self, smollm2: Tokenizer) -> None:
        messages = [{"role": "user", "content": "What is gravity?"}]
        assert smollm2.apply_chat_template(messages) == CHAT_IDS
        assert smollm2.apply_chat_template(messages, add_generation_prompt=False) == CHAT_IDS[:-4]
        assert smollm2.has_chat_template
        assert smollm2.render_chat(messages) == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
            "Hugging Face<|im_end|>\n<|im_start|>user\nWhat is gravity?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def test_digits_stand_alone(self, smollm2: Tokenizer) -> None:
        ids = smollm2.encode("in 1969")
        assert [smollm2.token_bytes(i) for i in ids] == [b"in", b" ", b"1", b"9", b"6", b"9"]

    def test_specials_in_text(self, smollm2: Tokenizer) -> None:
        ids = smollm2.encode("<|im_start|>user")
        assert ids[0] == 1
        assert smollm2.decode(ids) == "user"
        assert smollm2.decode(ids, skip_special_tokens=False) == "<|im_start|>user"
        assert smollm2.token_bytes(1) == b"<|im_start|>"

    @given(text=texts.filter(lambda text: not UNKNOWN_BYTES & set(text.encode())))
    def test_bytes_of_tokens_are_the_text(self, smollm2: Tokenizer, text: str) -> None:
        ids = smollm2.encode(text)
        assert b"".join(map(smollm2.token_bytes, ids)) == text.encode()
        assert smollm2.decode(ids, skip_special_tokens=False) == text

    @given(ids=st.lists(st.integers(0, 49151), max_size=20))
    def test_decode_is_the_bytes_decoded(self, smollm2: Tokenizer, ids: list[int]) -> None:
        joined = b"".join(map(smollm2.token_bytes, ids)).decode("utf-8", errors="replace")
        assert smollm2.decode(ids, skip_special_tokens=False) == joined
        kept = [i for i in ids if i not in smollm2.special_ids]
        assert smollm2.decode(ids) == smollm2.decode(kept, skip_special_tokens=False)

    def test_ids_beyond_the_vocabulary(self, smollm2: Tokenizer) -> None:
        assert smollm2.token_bytes(49152) == b""
        assert smollm2.decode([49152, 28120, 60000]) == smollm2.decode([28120])

    def test_lone_surrogates_are_refused(self, smollm2: Tokenizer) -> None:
        with pytest.raises(ValueError, match="3 characters is not valid Unicode"):
            smollm2.encode("a\ud800b")


SENTENCES = [
    "the cat sat on the mat", "a dog and a cat", "rain in spain stays mainly in the plain",
    "naïve café — déjà vu", "the end of the story", "this is that and that is this",
]  # fmt: skip


@pytest.fixture(scope="module")
def sentencepiece(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Ours from a GGUF file, and the trained one whose vocabulary the file holds.

    Scores fall with the rank of the merge, as sentencepiece writes them.
    """
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
        show_progress=False,
    )
    trained.train_from_iterator(SENTENCES, trainer)
    # The trainer made the byte tokens special; as bytes they are part of the model.
    state = json.loads(trained.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    trained = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokens = [trained.id_to_token(i) for i in range(trained.get_vocab_size())]
    ranks = {"".join(pair): rank for rank, pair in enumerate(state["model"]["merges"])}
    ours = write_vocabulary(
        tmp_path_factory.mktemp("sp") / "sp.gguf",
        {
            "ggml.model": "llama",
            "ggml.tokens": tokens,
            "ggml.scores": [float(-ranks.get(token, 10_000)) for token in tokens],
            "ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
            "ggml.bos_token_id": 1,
            "ggml.eos_token_id": 2,
            "ggml.unknown_token_id": 0,
        },
    )
    return ours, trained


class TestSentencepiece:
    @given(text=st.lists(st.sampled_from(" ".join(SENTENCES).split())).map(" ".join) | texts)
    def test_same_ids_as_the_trained_one(
        self, sentencepiece: tuple[Tokenizer, tokenizers.Tokenizer], text: str
    ) -> None:
        ours, trained = sentencepiece
        assert ours.encode(text, add_special_tokens=False) == trained.encode(text).ids
        assert ours.encode(text) == [1, *trained.encode(text).ids]

    @given(text=texts.filter(lambda t: "▁" not in t and "</s>" not in t))
    def test_bytes_of_tokens_are_the_text(
        self, sentencepiece: tuple[Tokenizer, tokenizers.Tokenizer], text: str
    ) -> None:
        ours, _ = sentencepiece
        ids = ours.encode(text, add_special_tokens=False)
        joined = b"".join(map(ours.token_bytes, ids))
        assert joined == (b" " + text.encode() if text else b"")
        assert ours.strips_leading_space
        assert ours.byte_fallback
        assert ours.decode(ids) == text

    def test_token_bytes(self, sentencepiece: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
        ours, _ = sentencepiece
        assert ours.token_bytes(3 + 0xE9) == b"\xe9"
        assert ours.token_bytes(1) == b"<s>"
        assert ours.special_ids == {0, 1, 2}


class TestByteTokenizer:
    @given(text=st.text())
    def test_one_token_per_byte(self, text: str) -> None:
        tokenizer = ByteTokenizer()
        ids = tokenizer.encode(text)
        if "<bos>" not in text and "<eos>" not in text:
            assert ids == list(text.encode())
        assert tokenizer.decode(ids, skip_special_tokens=False) == text

    def test_special_ids(self) -> None:
        tokenizer = ByteTokenizer()
        assert tokenizer.vocab_size == 258
        assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (256, (257,))
        assert tokenizer.special_ids == {256, 257}
        assert tokenizer.encode("a<eos>") == [97, 257]
        assert tokenizer.decode([97, 257]) == "a"


BYTES = [chr(b) if 33 <= b < 127 or 161 <= b < 173 or b >= 174 else "" for b in range(256)]
_FREE = iter(range(256, 400))
BYTES = [char or chr(next(_FREE)) for char in BYTES]


def byte_level(path: Path, pre: str, **fields: Any) -> Tokenizer:
    """No merges: `pre` shows in which pieces a text falls only through `pieces`."""
    tokens = [*BYTES, "<bos>", "<eos>", "he"]
    base: dict[str, Any] = {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.merges": ["h e"],
        "ggml.token_type": [1] * 256 + [3, 3, 1],
        "ggml.bos_token_id": 256,
        "ggml.eos_token_id": 257,
    }
    return write_vocabulary(path / "bpe.gguf", base | fields)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    split = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in split]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "it's 2024, a  b", ["it", "'s", " 2024", ",", " a", " ", " b"]),
        ("smollm", "it's 2024", ["it", "'s", " ", "2", "0", "2", "4"]),
        ("llama-bpe", "It'S 12345\n\nx", ["It", "'S", " ", "123", "45", "\n\n", "x"]),
        ("qwen2", "It'S 123!\nx", ["It", "'S", " ", "1", "2", "3", "!\n", "x"]),
        ("default", "a 2024, b", ["a", " ", "202", "4", ",", " b"]),
    ],
)
def test_where_a_text_is_split(pre: str, text: str, expected: list[str], tmp_path: Path) -> None:
    assert pieces(byte_level(tmp_path, pre), text) == expected


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "default"])
@settings(max_examples=30)
@given(text=texts)
def test_any_text_survives(pre: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = _CACHE.get(pre) or byte_level(tmp_path_factory.mktemp("bpe"), pre)
    _CACHE[pre] = tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


_CACHE: dict[str, Tokenizer] = {}


def test_beginning_and_end_as_the_file_says(tmp_path: Path) -> None:
    assert byte_level(tmp_path, "gpt-2").encode("h") == [104]
    assert byte_level(tmp_path, "llama-bpe").encode("h") == [256, 104]
    without = byte_level(tmp_path, "llama-bpe", **{"ggml.add_bos_token": False})
    assert without.encode("h") == [104]
    both = {"ggml.add_bos_token": True, "ggml.add_eos_token": True}
    assert byte_level(tmp_path, "gpt-2", **both).encode("h") == [256, 104, 257]
    assert byte_level(tmp_path, "gpt-2", **both).encode("h", add_special_tokens=False) == [104]


def test_end_of_turn_ends_too(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, "gpt-2", **{"ggml.eot_token_id": 256})
    assert tokenizer.eos_token_ids == (257, 256)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ggml.pre": "tekken"}, "pre = 'tekken' is not supported; supported: default, gpt-2"),
        ({"ggml.model": "bert"}, "model = 'bert' is not supported"),
        ({"ggml.eos_token_id": 300}, "eos_token_id = 300, expected less than 259"),
        ({"ggml.merges": ["h q1"]}, "the merges do not fit the tokens"),
        ({"ggml.token_type": [1, 2]}, "2 token types for 259 tokens"),
    ],
)
def test_refused_by_name(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        byte_level(tmp_path, "gpt-2", **fields)


class TestChatTemplate:
    MESSAGES = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <b> & 'you' é"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    )
    TOOLS = ({"type": "function", "function": {"name": "now", "description": "é <x>"}},)
    TEMPLATE = """{%- set ns = namespace(n=0) -%}
    {{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}
    {% for m in messages %}
        {% if m.role == 'system' %}{% continue %}{% endif %}
        {% set ns.n = ns.n + 1 %}
        {% generation %}[{{ ns.n }} {{ m.role }}] {{ m.content | trim }}{% endgeneration %}
    {% endfor %}
    {% if mood %}({{ mood }}){% endif %}
    {% if add_generation_prompt %}[assistant]{% endif %}"""

    def of(self, template: str | None, directory: Path) -> Tokenizer:
        tiny.save_tokenizer(directory)
        if template is not None:
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        (directory / "config.json").write_text('{"model_type": "llama"}')
        return Tokenizer.from_directory(directory)

    @pytest.mark.parametrize("tools", [None, TOOLS])
    @pytest.mark.parametrize("prompt", [True, False])
    def test_same_text_as_transformers(
        self, prompt: bool, tools: tuple[dict[str, Any], ...] | None, tmp_path: Path
    ) -> None:
        ours = self.of(self.TEMPLATE, tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        options: dict[str, Any] = {"add_generation_prompt": prompt, "mood": "calm"}
        expected = theirs.apply_chat_template(
            list(self.MESSAGES), tools=tools and list(tools), tokenize=False, **options
        )
        assert ours.render_chat(self.MESSAGES, tools=tools, **options) == expected
        ids = ours.apply_chat_template(self.MESSAGES, tools=tools, **options)
        assert ids[0] == 256
        assert ours.decode(ids, skip_special_tokens=False) == expected

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{% for %}", "chat template: "),
            ("{{ messages[0].content + 1 }}", "chat template: "),
            ("{{ messages.append(1) }}", "chat template: "),
            ("{{ ''.__class__.__mro__ }}", "chat template: .*unsafe"),
        ],
    )
    def test_refusals_are_value_errors(self, template: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            self.of(template, tmp_path).apply_chat_template(self.MESSAGES)

    def test_without_template(self, tmp_path: Path) -> None:
        tokenizer = self.of(None, tmp_path)
        assert not tokenizer.has_chat_template
        with pytest.raises(ValueError, match="no chat template"):
            tokenizer.apply_chat_template(self.MESSAGES)


class TestDirectory:
    @pytest.mark.parametrize(
        ("generation", "config", "expected"),
        [
            ({"eos_token_id": [256, 257]}, {"eos_token_id": 1}, (256, 257)),
            ({}, {"eos_token_id": 5}, (5,)),
            (None, {"eos_token_id": None}, (257,)),
        ],
    )
    def test_where_end_of_sequence_is_looked_up(
        self,
        generation: dict[str, Any] | None,
        config: dict[str, Any],
        expected: tuple[int, ...],
        tmp_path: Path,
    ) -> None:
        tiny.save_tokenizer(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        tokenizer = Tokenizer.from_directory(tmp_path)
        assert tokenizer.eos_token_ids == expected
        assert tokenizer.bos_token_id == 256

    def test_truncation_and_padding_are_switched_off(self, tmp_path: Path) -> None:
        tiny.save_tokenizer(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        path = tmp_path / "tokenizer.json"
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.enable_truncation(3)
        backend.enable_padding(length=8)
        backend.save(str(path))
        assert Tokenizer.from_directory(tmp_path).encode("abcde") == list(b"abcde")

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="the tokenizer cannot be read"):
            Tokenizer.from_directory(tmp_path)

"""Text to token ids and back, from a Hugging Face directory or from a GGUF file's own tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

if TYPE_CHECKING:
    from astrai.models.gguf import GGUFFile


# Characters of a rendered conversation: more than any context holds.
MAX_RENDERED = 1 << 24


class Tokenizer:
    """A fast tokenizer, its special ids and its chat template.

    Owns the backend; its methods may be called from several threads. Does not own any decoding
    state: ids and text go in and come out whole.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None,
        eos_token_ids: Sequence[int],
        chat_template: str | None = None,
        template_tokens: Mapping[str, str] | None = None,
    ) -> None:
        # A tokenizer.json may ask for truncation or padding: that is for training batches.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._chat_template = chat_template
        # What a chat template may name: {"bos_token": "<s>", "eos_token": "</s>", ...}.
        self._template_tokens = dict(template_tokens or {})
        self._bytes_of = _bytes_reader(backend)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised.

        Raises ValueError if `text` is not encodable as UTF-8 (a lone surrogate).
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise ValueError(f"text of {len(text)} characters is not valid Unicode") from None
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids beyond the vocabulary contribute nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this token contributes to a text, between other tokens.

        A special token contributes its text; an id beyond the vocabulary contributes nothing.
        At the start of a text `decode` drops one leading space if `strips_leading_space`.
        """
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._bytes_of(token)

    @cached_property
    def strips_leading_space(self) -> bool:
        """Whether decoding drops the space that encoding put in front of the text."""
        return any(
            d["type"] == "Strip" or (d["type"] == "Metaspace" and d["prepend_scheme"] != "never")
            for d in _decoder_steps(self._backend)
        )

    @cached_property
    def byte_fallback(self) -> bool:
        """Whether single bytes are tokens written <0xAB>, of which an invalid run decodes to one
        U+FFFD per byte."""
        return any(d["type"] == "ByteFallback" for d in _decoder_steps(self._backend))

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @property
    def chat_template(self) -> str | None:
        """The template's source."""
        return self._chat_template

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation; `kwargs` are variables of the template.

        Raises ValueError with the template's own message if it refuses the conversation.
        """
        text = self.render_chat(messages, add_generation_prompt, tools, **kwargs)
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The text `apply_chat_template` encodes."""
        if self._chat_template is None:
            raise ValueError("this model has no chat template")
        from jinja2 import TemplateError

        variables = {
            **self._template_tokens,
            **kwargs,
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text: str = self._compiled_template.render(variables)
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"chat template: {error}") from error
        except (ArithmeticError, IndexError, MemoryError, RecursionError) as error:
            raise ValueError(f"chat template: {type(error).__name__}: {error}") from error
        if len(text) > MAX_RENDERED:
            raise ValueError(
                f"chat template: it made {len(text)} characters, expected at most {MAX_RENDERED}"
            )
        return text

    @cached_property
    def _compiled_template(self) -> Any:
        return _compile_template(self._chat_template or "")

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """From the tokenizer files of a Hugging Face directory; no code of the model is run.

        End of sequence is what generation_config.json says, else config.json, else the tokenizer.
        """
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: the tokenizer cannot be read: {error}") from error
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{path}: {type(loaded).__name__} is not a fast tokenizer")
        template = loaded.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return cls(
            backend,
            bos_token_id=loaded.bos_token_id,
            eos_token_ids=_eos_of_directory(path, loaded.eos_token_id),
            chat_template=template,
            template_tokens={
                k: str(v) for k, v in loaded.special_tokens_map.items() if isinstance(v, str)
            },
        )

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """From the tables of a GGUF file: tokens, merges or scores, kinds, special ids, template.

        Raises ValueError naming the file and the kind that is not supported.
        """
        tokens: list[str] = file.need("tokenizer.ggml.tokens")
        backend = _gguf_backend(file, tokens)
        ids = {
            name: file.metadata.get(f"tokenizer.ggml.{name}_token_id")
            for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
        }
        for name, token_id in ids.items():
            if token_id is not None and not 0 <= token_id < len(tokens):
                raise ValueError(
                    f"{file.path}: {name}_token_id = {token_id}, expected less than {len(tokens)}"
                )
        short = {"unknown": "unk", "padding": "pad"}
        return cls(
            backend,
            bos_token_id=ids["bos"],
            eos_token_ids=[i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None],
            chat_template=file.metadata.get("tokenizer.chat_template"),
            template_tokens={
                f"{short.get(name, name)}_token": tokens[i]
                for name, i in ids.items()
                if i is not None
            },
        )


class ByteTokenizer(Tokenizer):
    """One token per byte, 256 = <bos>, 257 = <eos>: for tests and for models without tokenizer."""

    def __init__(self) -> None:
        characters = {byte: char for char, byte in _BYTE_OF.items()}
        backend = tokenizers.Tokenizer(
            models.BPE({characters[byte]: byte for byte in range(256)}, [])
        )
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(t, special=True) for t in ("<bos>", "<eos>")])
        super().__init__(
            backend,
            bos_token_id=256,
            eos_token_ids=(257,),
            chat_template=(
                "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                "{% if add_generation_prompt %}assistant: {% endif %}"
            ),
        )


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, inverted.

    Printable Latin-1 stands for itself; the other bytes, in order, are U+0100, U+0101, ...
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _bytes_reader(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """How the backend's decoder turns one token's text into bytes."""
    kinds = {step["type"] for step in _decoder_steps(backend)}
    if "ByteLevel" in kinds:
        return _byte_level_bytes
    if kinds & {"ByteFallback", "Metaspace"} or kinds == {"Replace", "Fuse", "Strip"}:
        return _sentencepiece_bytes
    raise ValueError(f"tokenizer decoder {sorted(kinds)} is not supported")


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # an added token outside the alphabet stands for its own text
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes((int(token[3:5], 16),))
        except ValueError:
            pass
    return token.replace("▁", " ").encode()


def _eos_of_directory(path: Path, fallback: int | None) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        file = path / name
        if not file.is_file():
            continue
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        if eos is not None:
            return list(eos) if isinstance(eos, list) else [eos]
    return [] if fallback is None else [fallback]


def _compile_template(source: str) -> Any:
    """A chat template under the names and settings templates are written for.

    Templates come with models and are not trusted: the sandbox forbids mutation and internals, and
    sums and products that fill the memory in a few steps.
    """
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Generation(Extension):
        """{% generation %}..{% endgeneration %} marks training targets; here it is its content."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**"})

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            size = _size_of_result(operator, left, right)
            if size > MAX_RENDERED:
                raise SecurityError(f"{operator} would make {size} items, at most {MAX_RENDERED}")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"chat template: {error}") from error


def _size_of_result(operator: str, left: Any, right: Any) -> int:
    """Items of texts and lists, bits of integers: what the result takes, about."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        return bits * max(right, 0) if operator == "**" else bits + right.bit_length()
    sized = (str, bytes, list, tuple)
    if operator == "+":
        both = isinstance(left, sized) and isinstance(right, sized)
        return len(left) + len(right) if both else 0
    for items, n in ((left, right), (right, left)):
        if isinstance(n, int) and isinstance(items, sized):
            return len(items) * max(n, 0)
    return 0


# Kinds of tokens in tokenizer.ggml.token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    return (
        rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# tokenizer.ggml.pre: the expressions that split a text, one after the other.
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_words("{1,3}"),),
    "qwen2": (_words(""),),
}
_SPLITS |= dict.fromkeys(("llama3", "llama-v3", "smaug-bpe"), _SPLITS["llama-bpe"])
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")


def _gguf_backend(file: GGUFFile, tokens: list[str]) -> tokenizers.Tokenizer:
    model = file.need("tokenizer.ggml.model")
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    kinds: list[int] = file.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise ValueError(f"{file.path}: {len(kinds)} token types for {len(tokens)} tokens")
    if model == "gpt2":
        if pre not in _SPLITS:
            raise ValueError(
                f"{file.path}: tokenizer.ggml.pre = {pre!r} is not supported; "
                f"supported: {', '.join(_SPLITS)}"
            )
        backend = _byte_level(file, tokens, pre)
        adds_bos = pre in _LLAMA3
    elif model == "llama":
        backend = _sentencepiece(file, tokens, kinds)
        adds_bos = True
    else:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.model = {model!r} is not supported; "
            "supported: gpt2, llama"
        )
    for kind, special in ((_CONTROL, True), (_UNKNOWN, True), (_USER_DEFINED, False)):
        backend.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, its in zip(tokens, kinds)
                if its == kind
            ]
        )
    before = _ends(file, "bos", adds_bos)
    after = _ends(file, "eos", False)
    if before or after:
        named = [(tokens[i], i) for i in (*before, *after)]
        backend.post_processor = processors.TemplateProcessing(
            single=[*(tokens[i] for i in before), "$A", *(tokens[i] for i in after)],
            special_tokens=named,
        )
    return backend


def _ends(file: GGUFFile, name: str, default: bool) -> list[int]:
    token_id = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    wanted = file.metadata.get(f"tokenizer.ggml.add_{name}_token", default)
    return [token_id] if wanted and token_id is not None else []


def _byte_level(file: GGUFFile, tokens: list[str], pre: str) -> tokenizers.Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in file.need("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        # A whole word that is a token stays whole in the vocabularies of Llama 3's kind.
        model = models.BPE(vocab, merges, ignore_merges=pre in _LLAMA3)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file.path}: the merges do not fit the tokens: {error}") from error
    backend = tokenizers.Tokenizer(model)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits: Iterable[Any] = (
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GGUFFile, tokens: list[str], kinds: list[int]) -> tokenizers.Tokenizer:
    """Sentencepiece BPE: the pair whose union scores highest is merged first."""
    scores: list[float] = file.need("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise ValueError(f"{file.path}: {len(scores)} scores for {len(tokens)} tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    whole = {i for i, kind in enumerate(kinds) if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)}
    merges: list[tuple[float, tuple[str, str]]] = []
    for i, token in enumerate(tokens):
        if i in whole:
            continue
        pairs = [(token[:n], token[n:]) for n in range(1, len(token))]
        pairs = [
            (left, right)
            for left, right in pairs
            if vocab.get(left, i) not in whole | {i} and vocab.get(right, i) not in whole | {i}
        ]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges.extend((scores[i], pair) for pair in pairs)
    merges.sort(key=lambda m: (m[0], len(m[1][0]), len(m[1][1])), reverse=True)
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            [pair for _, pair in merges],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), spaces] if prefix else [spaces]
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend

"""The real default model continues real prompts with the very tokens of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from astrai.inference.cache.storage import PagedCache
from astrai.kernels.attention import AttentionBatch, load_backend
from astrai.models.loading import LoadedModel, load_model

N_NEW = 128
PAGE = 64
QUESTIONS = [
    "What is gravity?",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain to a ten-year-old how a bicycle stays upright.",
    "Give me three tips for sleeping better.",
    "Translate to French: The weather is nice today.",
    "What is 17 times 23? Show your work.",
    "Write a Python function that reverses a string.",
    "Summarise the plot of Romeo and Juliet in two sentences.",
]
TEXTS = [
    "The history of the Roman Empire begins with",
    "In 1969, the first humans landed on the Moon. The mission, called",
]


@pytest.fixture(scope="module")
def loaded(smollm2_path: Path) -> LoadedModel:
    return load_model(str(smollm2_path), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def prompts(loaded: LoadedModel) -> list[list[int]]:
    chats = [
        loaded.tokenizer.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS
    ]
    return chats + [loaded.tokenizer.encode(text) for text in TEXTS]


def greedy_through_pages(loaded: LoadedModel, prompts: list[list[int]]) -> list[list[int]]:
    config, decoder = loaded.config, loaded.decoder
    per_task = -(-(max(map(len, prompts)) + N_NEW) // PAGE)
    kv = PagedCache(
        config.n_layers,
        per_task * len(prompts),
        PAGE,
        config.n_kv_heads,
        config.head_dim,
        dtype=torch.float32,
    )
    attention = load_backend("cpu")(kv, config)
    tables = [list(range(i, kv.n_pages, len(prompts))) for i in range(len(prompts))]
    out: list[list[int]] = [[] for _ in prompts]
    starts, rows = [0] * len(prompts), prompts
    for _ in range(N_NEW):
        counts = [len(row) for row in rows]
        groups = [[i] for i, count in enumerate(counts) if count == 1]
        attention.plan(AttentionBatch(starts, counts, tables, groups))
        ids = torch.tensor([token for row in rows for token in row])
        positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, counts)])
        last = torch.tensor(counts).cumsum(0) - 1
        hidden = decoder.forward(ids, positions, attention.run)[last]
        tokens = decoder.logits(hidden).argmax(-1).tolist()
        starts = [s + n for s, n in zip(starts, counts)]
        rows = [[token] for token in tokens]
        for its, token in zip(out, tokens):
            its.append(token)
    return out


def read_by_transformers(path: Path) -> transformers.PreTrainedModel:
    """Its own reading of the file, configuration and tensors. (from_pretrained(gguf_file=...)
    does the same, but asks for one more package.)"""
    fields = load_gguf_checkpoint(str(path))["config"]
    config = transformers.LlamaConfig(**{k: v for k, v in fields.items() if k[0] != "_"})
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    absent = model.load_state_dict(tensors, strict=False)
    assert absent.missing_keys == ["lm_head.weight"]  # tied to the embedding
    assert absent.unexpected_keys == []
    return model


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> transformers.PreTrainedModel:
    return read_by_transformers(smollm2_path)


@pytest.fixture(scope="module")
def answers(loaded: LoadedModel, prompts: list[list[int]]) -> list[list[int]]:
    return greedy_through_pages(loaded, prompts)


def test_same_greedy_tokens_as_transformers(
    answers: list[list[int]], prompts: list[list[int]], reference: transformers.PreTrainedModel
) -> None:
    """transformers, given our first n tokens, chooses our next one, for every n: so its greedy
    tokens are ours. One forward per prompt instead of 128."""
    for prompt, answer in zip(prompts, answers):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answer])).logits[0]
        assert len(answer) == N_NEW
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


@pytest.mark.slow
def test_same_tokens_as_generate_of_transformers(
    answers: list[list[int]], prompts: list[list[int]], reference: transformers.PreTrainedModel
) -> None:
    for prompt, answer in zip(prompts, answers):
        with torch.inference_mode():
            whole = reference.generate(
                torch.tensor([prompt]),
                do_sample=False,
                max_new_tokens=N_NEW,
                min_new_tokens=N_NEW,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert whole[0, len(prompt) :].tolist() == answer


def test_answers_end_where_the_file_says(loaded: LoadedModel) -> None:
    assert loaded.eos_token_ids == (2,)
    assert loaded.tokenizer.decode([2], skip_special_tokens=False) == "<|im_end|>"

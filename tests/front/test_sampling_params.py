from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from astrai.front.sampling_params import (
    MAX_LOGPROBS,
    SamplingParams,
    bad_word_ends,
    early_ends,
    resolve_seed,
)


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.stop, params.logit_bias) == (16, (), None)
    assert not params.greedy
    assert not params.penalised


@pytest.mark.parametrize(
    ("field", "value", "number"),
    [
        ("n", 0, "0"),
        ("n", 16_385, "16385"),
        ("n", True, "True"),
        ("n", 1.0, "1.0"),
        ("temperature", -0.5, "-0.5"),
        ("temperature", float("nan"), "nan"),
        ("temperature", float("inf"), "inf"),
        ("temperature", "1", "'1'"),
        ("temperature", True, "True"),
        ("temperature", None, "None"),
        ("top_p", 0, "0"),
        ("top_p", 1.01, "1.01"),
        ("top_k", -2, "-2"),
        ("top_k", 1.5, "1.5"),
        ("min_p", -0.1, "-0.1"),
        ("min_p", 1.1, "1.1"),
        ("repetition_penalty", 0.0, "0.0"),
        ("repetition_penalty", float("inf"), "inf"),
        ("presence_penalty", 2.5, "2.5"),
        ("frequency_penalty", -2.5, "-2.5"),
        ("logit_bias", {-1: 0.0}, "-1"),
        ("logit_bias", {"1": 0.0}, "'1'"),
        ("logit_bias", {1: 101.0}, "101.0"),
        ("logit_bias", {1: float("nan")}, "nan"),
        ("logit_bias", [1], "[1]"),
        ("seed", 1 << 64, "18446744073709551616"),
        ("seed", -(1 << 63) - 1, "-9223372036854775809"),
        ("seed", True, "True"),
        ("seed", 1.0, "1.0"),
        ("stop", "", "''"),
        ("stop", ["a", ""], "''"),
        ("stop", [1], "1"),
        ("stop", 5, "5"),
        ("stop_token_ids", [-1], "-1"),
        ("stop_token_ids", [True], "True"),
        ("stop_token_ids", 3, "3"),
        ("ignore_eos", 1, "1"),
        ("skip_special_tokens", None, "None"),
        ("include_stop_str_in_output", "yes", "'yes'"),
        ("min_tokens", -1, "-1"),
        ("min_tokens", 17, "17"),  # more than max_tokens
        ("max_tokens", 0, "0"),
        ("max_tokens", "7", "'7'"),
        ("logprobs", MAX_LOGPROBS + 1, "21"),
        ("logprobs", -1, "-1"),
        ("logprobs", True, "True"),
        ("prompt_logprobs", 21, "21"),
        ("bad_words", [""], "''"),
    ],
)
def test_a_refusal_names_the_field_and_the_value(field: str, value: Any, number: str) -> None:
    with pytest.raises(ValueError, match=field) as refusal:
        SamplingParams(**{field: value})
    assert number in str(refusal.value)


def test_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_values_are_normalised() -> None:
    params = SamplingParams(
        temperature=0,
        top_k=-1,
        seed=np.int64(-5),
        stop="END",
        stop_token_ids=[3, 4],
        bad_words=None,  # type: ignore[arg-type]
        logit_bias={np.int32(7): 1},
        max_tokens=None,
        min_tokens=100,
    )
    assert (params.temperature, params.top_k, params.seed, params.stop) == (0.0, 0, -5, ("END",))
    assert (params.stop_token_ids, params.bad_words) == ((3, 4), ())
    assert params.logit_bias == {7: 1.0}
    assert type(params.seed) is int
    assert params.greedy


def test_nothing_can_be_changed() -> None:
    bias, stop = {1: 2.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)
    bias[2] = 3.0
    stop.append("b")
    assert params.logit_bias == {1: 2.0}
    assert params.stop == ("a",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        params.logit_bias[1] = 0.0  # type: ignore[index]


def test_replace_copy_and_pickle() -> None:
    params = SamplingParams(logit_bias={1: 2.0}, stop=["a"], seed=1)
    changed = dataclasses.replace(params, seed=2, top_k=-1)
    assert (changed.seed, changed.stop, changed.logit_bias) == (2, ("a",), {1: 2.0})
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.asdict(params)["logit_bias"] == {1: 2.0}
    with pytest.raises(ValueError, match="temperature"):
        dataclasses.replace(params, temperature=-1.0)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(stop_token_ids=[50]), "stop_token_ids"),
        (SamplingParams(logit_bias={50: 1.0}), "logit_bias"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(params: SamplingParams, name: str) -> None:
    params.check_vocabulary(51)
    with pytest.raises(ValueError, match=rf"{name}.*50.*vocab_size = 50"):
        params.check_vocabulary(50)


def test_seeds_of_the_completions_of_one_request() -> None:
    assert resolve_seed(7) == 7
    assert resolve_seed(-1) == (1 << 64) - 1
    # SplitMix64's first output for state 0.
    assert resolve_seed(0, 1) == 0xE220A8397B1DCDAF
    seeds = {resolve_seed(seed, index) for seed in range(100) for index in range(100)}
    assert len(seeds) == 100 * 100
    assert resolve_seed(None) != resolve_seed(None)


def test_min_tokens_bans_what_would_end_the_task() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=[9])
    assert early_ends(params, 1, eos_token_ids=[2, 3]) == {2, 3, 9}
    assert early_ends(params, 2, eos_token_ids=[2, 3]) == set()
    ignoring = dataclasses.replace(params, ignore_eos=True)
    assert early_ends(ignoring, 0, eos_token_ids=[2]) == {9}


def test_bad_words_ban_their_last_token_after_the_others() -> None:
    words = ((5,), (1, 2, 3))
    assert bad_word_ends([], words) == {5}
    assert bad_word_ends([1], words) == {5}
    assert bad_word_ends([0, 1, 2], words) == {3, 5}
    assert bad_word_ends([1, 2, 0], words) == {5}


def test_imports_no_torch() -> None:
    code = "import sys, astrai.front.sampling_params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

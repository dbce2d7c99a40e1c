"""A real vLLM under the conditions that hide tokens, repeat them or take them back. `make vllm-test` runs these.

They need the environment of deploy/vllm/setup.sh (3.4 GB), which the checks of every change do without. What the last run
found stands in docs/vllm-test.txt.
"""

import random
from pathlib import Path

import pytest
import torch

from deploy.vllm import engine
from guard.reader import weights
from tests import random_pack
from tests.conftest import REPOSITORY
from tests.tap.vllm.engines import EngineEndedError, against_alone, run

pytestmark = [
    pytest.mark.skipif(
        not (engine.environment() / ".installed").exists(),
        reason="no environment with vLLM (3.4 GB): make vllm-test makes it",
    ),
    pytest.mark.timeout(1800),
]
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def say():
    """Writes a line of figures for docs/vllm-test.txt."""
    file = REPOSITORY / ".build" / "vllm-test.txt"
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as out:

        def write(name, told, likeness, **more):
            preempted, cached = (told.counters.get(f"vllm:{n}", 0) for n in ("num_preemptions", "prefix_cache_hits"))
            out.write(
                f"{name}: vLLM {told.info.engine_version}, {told.info.dtype}, {likeness.requests} requests, "
                f"{likeness.tokens} tokens, {likeness.hits} hits; Jaccard {likeness.jaccard:.7f} ({likeness.flips} differ, at most {likeness.margin:.1e} of a threshold above it), "
                f"largest difference of a value {likeness.value:.2g}, of a probe {likeness.probe:.2g}; preempted {preempted:.0f}, "
                f"tokens from the prefix cache {cached:.0f}"
                + "".join(f"; {key.replace('_', ' ')} {value}" for key, value in more.items())
                + "\n"
            )
            out.flush()

        yield write


def assert_same(like):
    """The same hits, but for those that float32's own rounding decides: vLLM and transformers sum in another order.

    Of 1.6 million hits one was seen to flip, by one unit in the last place above its threshold.
    """
    assert like.margin < 1e-5
    assert like.jaccard > 0.99999
    assert like.probe < 1e-3


def ids(rng, length):
    return [rng.randrange(100, 40_000) for _ in range(length)]


def requests(rng, count, *, longest, answers=24, stems=(), **params):
    """Of mixed length; with `stems` each begins with one of them."""
    return [
        {
            "prompt": [*(rng.choice(stems) if stems else ()), *ids(rng, rng.randrange(3, longest))],
            "params": GREEDY | {"max_tokens": rng.randrange(2, answers)} | params,
        }
        for _ in range(count)
    ]


def test_200_at_once_in_chunks_with_shared_prefixes(tmp_path, model_folder, say):
    rng = random.Random(1)
    stems = [ids(rng, length) for length in (33, 64, 130, 200)]
    waves = [
        requests(rng, 200, longest=160, stems=stems),
        requests(rng, 20, longest=40, stems=stems),
    ]
    waves[1] += [waves[0][number] for number in range(10)]  # the same prompts again
    told = run(tmp_path, model_folder, waves, max_num_seqs=256, max_num_batched_tokens=512)
    assert told.missed == {}
    assert told.counters["vllm:prefix_cache_hits"] > 1000
    like = against_alone(told, model_folder, waves, torch.float32)
    say("200 at once, chunked prefill, shared prefixes", told, like)
    assert_same(like)


def test_a_prefix_that_an_unassessed_request_computed_is_known_to_the_next_one(tmp_path, model_folder):
    prompt = ids(random.Random(8), 100)
    params = GREEDY | {"max_tokens": 8}
    waves = [
        [{"prompt": prompt, "params": {"n": 2, "max_tokens": 4, "temperature": 1.0}}],  # two of one id: not assessed
        [{"prompt": prompt, "params": params}],
    ]
    told = run(tmp_path, model_folder, waves)
    first, second = (wave[0]["id"] for wave in told.waves)
    assert list(told.missed) == [first]
    assert told.counters["vllm:prefix_cache_hits"] >= 96
    assert told.reached[second] >= len(prompt) + len(told.answers[second]["ids"]) - 1


def test_preempted_requests_are_told_once(tmp_path, model_folder, say):
    rng = random.Random(2)
    waves = [requests(rng, 40, longest=120, answers=150, ignore_eos=True)]
    told = run(tmp_path, model_folder, waves, max_num_batched_tokens=256, num_gpu_blocks_override=33)
    assert told.missed == {}
    assert told.counters["vllm:num_preemptions"] > 10
    like = against_alone(told, model_folder, waves, torch.float32)
    say("a cache of 1,024 tokens", told, like)
    assert_same(like)


def test_drafts_count_when_they_are_accepted(tmp_path, model_folder, say):
    rng = random.Random(3)
    waves = [requests(rng, 24, longest=60, answers=60)]
    for request in waves[0]:
        request["prompt"] = request["prompt"] * 3  # n-grams that come again
    guess = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    told = run(tmp_path, model_folder, waves, speculative_config=guess, max_num_batched_tokens=256)
    accepted, proposed = (told.counters[f"vllm:spec_decode_num_{what}_tokens"] for what in ("accepted", "draft"))
    assert 0 < accepted < proposed
    like = against_alone(told, model_folder, waves, torch.float32)
    say("n-gram speculation", told, like, drafts=f"{accepted:.0f} of {proposed:.0f} accepted")
    assert_same(like)


def test_compiled_as_it_is_served(tmp_path, model_folder, say):
    """bfloat16 rounds otherwise in every way of computing: the share of hits that flip is told, not hidden."""
    rng = random.Random(4)
    waves = [requests(rng, 24, longest=200)]
    told = run(tmp_path, model_folder, waves, enforce_eager=False, dtype="bfloat16")
    like = against_alone(told, model_folder, waves, torch.bfloat16)
    exact = against_alone(told, model_folder, waves, torch.float32)
    say("compiled, bfloat16", told, like, Jaccard_against_float32=f"{exact.jaccard:.4f}")
    assert told.info.dtype == "bfloat16"
    assert like.jaccard > 0.9


def test_compiled_in_float32(tmp_path, model_folder, say):
    rng = random.Random(5)
    waves = [requests(rng, 24, longest=200)]
    told = run(tmp_path, model_folder, waves, enforce_eager=False)
    like = against_alone(told, model_folder, waves, torch.float32)
    say("compiled, float32", told, like)
    assert_same(like)


@pytest.mark.parametrize("eager", [True, False])
def test_hook_points_that_are_no_layers(tmp_path, model_folder, say, monkeypatch, eager):
    """Read by a custom op, which must be a part of the compiled graph."""
    monkeypatch.setattr(
        random_pack, "HOOK_POINTS", ("model.layers.7.mlp", "model.layers.13", "model.layers.19.self_attn.o_proj")
    )
    pack = random_pack.write_random_pack(tmp_path / "pack", weights.fingerprint(model_folder))
    rng = random.Random(7)
    waves = [requests(rng, 24, longest=200)]
    told = run(tmp_path, model_folder, waves, guard={"pack": str(pack)}, enforce_eager=eager)
    assert "by a custom op" in told.log
    like = against_alone(told, model_folder, waves, torch.float32, pack)
    say(f"other hook points, {'eager' if eager else 'compiled'}", told, like)
    assert like.hits > 1000
    assert_same(like)


@pytest.mark.parametrize(("gather", "latest"), [(1, 5), (8, 12)])
def test_a_blocked_request_ends_whatever_was_asked(tmp_path, model_folder, gather, latest):
    """Where a token that ends the request would not: no end is looked for, or none may be sampled yet."""
    rng = random.Random(6)
    asked = ({}, {}, {"ignore_eos": True}, {"min_tokens": 50}, {"structured_outputs": {"regex": "[a-z]{200}"}})
    waves = [[{"prompt": ids(rng, 30), "params": GREEDY | {"max_tokens": 60} | params} for params in asked]]
    told = run(tmp_path, model_folder, waves, stop=dict.fromkeys("0234", 5), guard={"gather": gather})
    lengths = {name: len(answer["ids"]) for name, answer in told.answers.items()}
    reasons = {name: ended.reason for name, ended in told.ended.items()}
    # The row of the fifth token is told in the step that samples the sixth: nothing of that step goes out.
    assert lengths.pop("1") == 60
    assert all(5 <= length <= latest for length in lengths.values()), lengths
    assert reasons == {"0": "guard", "1": "length", "2": "guard", "3": "guard", "4": "guard"}
    assert told.answers["2"]["finish"] == "stop"


def test_a_pack_of_another_model_ends_the_start(tmp_path, model_folder):
    other = {"weights": "0" * 64, "tokenizer": "1" * 64}
    pack = random_pack.write_random_pack(tmp_path / "pack", other)
    with pytest.raises(EngineEndedError, match=r"model\.weights: found weights f0363c475d9e, expected 000000000000"):
        run(Path(tmp_path), model_folder, [], guard={"pack": str(pack)})

"""A tapped transformers model: it is left as it was, and its verdicts are those of its tokens read alone."""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import guard.tap
from guard.assessor import LocalSink
from guard.errors import ConfigError, InvalidInput
from guard.records import Action, Phase
from tests.assessor.given import scores
from tests.tap.given import BLOCKED, HARMLESS, alone

TEXTS = ("Tell me a story about a dog.", "Name three colours of the sky, and one of the sea 🙂")


@pytest.fixture(scope="module")
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder).eval()


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def sink(assessor, model):
    made = LocalSink(assessor, guard.tap.describe(model, assessor.pack))
    yield made
    made.close()


@pytest.fixture
def prompts(tokenizer):
    def make(*texts, side="left"):
        tokenizer.padding_side = side
        chats = [[{"role": "user", "content": text}] for text in texts]
        return tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )

    return make


def own(inputs, output=None):
    """For each sample, its tokens without padding: those of the prompt, and all but the last of what was generated."""
    masks = inputs["attention_mask"].bool()
    found = []
    for row, mask in enumerate(masks):
        ids = inputs["input_ids"][row][mask].tolist()
        behind = [] if output is None else output[row, masks.shape[1] :].tolist()
        behind = behind[: behind.index(2) + 1] if 2 in behind else behind
        found.append((ids, behind[:-1]))
    return found


def check(assessor, sink, request_id, ids, behind):
    template = assessor.observed.template
    from guard.reader.sequence import TokenSequence
    from guard.reader.turns import Turns

    tokens, turns = TokenSequence(), Turns(template)
    turns.append(ids, Phase.PROMPT, tokens)
    turns.append(behind, Phase.COMPLETION, tokens)
    verdict = sink.verdict(request_id)
    assert verdict.not_assessed == ()
    assert scores(verdict) == pytest.approx(alone(assessor, ids + behind, tokens.phase), abs=1e-4)
    return verdict


@pytest.mark.parametrize("cached", [True, False])
def test_generation_is_judged_token_by_token_and_left_as_it_is(assessor, model, sink, prompts, cached):
    inputs = prompts(*TEXTS)
    settings = {"max_new_tokens": 20 if cached else 3, "do_sample": False, "use_cache": cached}
    before = model.generate(**inputs, **settings)
    with guard.tap.attach(model, assessor.pack, sink) as tap:
        during = model.generate(**inputs, **settings)
        ended = [assessor.observed.find(name) for name in tap.request_ids]  # made up, and told
    assert torch.equal(before, during)
    for request, (ids, behind) in zip(ended, own(inputs, during), strict=True):
        check(assessor, sink, request.id, ids, behind)
        assert (request.counts[Phase.PROMPT], request.counts[Phase.COMPLETION]) == (len(ids), len(behind))
        assert request.finish_reason == "length"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_token(assessor, model, sink, prompts, side):
    inputs = prompts(*TEXTS, side=side)
    with guard.tap.attach(model, assessor.pack, sink, request_ids=[f"{side}-0", f"{side}-1"]), torch.no_grad():
        model(**inputs)
    for number, (ids, _) in enumerate(own(inputs)):
        check(assessor, sink, f"{side}-{number}", ids, [])


@pytest.mark.parametrize("name", ["cache", "past_key_values", ""])
def test_a_loop_of_forwards_with_a_cache_is_one_request(assessor, model, sink, prompts, name):
    names = tuple(inspect.signature(model.forward).parameters)
    if name == "cache" and name not in names:
        pytest.skip("this transformers calls it past_key_values")

    def forward(ids, cache):
        if name:
            return model(input_ids=ids, **{name: cache}, use_cache=True)
        return model(ids, None, None, cache, use_cache=True)

    inputs = prompts(TEXTS[0])
    with guard.tap.attach(model, assessor.pack, sink, request_ids=lambda size: ["loop"] * size), torch.no_grad():
        out = model(**inputs, use_cache=True)
        fed = []
        for _ in range(3):
            fed.append(int(out.logits[0, -1].argmax()))
            out = forward(torch.tensor([fed[-1:]]), out.past_key_values)
        verdict = sink.verdict("loop")
        assert [p.tokens_read for p in verdict.phases][1] == 3
    check(assessor, sink, "loop", own(inputs)[0][0], fed)


def test_a_sample_that_ends_early_is_fed_no_more_tokens(assessor, model, sink, prompts):
    inputs = prompts(*TEXTS)
    free = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    first = int(free[0, inputs["input_ids"].shape[1] + 3])  # ends the first sample after some tokens, and not the other
    if first in free[1, inputs["input_ids"].shape[1] :]:
        pytest.skip("both samples hold that token")
    with guard.tap.attach(model, assessor.pack, sink, request_ids=["short", "long"]):
        model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=[first], pad_token_id=2)
    short, long = (assessor.observed._ended[name] for name in ("short", "long"))
    assert (short.finish_reason, long.finish_reason) == ("stop", "length")
    assert (short.counts[Phase.COMPLETION], long.counts[Phase.COMPLETION]) == (3, 7)


def test_a_sample_ends_at_the_token_on_which_its_verdict_turns_to_block(assessor, model, sink, tokenizer, prompts):
    # The model is made to say it: a forced answer, token by token.
    answer = tokenizer(f"{BLOCKED} {HARMLESS}", add_special_tokens=False)["input_ids"]
    inputs = prompts(*TEXTS)
    width = inputs["input_ids"].shape[1]

    class Forced:
        def __call__(self, ids, scores):
            place = ids.shape[1] - width
            scores[0] = torch.where(torch.arange(scores.shape[1]) == answer[place], 0.0, -torch.inf)
            return scores

    with guard.tap.attach(model, assessor.pack, sink, request_ids=["said", "other"]):
        out = model.generate(**inputs, max_new_tokens=len(answer), do_sample=False, logits_processor=[Forced()])
    ((ids, behind), (_, other)) = own(inputs, out)
    assert 3 < len(behind) < len(answer) - 1
    assert behind == answer[: len(behind)]
    assert out[0, width + len(behind)] == 2  # nothing follows the token that turned it
    verdict = check(assessor, sink, "said", ids, behind)
    assert verdict.action is Action.BLOCK
    assert assessor.observed._ended["said"].finish_reason == "guard"
    assert len(other) == len(answer) - 1


def test_a_blocked_prompt_is_answered_by_nothing(assessor, model, sink, prompts):
    inputs = prompts(BLOCKED)
    with guard.tap.attach(model, assessor.pack, sink, request_ids=["blocked"]):
        out = model.generate(**inputs, max_new_tokens=20, do_sample=True)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == [2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams: found 4, expected 1: beams swap tokens that a tap has told of already"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation: found an assistant or prompt lookup, expected none"),
        ({"assistant_model": "itself"}, "assisted generation: found an assistant or prompt lookup, expected none"),
        ({"guidance_scale": 1.5}, "guidance_scale: found guidance, expected none"),
    ],
)
def test_what_cannot_be_told_is_refused(assessor, model, sink, prompts, settings, message):
    given = {key: model if value == "itself" else value for key, value in settings.items()}
    with guard.tap.attach(model, assessor.pack, sink), pytest.raises(InvalidInput, match=message):
        model.generate(**prompts(TEXTS[0]), max_new_tokens=4, **given)


@pytest.mark.parametrize("cached", [True, False])
def test_what_a_logits_processor_asks_the_model_is_no_token_of_the_text(assessor, model, sink, prompts, cached):
    class Asks:
        def __call__(self, ids, scores):
            held = None
            for _ in range(2):  # text of its own, with a cache of its own
                asked = model(input_ids=ids[:, -6:], past_key_values=held, use_cache=cached)
                held = asked.past_key_values
            return scores

    inputs = prompts(*TEXTS)
    settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": cached}
    before = model.generate(**inputs, **settings)
    with guard.tap.attach(model, assessor.pack, sink, request_ids=[f"asked-{cached}-0", f"asked-{cached}-1"]):
        during = model.generate(**inputs, **settings, logits_processor=[Asks()])
    assert torch.equal(before, during)
    for number, (ids, behind) in enumerate(own(inputs, during)):
        check(assessor, sink, f"asked-{cached}-{number}", ids, behind)


def test_forwards_that_cannot_be_told_from_others_are_not_assessed(assessor, model, sink, prompts, monkeypatch):
    tap = guard.tap.torch_hooks.TorchTap
    monkeypatch.setattr(tap, "_goes_on", lambda *_: False)  # as where a model hands out another cache each time
    with guard.tap.attach(model, assessor.pack, sink, request_ids=["apart"]):
        model.generate(**prompts(TEXTS[0]), max_new_tokens=6, do_sample=False)
    verdict = sink.verdict("apart")
    assert verdict.action is Action.NOT_ASSESSED
    assert [why.detail for why in verdict.not_assessed] == [
        "its forwards could not be told from others': 5 tokens were passed over"
    ]


def test_a_batch_that_knows_no_end_of_text_pads_what_is_over(assessor, model, sink, prompts, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(model.generation_config, "pad_token_id", None)
    inputs = prompts(BLOCKED, TEXTS[0])
    with guard.tap.attach(model, assessor.pack, sink):
        with pytest.raises(InvalidInput, match="found neither an end-of-text nor a pad token for a batch of 2"):
            model.generate(**inputs, max_new_tokens=6)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    answers = out[:, inputs["input_ids"].shape[1] :].tolist()
    assert answers[0] == [0] * 6
    assert 0 not in answers[1]


def test_one_tap_within_another_leaves_it_whole(assessor, model, sink, prompts, monkeypatch):
    monkeypatch.setattr(model, "generate", model.generate)  # the caller's own
    before = model.generate
    with guard.tap.attach(model, assessor.pack, sink, request_ids=["outer"]):
        with guard.tap.attach(model, assessor.pack, sink, request_ids=["inner"]):
            pass
        with pytest.raises(InvalidInput, match="num_beams"):
            model.generate(**prompts(TEXTS[0]), max_new_tokens=2, num_beams=2)
    assert model.generate is before


def test_request_ids_serve_once_and_fit_the_batch(assessor, model, sink, prompts):
    with guard.tap.attach(model, assessor.pack, sink, request_ids=["only"]), torch.no_grad():
        with pytest.raises(InvalidInput, match="request_ids: found 1, expected 2, one for each sample of the batch"):
            model(**prompts(*TEXTS))
        with pytest.raises(InvalidInput, match="found 0, expected 1"):
            model(**prompts(TEXTS[0]))


def test_nothing_stays_behind_also_after_an_error(assessor, model, sink, prompts):
    before = (
        dict(model.__dict__),
        [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
    )
    with pytest.raises(RuntimeError, match="of the engine"), guard.tap.attach(model, assessor.pack, sink):
        raise RuntimeError("of the engine")
    after = (
        dict(model.__dict__),
        [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
    )
    assert before[0].keys() == after[0].keys()
    assert before[1] == after[1]


def test_one_samples_nan_is_not_the_others(assessor, model, sink, prompts):
    inputs = prompts(*TEXTS, side="right")

    def spoil(_module, _inputs, output):
        output[0, 3:] = torch.nan
        return output

    handle = model.get_submodule("model.layers.22").register_forward_hook(spoil)
    try:
        with guard.tap.attach(model, assessor.pack, sink, request_ids=["nan", "fine"]), torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    assert [m.reason for m in sink.verdict("nan").not_assessed] == ["non_finite"]
    assert sink.verdict("fine").not_assessed == ()


def test_a_cache_that_was_filled_elsewhere_hides_its_tokens(assessor, model, sink, prompts):
    inputs = prompts(TEXTS[0])
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        with guard.tap.attach(model, assessor.pack, sink, request_ids=["late"]):
            model(input_ids=torch.tensor([[42, 43]]), past_key_values=out.past_key_values, use_cache=True)
    verdict = sink.verdict("late")
    assert (verdict.action, [m.reason for m in verdict.not_assessed]) == ("not_assessed", ["rows_missing"])


def test_a_cache_that_was_cropped_holds_another_text(assessor, model, sink, prompts):
    inputs = prompts(TEXTS[0])
    ids = iter(("first", "second"))
    with guard.tap.attach(model, assessor.pack, sink, request_ids=lambda _: [next(ids)]), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        cache.crop(6 - cache.get_seq_length())
        model(input_ids=inputs["input_ids"][:, :3], past_key_values=cache, use_cache=True)
    verdict = sink.verdict("second")
    assert (verdict.action, [m.reason for m in verdict.not_assessed]) == ("not_assessed", ["rows_missing"])


def small(tmp_path, **sizes):
    config = {"vocab_size": 64, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(**(config | sizes)))
    made.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    return AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"hidden_size": 576, "num_hidden_layers": 9},
            r"hook point 'model.layers.14': LlamaForCausalLM has no such module; pack .* was made for smollm2",
        ),
        ({"hidden_size": 64, "num_hidden_layers": 23}, r"d_model: found 64 \(LlamaForCausalLM\), expected 576"),
        (
            {"hidden_size": 576, "num_hidden_layers": 23, "intermediate_size": 8},
            r"model: found weights \w{12}, expected f0363c475d9e .*: tap that model, or pass allow_unverified=True",
        ),
    ],
)
def test_a_model_that_the_pack_does_not_fit_is_refused(assessor, sink, tmp_path, sizes, message):
    with pytest.raises(ConfigError, match=message), guard.tap.attach(small(tmp_path, **sizes), assessor.pack, sink):
        pass


def test_a_compiled_model_is_refused(assessor, sink):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    model.compile()
    with pytest.raises(ConfigError, match=r"compiled by torch\.compile"), guard.tap.attach(model, assessor.pack, sink):
        pass

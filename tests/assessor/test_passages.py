"""A harmful passage is told wherever it stands in a long text, and the verdict says where."""

import numpy as np
import pytest

from guard.reader import weights
from guard.records import Action, CheckInput, CheckOptions, Message, Phase, Role
from tests.assessor.given import CHAT, LONG, TEXTS, cut, heads, scores, stream
from tests.random_pack import write_random_pack
from tests.tap.given import alone

EVERYTHING = CheckOptions(max_attributions=100, token_detail=True)
TALK = (*CHAT, Message(Role.ASSISTANT, LONG[:300]), Message(Role.USER, LONG[300:700]))
INPUTS = [CheckInput(LONG), CheckInput(TALK, LONG[:500]), CheckInput(None, TEXTS[4] * 6)]


@pytest.fixture(scope="module")
def by_passages(loading, model_folder, tmp_path_factory):
    """Random rows over passages of 32 tokens: heads find other passages severest."""
    pack = write_random_pack(tmp_path_factory.mktemp("packs") / "random", weights.fingerprint(model_folder))
    with loading(pack=str(pack)) as assessor:
        yield assessor


def test_a_passages_parts_add_up_to_its_logit_and_tokens_outside_add_nothing(by_passages):
    told = 0
    for given in INPUTS:
        verdict = by_passages.check(given, EVERYTHING)
        for (phase, domain, kind), head in heads(verdict).items():
            assert head.bias + sum(a.contribution for a in head.attributions) + head.rest == pytest.approx(
                head.logit, abs=1e-4
            )
            tokens = next(p for p in verdict.phases if p.phase is phase).tokens
            parts = [token.contributions[f"{domain}.{kind}"] for token in tokens]
            assert head.bias + sum(parts) == pytest.approx(head.logit, abs=1e-4)
            if head.passage is None:
                continue
            told += 1
            begin, end = (head.passage.message, head.passage.start), (head.passage.end_message, head.passage.end)
            inside = [begin <= (t.message, t.start) < end for t in tokens]
            assert head.passage.tokens <= sum(inside) <= head.passage.tokens + 6  # a character may be several tokens
            assert all(part == 0 for part, within in zip(parts, inside, strict=True) if not within)
            assert sum(part != 0 for part in parts) <= head.passage.tokens
            for span in (span for a in head.attributions for span in a.spans):
                assert begin <= (span.message, span.start) < end
    assert told > 5


def test_a_text_in_pieces_ends_at_the_passages_of_the_whole(by_passages):
    whole = by_passages.check(CheckInput(LONG, LONG[:500]))
    streamed = stream(by_passages, prompt=cut(LONG, [7, 40]), completion=cut(LONG[:500], [13]))[-1]
    assert scores(streamed) == pytest.approx(scores(whole), abs=1e-3)
    found = [{name: head.passage for name, head in heads(v).items()} for v in (whole, streamed)]
    assert found[0] == found[1]
    assert any(found[0].values())


def test_scores_are_those_of_a_plain_computation(by_passages):
    for text in (LONG[:300], LONG[:500]):
        tokens = by_passages.pipeline.tokenize(CheckInput(text))
        sink = [by_passages.pipeline.tokenizer.sink_id]
        expected = alone(by_passages, sink + tokens.ids, [None, *tokens.phase])
        assert scores(by_passages.check(CheckInput(text))) == pytest.approx(expected, abs=1e-4)


def test_what_is_decided_without_reasons_is_what_a_verdict_says(by_passages):
    """Taps ask for actions alone, and of many phases at once."""
    pipeline = by_passages.pipeline
    states, said = [], []
    for text in (LONG, LONG[:800], TEXTS[0], TEXTS[4] * 6):
        state = pipeline.heads.new_state()
        for unit, _ in (plan := pipeline.plan_of(pipeline.tokenize(CheckInput(text)), chat=False)).reads:
            pipeline.run([unit])
            hits = pipeline.join(unit.encoded)
            state.add(hits, np.zeros((hits.tokens, 3), dtype=np.int64))
        assert plan.reads
        states.append(state)
        (phase,) = by_passages.check(CheckInput(text)).phases
        said.append({d.domain: d.action for d in phase.domains if d.action is not Action.ALLOW})
    assert pipeline.heads.actions(states) == said
    assert any(said)


def test_harm_is_found_behind_and_before_much_that_is_harmless(assessor):
    assert assessor.pack.manifest.pooling.passage_tokens > 0
    threat = (
        "Watch your back, because the next time I catch you alone I will smash your skull with a hammer. I will wait "
        "outside your house tonight and stab you until you stop moving, and nobody will ever find your body."
    )
    calm = "The river ran low that summer, and the farmers talked of rain every evening on the porch. " * 12
    text = f"{calm}{threat} {calm}"
    harm, plain = (heads(assessor.check(CheckInput(t)))[Phase.PROMPT, "violence", "harm"] for t in (text, calm))
    assert harm.passage is not None
    assert harm.passage.start < len(calm) + len(threat)
    assert harm.passage.end > len(calm)
    assert harm.score > harm.flag_at > plain.score

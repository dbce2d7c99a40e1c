"""What the model cannot read is never called safe, and the next caller does not pay for it."""

import pytest
import torch

from guard.reader.model import TorchReader
from guard.records import Action, CheckInput, CheckOptions, Phase
from tests.assessor.given import CHAT, LONG, TEXTS, phase_of, scores, stream
from tests.conftest import PACK


def poison(value, token=3):
    """Puts a value into the activations of one token."""

    def hook(_module, _inputs, output):
        changed = output.clone()
        changed[:, token] = value
        return changed

    return hook


def broken(*_):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("layer", [5, 18])  # below every hook point, and below the last one only
def test_activations_that_are_not_finite_are_not_assessed(assessor, hooked, value, layer):
    given = CheckInput(TEXTS[2])
    before = assessor.check(given)
    with hooked(assessor, poison(value), layer):
        verdict = assessor.check(given, CheckOptions(token_detail=True))
    assert verdict.action is Action.NOT_ASSESSED
    (phase,) = verdict.phases
    assert (phase.action, phase.domains, phase.tokens) == (Action.NOT_ASSESSED, (), ())
    (missing,) = verdict.not_assessed
    assert (missing.reason, missing.phase) == ("non_finite", Phase.PROMPT)
    assert missing.detail == "the model's activations hold NaN or infinity"
    after = assessor.check(given)
    assert not after.not_assessed
    assert scores(after) == pytest.approx(scores(before), abs=1e-6)


def test_a_stream_that_met_nan_stays_not_assessed_and_a_new_one_is_assessed(assessor, hooked):
    session = assessor.open_session()
    with hooked(assessor, poison(torch.nan, token=0)):
        assert session.feed(Phase.PROMPT, TEXTS[1]).result(60).action is Action.NOT_ASSESSED
    last = session.feed(Phase.PROMPT, TEXTS[2], last=True).result(60)
    session.close()
    assert last.action is Action.NOT_ASSESSED
    assert [m.reason for m in last.not_assessed] == ["non_finite"]
    assert stream(assessor, prompt=[TEXTS[1]])[-1].action is not Action.NOT_ASSESSED


@pytest.mark.parametrize("given", [CheckInput(LONG), CheckInput(CHAT, TEXTS[1])])
def test_a_text_that_the_model_fails_at_is_not_assessed_and_the_worker_goes_on(assessor, hooked, caplog, given):
    with hooked(assessor, broken):
        verdict = assessor.check(given, CheckOptions(request_id="r-1"))
    assert (verdict.action, verdict.request_id) == (Action.NOT_ASSESSED, "r-1")
    assert all((p.action, p.tokens_read, p.domains) == (Action.NOT_ASSESSED, 0, ()) for p in verdict.phases)
    assert [(m.reason, m.phase) for m in verdict.not_assessed] == [("reader_failed", p.phase) for p in verdict.phases]
    assert verdict.not_assessed[0].detail == "the model or the encoder raised an error, which Guard's log holds"
    assert "out of memory" in caplog.text
    assert not assessor.check(given).not_assessed
    assert assessor.queue_depth == 0


def test_a_model_that_fails_from_the_start_is_not_served(loading, monkeypatch):
    monkeypatch.setattr(TorchReader, "_run", broken)
    with pytest.raises(RuntimeError, match="out of memory"), loading():
        pass


def test_a_failure_stays_with_its_batch(assessor, hooked, gated):
    fails = [True]

    def once(*_):
        if fails:
            fails.pop()
            raise RuntimeError("out of memory")

    with gated(assessor) as gate, hooked(assessor, once, layer=6):
        first = assessor.submit(CheckInput(TEXTS[0]))
        assert gate.arrived.wait(10)
        others = [assessor.submit(CheckInput(text)) for text in TEXTS[1:4]]
        gate.open()
        assert first.result(60).action is Action.NOT_ASSESSED
        assert all(not future.result(60).not_assessed for future in others)


def test_a_chunk_whose_reading_failed_is_read_with_the_next_one(assessor, hooked):
    session = assessor.open_session()
    session.feed_chat(CHAT).result(60)
    before = session.feed(Phase.COMPLETION, "The committee will").result(60)
    with hooked(assessor, broken, layer=12):
        failed = session.feed(Phase.COMPLETION, " vote on the").result(60)
    assert failed.action is Action.NOT_ASSESSED
    assert [(m.reason, m.phase) for m in failed.not_assessed] == [("reader_failed", Phase.COMPLETION)]
    assert phase_of(failed, Phase.COMPLETION).action is Action.NOT_ASSESSED
    assert scores(failed) == pytest.approx(scores(before), abs=1e-9)  # what was read still speaks
    last = session.feed(Phase.COMPLETION, " tax reform", last=True).result(60)
    session.close()
    whole = assessor.check(CheckInput(CHAT, "The committee will vote on the tax reform"))
    assert not last.not_assessed
    assert scores(last) == pytest.approx(scores(whole), abs=1e-3)
    assert phase_of(last, Phase.COMPLETION).tokens_read == phase_of(whole, Phase.COMPLETION).tokens_read


def test_a_cancelled_chunk_is_read_with_the_next_one(narrow, gated):
    pieces = [LONG[i : i + 150] for i in range(0, 900, 150)]
    session = narrow.open_session()
    with gated(narrow) as gate:
        futures = [session.feed(Phase.PROMPT, piece) for piece in pieces]
        assert gate.arrived.wait(10)
        assert futures[0].cancel()  # being read
        assert futures[3].cancel()  # still waits
        gate.open()
        assert futures[2].result(60).phases
    last = session.feed(Phase.PROMPT, "", last=True).result(60)
    session.close()
    whole = narrow.check(CheckInput("".join(pieces)))
    assert scores(last) == pytest.approx(scores(whole), abs=1e-3)
    assert phase_of(last).tokens_read == phase_of(whole).tokens_read


def test_a_model_that_the_pack_was_not_made_for_is_flagged_in_every_verdict(loading, tmp_path):
    import shutil

    from guard.errors import PackError
    from guard.pack.loader import load_pack
    from tests.random_pack import write_random_pack

    made_for = {"weights": "0" * 64, "tokenizer": load_pack(PACK).manifest.model.tokenizer}
    folder = write_random_pack(tmp_path / "other", made_for)
    with pytest.raises(PackError, match="expected 000000000000"), loading(pack=str(folder)):
        pass
    with loading(pack=str(folder), reader={"allow_unverified": True}) as unverified:
        assert unverified.check(CheckInput("text")).model.verified is False
        assert stream(unverified, prompt=["text"])[-1].model.verified is False
    shutil.rmtree(folder)

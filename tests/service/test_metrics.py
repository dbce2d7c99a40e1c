import re
import time
import urllib.request

import pytest

from guard.errors import InvalidInput
from guard.records import Phase
from guard.service.client import Chunk, GuardClient
from guard.service.metrics import Metrics
from tests.conftest import REPOSITORY
from tests.service.forgetful import Forgetful
from tests.service.running import make_config, running
from tests.service.standin import StandIn, not_assessed

DOCUMENT = REPOSITORY / "docs" / "serving.md"


def scrape(server):
    with urllib.request.urlopen(f"http://{server.bound.metrics}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def value(server, name, seconds=5.0):
    """A call's own metrics are counted right after its answer has been sent."""
    ends = time.monotonic() + seconds
    while (found := scrape(server).get(name)) is None and time.monotonic() < ends:
        time.sleep(0.02)
    return float(found or "nan")


def table():
    rows = re.findall(
        r"^\| `(guard_\w+)` \| (\w+) \| ([\w, ]*) ?\| .+ \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {
        name: (kind, [label for label in labels.replace(" ", "").split(",") if label]) for name, kind, labels in rows
    }


def test_every_metric_stands_in_the_table_with_its_type_and_labels():
    assessor = StandIn(make_config())
    found = {}
    for collector in Metrics(assessor).registry._collector_to_names:
        if not hasattr(collector, "_name"):  # makes its series when scraped
            for family in collector.collect():
                if family.name.startswith("guard_"):
                    found[family.name + "_total"] = (family.type, list(family._labelnames))
            continue
        name, kind = getattr(collector, "_name", ""), getattr(collector, "_type", "")
        if name.startswith("guard_"):
            labels = sorted(collector._value) if kind == "info" else list(collector._labelnames)
            suffix = {"counter": "_total", "info": "_info"}.get(kind, "")
            found[name + suffix] = (kind, labels)
    documented = {
        name: (kind, sorted(labels) if kind == "info" else labels) for name, (kind, labels) in table().items()
    }
    assert found == documented


def test_a_check_is_counted_by_method_phase_and_action(server, client):
    client.check("fine")
    client.check("block")
    client.check("block")
    found = scrape(server)
    assert found['guard_requests_total{action="allow",method="check",phase="prompt"}'] == "1.0"
    assert found['guard_requests_total{action="block",method="check",phase="prompt"}'] == "2.0"
    assert found['guard_domain_actions_total{action="block",domain="violence",phase="prompt"}'] == "2.0"
    assert found['guard_score_bucket{domain="violence",head="harm",le="0.2"}'] == "1.0"
    assert found['guard_score_count{domain="violence",head="harm"}'] == "3.0"
    assert found['guard_stage_seconds_count{stage="tokenize"}'] == "3.0"
    assert found['guard_stage_seconds_count{stage="read"}'] == "3.0"
    assert found["guard_tokens_total"] == "9.0"
    assert found["guard_batch_sequences_count"] == "3.0"
    assert found['guard_batch_seconds_count{stage="encode"}'] == "3.0"


def test_a_stream_counts_once_as_a_request_and_each_chunk_as_a_chunk(server, client):
    list(client.watch([Chunk(Phase.PROMPT, "a"), Chunk(Phase.COMPLETION, "b"), Chunk(Phase.COMPLETION, "block")]))
    assert value(server, 'guard_request_seconds_count{code="OK",method="Watch"}') == 1
    found = scrape(server)
    assert found['guard_requests_total{action="block",method="watch",phase="prompt"}'] == "1.0"
    assert found['guard_requests_total{action="block",method="watch",phase="completion"}'] == "1.0"
    assert found['guard_chunks_total{action="allow",phase="prompt"}'] == "1.0"
    assert found['guard_chunks_total{action="allow",phase="completion"}'] == "1.0"
    assert found['guard_chunks_total{action="block",phase="completion"}'] == "1.0"
    assert found['guard_chunk_seconds_count{phase="completion"}'] == "2.0"
    assert found['guard_score_count{domain="violence",head="harm"}'] == "2.0"


def test_a_stream_that_was_blocked_once_counts_as_blocked():
    standin = Forgetful(make_config())
    with running(standin.config, standin) as server, GuardClient(server.address) as client:
        list(client.watch([Chunk(Phase.COMPLETION, "block"), Chunk(Phase.COMPLETION, "fine")]))
        assert value(server, 'guard_requests_total{action="block",method="watch",phase="completion"}') == 1
        found = scrape(server)
    assert found['guard_domain_actions_total{action="block",domain="violence",phase="completion"}'] == "1.0"
    assert 'guard_requests_total{action="allow",method="watch",phase="completion"}' not in found
    assert found['guard_chunks_total{action="allow",phase="completion"}'] == "1.0"


def test_hits_are_counted_by_domain_hook_point_and_latent(server, client):
    before = scrape(server)
    assert before['guard_hits_total{domain="violence",hook_point="model.layers.3",latent="7"}'] == "0.0"
    client.check("x")
    found = scrape(server)
    assert found['guard_hits_total{domain="violence",hook_point="model.layers.3",latent="7"}'] == "2.0"
    assert found['guard_hits_total{domain="terror",hook_point="model.layers.3",latent="40000"}'] == "1.0"
    assert found['guard_hits_total{domain="none",hook_point="model.layers.9",latent="5"}'] == "0.0"


def test_latents_can_be_left_out_of_the_labels():
    standin = StandIn(make_config(server={"latent_metrics": False}))
    with running(standin.config, standin) as server, GuardClient(server.address) as client:
        client.check("x")
        found = scrape(server)
    hits = {name: count for name, count in found.items() if name.startswith("guard_hits_total")}
    assert hits == {
        'guard_hits_total{domain="violence",hook_point="model.layers.3",latent=""}': "3.0",
        'guard_hits_total{domain="terror",hook_point="model.layers.3",latent=""}': "1.0",
        'guard_hits_total{domain="none",hook_point="model.layers.9",latent=""}': "0.0",
    }


def test_calls_are_timed_by_method_and_result(server, client, standin):
    client.check("x")
    standin.error = InvalidInput("no")
    with pytest.raises(InvalidInput):
        client.check("x")
    standin.error = RuntimeError("a fault")
    with pytest.raises(Exception, match="internal error"):
        client.check("x")
    standin.error = None
    with GuardClient(server.address, timeout_s=0.1) as hasty, pytest.raises(Exception, match="Deadline"):
        hasty.check("never")
    client.pack()
    assert value(server, 'guard_request_seconds_count{code="DEADLINE_EXCEEDED",method="Check"}') == 1
    for code in ("OK", "INVALID_ARGUMENT", "INTERNAL"):
        assert value(server, f'guard_request_seconds_count{{code="{code}",method="Check"}}') == 1
    assert value(server, 'guard_request_seconds_count{code="OK",method="GetPack"}') == 1


def test_what_is_not_assessed_is_counted_by_reason():
    found = Metrics(StandIn(make_config()))
    found.verdict(not_assessed(), "check")
    assert found.registry.get_sample_value("guard_not_assessed_total", {"reason": "nothing_read"}) == 1
    labels = {"method": "check", "phase": "none", "action": "not_assessed"}
    assert found.registry.get_sample_value("guard_requests_total", labels) == 1


def test_depths_and_identities_are_shown(server, client, standin):
    with GuardClient(server.address) as other:
        stream = other.watch(Chunk(Phase.PROMPT, f"{n} ") for n in range(1_000_000))
        next(stream)
        assert scrape(server)["guard_open_sessions"] == "1.0"
        stream.close()
    standin.submit(*_asked("never"))
    found = scrape(server)
    assert found["guard_queue_depth"] == "1.0"
    assert found[f'guard_pack_info{{hash="{"h" * 64}",id="stand-in",version="1.2.3"}}'] == "1.0"
    model = f'dtype="float32",encode_backend="reference",fingerprint="{"w" * 64}",verified="true"'
    assert found[f"guard_model_info{{{model}}}"] == "1.0"
    assert found[f'guard_policy_info{{hash="{"f" * 64}",version="p1"}}'] == "1.0"


def _asked(text):
    from guard.records import CheckInput, CheckOptions

    return CheckInput(text), CheckOptions()

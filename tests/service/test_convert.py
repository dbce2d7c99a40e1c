import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard import records
from guard.errors import GuardError, InvalidInput
from guard.records import CheckInput, CheckOptions, LatentId, Message, NotAssessed, NotAssessedReason, Phase, Role
from guard.service import convert
from guard.service.pb.guard.v1 import guard_pb2 as pb
from tests.service.standin import make_feature, make_pack, make_verdict, not_assessed

SHARED = [
    "Verdict",
    "NotAssessed",
    "PhaseVerdict",
    "DomainVerdict",
    "HeadScore",
    "Passage",
    "Attribution",
    "SpanContribution",
    "TokenDetail",
    "LatentId",
    "Message",
    "PackInfo",
    "PolicyInfo",
    "ModelInfo",
    "Feature",
    "TokenExample",
]


@pytest.mark.parametrize("name", SHARED)
def test_records_and_messages_have_the_same_fields(name):
    record = getattr(records, name)
    fields = getattr(record, "_fields", None) or [
        field.name for field in dataclasses.fields(record)
    ]  # SpanContribution
    assert {field.name for field in getattr(pb, name).DESCRIPTOR.fields} == set(fields)


@pytest.mark.parametrize("name", ["Role", "Phase", "HeadKind", "Action", "NotAssessedReason"])
def test_records_and_messages_have_the_same_enum_values(name):
    values = getattr(pb, name).keys()
    prefix = values[0].removesuffix("UNSPECIFIED")
    assert [value.removeprefix(prefix) for value in values[1:]] == [member.name for member in getattr(records, name)]


@pytest.mark.parametrize(
    "verdict",
    [
        make_verdict("a text", "r-1", phases=(Phase.PROMPT, Phase.COMPLETION)),
        not_assessed("r-2"),
        dataclasses.replace(
            not_assessed(), not_assessed=(NotAssessed(NotAssessedReason.NON_FINITE, "NaN", Phase.COMPLETION),)
        ),
    ],
)
def test_a_verdict_survives_the_way_there_and_back(verdict):
    message = pb.Verdict.FromString(convert.verdict_to_proto(verdict).SerializeToString())
    assert convert.verdict_from_proto(message) == verdict


def test_a_feature_survives_the_way_there_and_back():
    feature = make_feature(LatentId("model.layers.3", 65535), ("violence", "terror"))
    assert convert.feature_from_proto(convert.feature_to_proto(feature)) == feature


@given(
    prompt=st.none() | st.text() | st.lists(st.builds(Message, st.sampled_from(Role), st.text())).map(tuple),
    completion=st.none() | st.text(),
    domains=st.lists(st.text(), max_size=2).map(tuple),
    count=st.integers(0, 100),
)
def test_a_question_survives_the_way_there_and_back(prompt, completion, domains, count):
    asked, options = CheckInput(prompt, completion), CheckOptions(domains, count, token_detail=True, request_id="r")
    request = pb.CheckRequest.FromString(convert.input_to_proto(asked, options).SerializeToString())
    assert convert.input_from_proto(request) == asked
    assert convert.options_from_proto(request.options, request.request_id) == options


def test_options_that_are_not_given_are_the_default_ones():
    assert convert.options_from_proto(pb.CheckOptions(), "") == CheckOptions()
    assert convert.options_from_proto(pb.CheckOptions(max_attributions=0), "").max_attributions == 0


@pytest.mark.parametrize(("role", "found"), [(0, "no role"), (9, "role 9")])
def test_an_unknown_role_is_named_with_its_message(role, found):
    chat = pb.Chat(messages=[pb.Message(role=pb.ROLE_USER, content="a"), pb.Message(content="b")])
    chat.messages[1].role = role
    with pytest.raises(InvalidInput) as raised:
        convert.messages_from_proto(chat)
    assert str(raised.value) == f"message 1: found {found}, expected one of system, user, assistant"
    assert raised.value.reason == "UNKNOWN_ROLE"


def test_json_has_the_names_of_the_records_and_leaves_no_zero_out():
    found = convert.verdict_to_json(make_verdict("text", phases=(Phase.PROMPT,)))
    assert set(found) == {field.name for field in dataclasses.fields(records.Verdict)}
    assert found["action"] == "ACTION_ALLOW"
    assert found["request_id"] == ""
    assert found["not_assessed"] == []
    head = found["phases"][0]["domains"][0]["heads"][0]
    assert head["flag_at"] == 0.5
    assert "block_at" not in head  # this head never blocks
    assert head["attributions"][0]["latent"] == {"hook_point": "model.layers.3", "index": 40_000}
    assert head["attributions"][0]["spans"] == [{"start": 0, "end": 4, "contribution": 1.5, "message": 1}]
    assert "latent" not in head["attributions"][1]  # the dense probe
    assert head["passage"] == {"start": 2, "end": 9, "message": 0, "end_message": 1, "tokens": 3}
    assert found["timings"] == {"tokenize": 0.001, "read": 0.02}


def test_a_pack_shows_its_figures_and_null_for_what_is_no_number():
    pack, verdict = make_pack(), make_verdict()
    response = convert.pack_to_proto(
        pack.info,
        pack.manifest,
        pack.evaluation,
        model=verdict.model,
        policy=verdict.policy,
        encode_backend="cpu",
        reader_dtype="float32",
    )
    found = convert.message_to_json(response)
    assert math.isnan(pack.evaluation["missing"])
    assert found["evaluation"] == {"auroc": {"violence.harm": 0.9375}, "missing": None, "rows": [1.0, 2.0]}
    assert found["hook_points"][0]["sae_tokens"] == "5000000000"  # proto3 JSON writes 64-bit integers as strings
    assert found["heads"][0] == {"domain": "violence", "head": "HEAD_KIND_HARM", "flag_at": 0.5}
    assert found["sources"] == [{"name": "texts", "licence": "CC0-1.0", "use": "fitting"}]
    json.dumps(found, allow_nan=False)


def test_a_value_that_only_a_newer_sidecar_knows_is_named():
    message = convert.verdict_to_proto(make_verdict("x"))
    message.action = 99
    with pytest.raises(
        GuardError, match=r"verdict: found Action 99, expected one of \[1, 2, 3, 4\]: the sidecar is newer"
    ):
        convert.verdict_from_proto(message)

"""Records to protobuf messages and back. Field names are the same on both sides; see proto/guard/v1/guard.proto."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

from google.protobuf import json_format

from guard.assessor.told import Progress
from guard.errors import GuardError, InvalidInput
from guard.pack.manifest import Manifest
from guard.records import (
    Action,
    Attribution,
    CheckInput,
    CheckOptions,
    DomainVerdict,
    Feature,
    HeadKind,
    HeadScore,
    LatentId,
    Message,
    ModelInfo,
    NotAssessed,
    NotAssessedReason,
    PackInfo,
    Passage,
    Phase,
    PhaseVerdict,
    PolicyInfo,
    Role,
    SpanContribution,
    TokenDetail,
    TokenExample,
    Verdict,
)
from guard.service.pb.guard.v1 import guard_pb2 as pb

_Named = TypeVar("_Named", Phase, HeadKind, Action, NotAssessedReason)

MAX_DOMAINS = 1000  # in one request
_ROLES = {getattr(pb, f"ROLE_{role.name}"): role for role in Role}
_PHASES = {getattr(pb, f"PHASE_{phase.name}"): phase for phase in Phase}
_HEADS = {getattr(pb, f"HEAD_KIND_{head.name}"): head for head in HeadKind}
_ACTIONS = {getattr(pb, f"ACTION_{action.name}"): action for action in Action}
_REASONS = {getattr(pb, f"NOT_ASSESSED_REASON_{reason.name}"): reason for reason in NotAssessedReason}
_NUMBERS: dict[object, int] = {
    (type(member), member): number
    for table in (_ROLES, _PHASES, _HEADS, _ACTIONS, _REASONS)
    for number, member in table.items()
}


def _number(member: Role | Phase | HeadKind | Action | NotAssessedReason) -> Any:
    return _NUMBERS[type(member), member]


# ---- what a caller asks


def input_from_proto(request: pb.CheckRequest) -> CheckInput:
    """Raises InvalidInput naming the index of a message whose role is unknown."""
    kind = request.WhichOneof("prompt")
    prompt = request.text if kind == "text" else messages_from_proto(request.chat) if kind == "chat" else None
    return CheckInput(prompt=prompt, completion=request.completion if request.HasField("completion") else None)


def input_to_proto(given: CheckInput, options: CheckOptions) -> pb.CheckRequest:
    request = pb.CheckRequest(
        request_id=options.request_id, completion=given.completion, options=options_to_proto(options)
    )
    if isinstance(given.prompt, str):
        request.text = given.prompt
    elif given.prompt is not None:
        request.chat.CopyFrom(chat_to_proto(given.prompt))
    return request


def messages_from_proto(chat: pb.Chat) -> tuple[Message, ...]:
    """Raises InvalidInput naming the index of a message whose role is unknown."""
    messages = []
    for index, message in enumerate(chat.messages):
        if message.role not in _ROLES:
            found = "no role" if message.role == pb.ROLE_UNSPECIFIED else f"role {int(message.role)}"
            raise InvalidInput(
                f"message {index}: found {found}, expected one of {', '.join(Role)}",
                reason="UNKNOWN_ROLE",
                index=index,
            )
        messages.append(Message(_ROLES[message.role], message.content))
    return tuple(messages)


def chat_to_proto(messages: tuple[Message, ...]) -> pb.Chat:
    return pb.Chat(messages=[pb.Message(role=_number(m.role), content=m.content) for m in messages])


def options_from_proto(options: pb.CheckOptions, request_id: str) -> CheckOptions:
    """Raises InvalidInput for a list of domains that no caller means: millions of them would hold other calls."""
    if len(options.domains) > MAX_DOMAINS:
        raise InvalidInput(
            f"domains: found {len(options.domains)}, expected {MAX_DOMAINS} at most", reason="INVALID_OPTION"
        )
    given = {"max_attributions": options.max_attributions} if options.HasField("max_attributions") else {}
    return CheckOptions(
        domains=tuple(options.domains), token_detail=options.token_detail, request_id=request_id, **given
    )


def options_to_proto(options: CheckOptions) -> pb.CheckOptions:
    return pb.CheckOptions(
        domains=options.domains, max_attributions=options.max_attributions, token_detail=options.token_detail
    )


def phase_from_proto(phase: int) -> Phase | None:
    return _PHASES.get(phase)


def phase_to_proto(phase: Phase) -> Any:
    return _number(phase)


# ---- verdicts


def verdict_to_proto(verdict: Verdict) -> pb.Verdict:
    # Every part is made where it will stand: a message given to another one's constructor is copied, level by level.
    message = pb.Verdict(
        request_id=verdict.request_id,
        action=_number(verdict.action),
        pack=pack_info_to_proto(verdict.pack),
        policy=policy_to_proto(verdict.policy),
        model=model_to_proto(verdict.model),
        timings=verdict.timings,
        audit_id=verdict.audit_id,
    )
    for n in verdict.not_assessed:
        message.not_assessed.add(reason=_number(n.reason), detail=n.detail, phase=_number(n.phase) if n.phase else None)
    for p in verdict.phases:
        phase = message.phases.add(
            phase=_number(p.phase),
            action=_number(p.action),
            tokens_read=p.tokens_read,
            tokens_total=p.tokens_total,
        )
        for d in p.domains:
            domain = phase.domains.add(domain=d.domain, action=_number(d.action))
            for head in d.heads:
                _add_head(domain.heads, head)
        for t in p.tokens:
            phase.tokens.add(start=t.start, end=t.end, message=t.message, contributions=t.contributions)
    return message


def _add_head(heads: Any, head: HeadScore) -> None:
    message = heads.add(
        head=_number(head.head),
        score=head.score,
        logit=head.logit,
        bias=head.bias,
        rest=head.rest,
        flag_at=head.flag_at,
        block_at=head.block_at,
        explained_share=head.explained_share,
        passage=_passage_to_proto(head.passage) if head.passage else None,
    )
    for a in head.attributions:
        attribution = message.attributions.add(
            contribution=a.contribution, share=a.share, peak_activation=a.peak_activation
        )
        attribution.MergeFromString(_constant_part(a.latent, a.name, a.tags, a.explanation_score))
        add = attribution.spans.add
        for start, end, contribution, text in a.spans:
            add(start=start, end=end, contribution=contribution, message=text)


@lru_cache(maxsize=8192)  # several packs' latents
def _constant_part(latent: LatentId | None, name: str, tags: tuple[str, ...], explanation_score: float | None) -> bytes:
    """What every attribution to one latent says, as it goes over the wire."""
    message = pb.Attribution(
        latent=latent_to_proto(latent) if latent else None, name=name, tags=tags, explanation_score=explanation_score
    )
    wire: bytes = message.SerializeToString()
    return wire


def _known(values: dict[int, _Named], number: int) -> _Named:
    if number in values:
        return values[number]
    kind = type(next(iter(values.values()))).__name__
    raise GuardError(
        f"verdict: found {kind} {number}, expected one of {sorted(values)}: the sidecar is newer than this client",
        reason="UNKNOWN_VALUE",
    )


def verdict_from_proto(verdict: pb.Verdict) -> Verdict:
    """Raises GuardError for a value that only a newer sidecar knows."""
    return Verdict(
        request_id=verdict.request_id,
        action=_known(_ACTIONS, verdict.action),
        not_assessed=tuple(
            NotAssessed(_known(_REASONS, n.reason), n.detail, phase_from_proto(n.phase)) for n in verdict.not_assessed
        ),
        phases=tuple(
            PhaseVerdict(
                phase=_known(_PHASES, p.phase),
                action=_known(_ACTIONS, p.action),
                tokens_read=p.tokens_read,
                tokens_total=p.tokens_total,
                domains=tuple(
                    DomainVerdict(d.domain, _known(_ACTIONS, d.action), tuple(_head_from_proto(h) for h in d.heads))
                    for d in p.domains
                ),
                tokens=tuple(TokenDetail(t.start, t.end, t.message, dict(t.contributions)) for t in p.tokens),
            )
            for p in verdict.phases
        ),
        pack=PackInfo(verdict.pack.id, verdict.pack.version, verdict.pack.hash),
        policy=PolicyInfo(verdict.policy.version, verdict.policy.hash),
        model=ModelInfo(verdict.model.fingerprint, verdict.model.verified),
        timings=dict(verdict.timings),
        audit_id=verdict.audit_id,
    )


def _head_from_proto(head: pb.HeadScore) -> HeadScore:
    return HeadScore(
        head=_known(_HEADS, head.head),
        score=head.score,
        logit=head.logit,
        bias=head.bias,
        rest=head.rest,
        flag_at=head.flag_at if head.HasField("flag_at") else None,
        block_at=head.block_at if head.HasField("block_at") else None,
        explained_share=head.explained_share,
        attributions=tuple(
            Attribution(
                latent=latent_from_proto(a.latent) if a.HasField("latent") else None,
                name=a.name,
                tags=tuple(a.tags),
                contribution=a.contribution,
                share=a.share,
                peak_activation=a.peak_activation,
                spans=tuple(SpanContribution(s.start, s.end, s.contribution, s.message) for s in a.spans),
                explanation_score=a.explanation_score if a.HasField("explanation_score") else None,
            )
            for a in head.attributions
        ),
        passage=_passage_from_proto(head.passage) if head.HasField("passage") else None,
    )


def _passage_to_proto(passage: Passage) -> pb.Passage:
    return pb.Passage(
        start=passage.start,
        end=passage.end,
        message=passage.message,
        end_message=passage.end_message,
        tokens=passage.tokens,
    )


def _passage_from_proto(passage: pb.Passage) -> Passage:
    return Passage(passage.start, passage.end, passage.message, passage.end_message, passage.tokens)


def progress_to_proto(progress: Progress) -> pb.FollowResponse:
    return pb.FollowResponse(
        verdict=verdict_to_proto(progress.verdict) if progress.verdict else None,
        prompt_read=progress.prompt_read,
        completion_read=progress.completion_read,
        finished=bool(progress.finish_reason),
        finish_reason=progress.finish_reason,
    )


def verdict_to_json(verdict: Verdict) -> dict[str, Any]:
    """The proto3 JSON mapping with proto field names; zeros and empty lists are printed."""
    return message_to_json(verdict_to_proto(verdict))


def message_to_json(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return found


# ---- packs and their features


def latent_to_proto(latent: LatentId) -> pb.LatentId:
    return pb.LatentId(hook_point=latent.hook_point, index=latent.index)


def latent_from_proto(latent: pb.LatentId) -> LatentId:
    return LatentId(latent.hook_point, latent.index)


def pack_info_to_proto(pack: PackInfo) -> pb.PackInfo:
    return pb.PackInfo(id=pack.id, version=pack.version, hash=pack.hash)


def policy_to_proto(policy: PolicyInfo) -> pb.PolicyInfo:
    return pb.PolicyInfo(version=policy.version, hash=policy.hash)


def model_to_proto(model: ModelInfo) -> pb.ModelInfo:
    return pb.ModelInfo(fingerprint=model.fingerprint, verified=model.verified)


def feature_to_proto(feature: Feature) -> pb.Feature:
    return pb.Feature(
        latent=latent_to_proto(feature.latent),
        name=feature.name,
        explanation=feature.explanation,
        domains=feature.domains,
        subdomains=feature.subdomains,
        firing_rate=feature.firing_rate,
        threshold=feature.threshold,
        scale=feature.scale,
        scores=feature.scores,
        top_tokens=feature.top_tokens,
        examples=[
            pb.TokenExample(text=e.text, start=e.start, end=e.end, activation=e.activation) for e in feature.examples
        ],
        head_weights=feature.head_weights,
        surface_form=feature.surface_form,
        explanation_score=feature.explanation_score,
    )


def feature_from_proto(feature: pb.Feature) -> Feature:
    return Feature(
        latent=latent_from_proto(feature.latent),
        name=feature.name,
        explanation=feature.explanation,
        domains=tuple(feature.domains),
        subdomains=tuple(feature.subdomains),
        firing_rate=feature.firing_rate,
        threshold=feature.threshold,
        scale=feature.scale,
        scores=dict(feature.scores),
        top_tokens=tuple(feature.top_tokens),
        examples=tuple(TokenExample(e.text, e.start, e.end, e.activation) for e in feature.examples),
        head_weights=dict(feature.head_weights),
        surface_form=feature.surface_form,
        explanation_score=feature.explanation_score if feature.HasField("explanation_score") else None,
    )


def pack_to_proto(
    info: PackInfo,
    manifest: Manifest,
    evaluation: Mapping[str, Any],
    *,
    model: ModelInfo,
    policy: PolicyInfo,
    encode_backend: str,
    reader_dtype: str,
) -> pb.GetPackResponse:
    response = pb.GetPackResponse(
        pack=pack_info_to_proto(info),
        description=manifest.description,
        calibrated=manifest.calibrated,
        pack_model=pb.PackModel(**manifest.model.model_dump()),
        hook_points=[pb.HookPoint(**point.model_dump()) for point in manifest.hook_points],
        heads=[
            pb.Head(domain=h.domain, head=_number(h.head), flag_at=h.flag_at, block_at=h.block_at)
            for h in manifest.heads
        ],
        sources=[pb.Source(**source.model_dump()) for source in manifest.sources],
        model=model_to_proto(model),
        policy=policy_to_proto(policy),
        encode_backend=encode_backend,
        reader_dtype=reader_dtype,
    )
    response.evaluation.update(_finite(evaluation))
    return response


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: null takes their place."""
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

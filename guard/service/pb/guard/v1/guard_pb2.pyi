from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_SYSTEM: _ClassVar[Role]
    ROLE_USER: _ClassVar[Role]
    ROLE_ASSISTANT: _ClassVar[Role]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_PROMPT: _ClassVar[Phase]
    PHASE_COMPLETION: _ClassVar[Phase]

class HeadKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HEAD_KIND_UNSPECIFIED: _ClassVar[HeadKind]
    HEAD_KIND_HARM: _ClassVar[HeadKind]
    HEAD_KIND_PRESENCE: _ClassVar[HeadKind]

class Action(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTION_UNSPECIFIED: _ClassVar[Action]
    ACTION_ALLOW: _ClassVar[Action]
    ACTION_FLAG: _ClassVar[Action]
    ACTION_BLOCK: _ClassVar[Action]
    ACTION_NOT_ASSESSED: _ClassVar[Action]

class NotAssessedReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NOT_ASSESSED_REASON_UNSPECIFIED: _ClassVar[NotAssessedReason]
    NOT_ASSESSED_REASON_NON_FINITE: _ClassVar[NotAssessedReason]
    NOT_ASSESSED_REASON_NOTHING_READ: _ClassVar[NotAssessedReason]
    NOT_ASSESSED_REASON_READER_FAILED: _ClassVar[NotAssessedReason]
    NOT_ASSESSED_REASON_BAD_INPUT: _ClassVar[NotAssessedReason]
    NOT_ASSESSED_REASON_NO_ROWS: _ClassVar[NotAssessedReason]
    NOT_ASSESSED_REASON_ROWS_MISSING: _ClassVar[NotAssessedReason]
    NOT_ASSESSED_REASON_TAP_LOST: _ClassVar[NotAssessedReason]
    NOT_ASSESSED_REASON_TOO_FEW_READ: _ClassVar[NotAssessedReason]
ROLE_UNSPECIFIED: Role
ROLE_SYSTEM: Role
ROLE_USER: Role
ROLE_ASSISTANT: Role
PHASE_UNSPECIFIED: Phase
PHASE_PROMPT: Phase
PHASE_COMPLETION: Phase
HEAD_KIND_UNSPECIFIED: HeadKind
HEAD_KIND_HARM: HeadKind
HEAD_KIND_PRESENCE: HeadKind
ACTION_UNSPECIFIED: Action
ACTION_ALLOW: Action
ACTION_FLAG: Action
ACTION_BLOCK: Action
ACTION_NOT_ASSESSED: Action
NOT_ASSESSED_REASON_UNSPECIFIED: NotAssessedReason
NOT_ASSESSED_REASON_NON_FINITE: NotAssessedReason
NOT_ASSESSED_REASON_NOTHING_READ: NotAssessedReason
NOT_ASSESSED_REASON_READER_FAILED: NotAssessedReason
NOT_ASSESSED_REASON_BAD_INPUT: NotAssessedReason
NOT_ASSESSED_REASON_NO_ROWS: NotAssessedReason
NOT_ASSESSED_REASON_ROWS_MISSING: NotAssessedReason
NOT_ASSESSED_REASON_TAP_LOST: NotAssessedReason
NOT_ASSESSED_REASON_TOO_FEW_READ: NotAssessedReason

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: Role
    content: str
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., content: _Optional[str] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class CheckOptions(_message.Message):
    __slots__ = ("domains", "max_attributions", "token_detail")
    DOMAINS_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_DETAIL_FIELD_NUMBER: _ClassVar[int]
    domains: _containers.RepeatedScalarFieldContainer[str]
    max_attributions: int
    token_detail: bool
    def __init__(self, domains: _Optional[_Iterable[str]] = ..., max_attributions: _Optional[int] = ..., token_detail: _Optional[bool] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("request_id", "text", "chat", "completion", "options")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    chat: Chat
    completion: str
    options: CheckOptions
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., completion: _Optional[str] = ..., options: _Optional[_Union[CheckOptions, _Mapping]] = ...) -> None: ...

class CheckResponse(_message.Message):
    __slots__ = ("verdict",)
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    verdict: Verdict
    def __init__(self, verdict: _Optional[_Union[Verdict, _Mapping]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("start", "chunk", "chat")
    class Start(_message.Message):
        __slots__ = ("request_id", "options")
        REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
        OPTIONS_FIELD_NUMBER: _ClassVar[int]
        request_id: str
        options: CheckOptions
        def __init__(self, request_id: _Optional[str] = ..., options: _Optional[_Union[CheckOptions, _Mapping]] = ...) -> None: ...
    class Chunk(_message.Message):
        __slots__ = ("phase", "text", "last")
        PHASE_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        LAST_FIELD_NUMBER: _ClassVar[int]
        phase: Phase
        text: str
        last: bool
        def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., text: _Optional[str] = ..., last: _Optional[bool] = ...) -> None: ...
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    start: WatchRequest.Start
    chunk: WatchRequest.Chunk
    chat: Chat
    def __init__(self, start: _Optional[_Union[WatchRequest.Start, _Mapping]] = ..., chunk: _Optional[_Union[WatchRequest.Chunk, _Mapping]] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("verdict", "sequence")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    verdict: Verdict
    sequence: int
    def __init__(self, verdict: _Optional[_Union[Verdict, _Mapping]] = ..., sequence: _Optional[int] = ...) -> None: ...

class FollowRequest(_message.Message):
    __slots__ = ("request_id", "options", "upcoming")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    UPCOMING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    options: CheckOptions
    upcoming: bool
    def __init__(self, request_id: _Optional[str] = ..., options: _Optional[_Union[CheckOptions, _Mapping]] = ..., upcoming: _Optional[bool] = ...) -> None: ...

class FollowResponse(_message.Message):
    __slots__ = ("verdict", "prompt_read", "completion_read", "finished", "finish_reason")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_READ_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_READ_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    verdict: Verdict
    prompt_read: int
    completion_read: int
    finished: bool
    finish_reason: str
    def __init__(self, verdict: _Optional[_Union[Verdict, _Mapping]] = ..., prompt_read: _Optional[int] = ..., completion_read: _Optional[int] = ..., finished: _Optional[bool] = ..., finish_reason: _Optional[str] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("request_id", "action", "not_assessed", "phases", "pack", "policy", "model", "timings", "audit_id")
    class TimingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    NOT_ASSESSED_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    PACK_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    AUDIT_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    action: Action
    not_assessed: _containers.RepeatedCompositeFieldContainer[NotAssessed]
    phases: _containers.RepeatedCompositeFieldContainer[PhaseVerdict]
    pack: PackInfo
    policy: PolicyInfo
    model: ModelInfo
    timings: _containers.ScalarMap[str, float]
    audit_id: str
    def __init__(self, request_id: _Optional[str] = ..., action: _Optional[_Union[Action, str]] = ..., not_assessed: _Optional[_Iterable[_Union[NotAssessed, _Mapping]]] = ..., phases: _Optional[_Iterable[_Union[PhaseVerdict, _Mapping]]] = ..., pack: _Optional[_Union[PackInfo, _Mapping]] = ..., policy: _Optional[_Union[PolicyInfo, _Mapping]] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., timings: _Optional[_Mapping[str, float]] = ..., audit_id: _Optional[str] = ...) -> None: ...

class NotAssessed(_message.Message):
    __slots__ = ("reason", "detail", "phase")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    reason: NotAssessedReason
    detail: str
    phase: Phase
    def __init__(self, reason: _Optional[_Union[NotAssessedReason, str]] = ..., detail: _Optional[str] = ..., phase: _Optional[_Union[Phase, str]] = ...) -> None: ...

class PhaseVerdict(_message.Message):
    __slots__ = ("phase", "action", "tokens_read", "tokens_total", "domains", "tokens")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_READ_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DOMAINS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    action: Action
    tokens_read: int
    tokens_total: int
    domains: _containers.RepeatedCompositeFieldContainer[DomainVerdict]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenDetail]
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., action: _Optional[_Union[Action, str]] = ..., tokens_read: _Optional[int] = ..., tokens_total: _Optional[int] = ..., domains: _Optional[_Iterable[_Union[DomainVerdict, _Mapping]]] = ..., tokens: _Optional[_Iterable[_Union[TokenDetail, _Mapping]]] = ...) -> None: ...

class DomainVerdict(_message.Message):
    __slots__ = ("domain", "action", "heads")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    domain: str
    action: Action
    heads: _containers.RepeatedCompositeFieldContainer[HeadScore]
    def __init__(self, domain: _Optional[str] = ..., action: _Optional[_Union[Action, str]] = ..., heads: _Optional[_Iterable[_Union[HeadScore, _Mapping]]] = ...) -> None: ...

class HeadScore(_message.Message):
    __slots__ = ("head", "score", "logit", "bias", "rest", "flag_at", "block_at", "explained_share", "attributions", "passage")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    REST_FIELD_NUMBER: _ClassVar[int]
    FLAG_AT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_AT_FIELD_NUMBER: _ClassVar[int]
    EXPLAINED_SHARE_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    PASSAGE_FIELD_NUMBER: _ClassVar[int]
    head: HeadKind
    score: float
    logit: float
    bias: float
    rest: float
    flag_at: float
    block_at: float
    explained_share: float
    attributions: _containers.RepeatedCompositeFieldContainer[Attribution]
    passage: Passage
    def __init__(self, head: _Optional[_Union[HeadKind, str]] = ..., score: _Optional[float] = ..., logit: _Optional[float] = ..., bias: _Optional[float] = ..., rest: _Optional[float] = ..., flag_at: _Optional[float] = ..., block_at: _Optional[float] = ..., explained_share: _Optional[float] = ..., attributions: _Optional[_Iterable[_Union[Attribution, _Mapping]]] = ..., passage: _Optional[_Union[Passage, _Mapping]] = ...) -> None: ...

class Passage(_message.Message):
    __slots__ = ("start", "end", "message", "end_message", "tokens")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    END_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    message: int
    end_message: int
    tokens: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., message: _Optional[int] = ..., end_message: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class Attribution(_message.Message):
    __slots__ = ("latent", "name", "tags", "contribution", "share", "peak_activation", "spans", "explanation_score")
    LATENT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    PEAK_ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_SCORE_FIELD_NUMBER: _ClassVar[int]
    latent: LatentId
    name: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    contribution: float
    share: float
    peak_activation: float
    spans: _containers.RepeatedCompositeFieldContainer[SpanContribution]
    explanation_score: float
    def __init__(self, latent: _Optional[_Union[LatentId, _Mapping]] = ..., name: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., contribution: _Optional[float] = ..., share: _Optional[float] = ..., peak_activation: _Optional[float] = ..., spans: _Optional[_Iterable[_Union[SpanContribution, _Mapping]]] = ..., explanation_score: _Optional[float] = ...) -> None: ...

class SpanContribution(_message.Message):
    __slots__ = ("start", "end", "contribution", "message")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    contribution: float
    message: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., contribution: _Optional[float] = ..., message: _Optional[int] = ...) -> None: ...

class TokenDetail(_message.Message):
    __slots__ = ("start", "end", "message", "contributions")
    class ContributionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    message: int
    contributions: _containers.ScalarMap[str, float]
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., message: _Optional[int] = ..., contributions: _Optional[_Mapping[str, float]] = ...) -> None: ...

class LatentId(_message.Message):
    __slots__ = ("hook_point", "index")
    HOOK_POINT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    hook_point: str
    index: int
    def __init__(self, hook_point: _Optional[str] = ..., index: _Optional[int] = ...) -> None: ...

class PackInfo(_message.Message):
    __slots__ = ("id", "version", "hash")
    ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    id: str
    version: str
    hash: str
    def __init__(self, id: _Optional[str] = ..., version: _Optional[str] = ..., hash: _Optional[str] = ...) -> None: ...

class PolicyInfo(_message.Message):
    __slots__ = ("version", "hash")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    version: str
    hash: str
    def __init__(self, version: _Optional[str] = ..., hash: _Optional[str] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("fingerprint", "verified")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    verified: bool
    def __init__(self, fingerprint: _Optional[str] = ..., verified: _Optional[bool] = ...) -> None: ...

class ListFeaturesRequest(_message.Message):
    __slots__ = ("domain", "subdomain", "hook_point", "page_size", "page_token")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    SUBDOMAIN_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINT_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    domain: str
    subdomain: str
    hook_point: str
    page_size: int
    page_token: str
    def __init__(self, domain: _Optional[str] = ..., subdomain: _Optional[str] = ..., hook_point: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListFeaturesResponse(_message.Message):
    __slots__ = ("features", "next_page_token", "total_size")
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SIZE_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedCompositeFieldContainer[Feature]
    next_page_token: str
    total_size: int
    def __init__(self, features: _Optional[_Iterable[_Union[Feature, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., total_size: _Optional[int] = ...) -> None: ...

class GetFeatureRequest(_message.Message):
    __slots__ = ("latent",)
    LATENT_FIELD_NUMBER: _ClassVar[int]
    latent: LatentId
    def __init__(self, latent: _Optional[_Union[LatentId, _Mapping]] = ...) -> None: ...

class GetFeatureResponse(_message.Message):
    __slots__ = ("feature",)
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    feature: Feature
    def __init__(self, feature: _Optional[_Union[Feature, _Mapping]] = ...) -> None: ...

class Feature(_message.Message):
    __slots__ = ("latent", "name", "explanation", "domains", "subdomains", "firing_rate", "threshold", "scale", "scores", "top_tokens", "examples", "head_weights", "surface_form", "explanation_score")
    class ScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class HeadWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LATENT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    DOMAINS_FIELD_NUMBER: _ClassVar[int]
    SUBDOMAINS_FIELD_NUMBER: _ClassVar[int]
    FIRING_RATE_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    HEAD_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FORM_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_SCORE_FIELD_NUMBER: _ClassVar[int]
    latent: LatentId
    name: str
    explanation: str
    domains: _containers.RepeatedScalarFieldContainer[str]
    subdomains: _containers.RepeatedScalarFieldContainer[str]
    firing_rate: float
    threshold: float
    scale: float
    scores: _containers.ScalarMap[str, float]
    top_tokens: _containers.RepeatedScalarFieldContainer[str]
    examples: _containers.RepeatedCompositeFieldContainer[TokenExample]
    head_weights: _containers.ScalarMap[str, float]
    surface_form: bool
    explanation_score: float
    def __init__(self, latent: _Optional[_Union[LatentId, _Mapping]] = ..., name: _Optional[str] = ..., explanation: _Optional[str] = ..., domains: _Optional[_Iterable[str]] = ..., subdomains: _Optional[_Iterable[str]] = ..., firing_rate: _Optional[float] = ..., threshold: _Optional[float] = ..., scale: _Optional[float] = ..., scores: _Optional[_Mapping[str, float]] = ..., top_tokens: _Optional[_Iterable[str]] = ..., examples: _Optional[_Iterable[_Union[TokenExample, _Mapping]]] = ..., head_weights: _Optional[_Mapping[str, float]] = ..., surface_form: _Optional[bool] = ..., explanation_score: _Optional[float] = ...) -> None: ...

class TokenExample(_message.Message):
    __slots__ = ("text", "start", "end", "activation")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    text: str
    start: int
    end: int
    activation: float
    def __init__(self, text: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., activation: _Optional[float] = ...) -> None: ...

class GetPackRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPackResponse(_message.Message):
    __slots__ = ("pack", "description", "calibrated", "pack_model", "hook_points", "heads", "sources", "evaluation", "model", "policy", "encode_backend", "reader_dtype")
    PACK_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    CALIBRATED_FIELD_NUMBER: _ClassVar[int]
    PACK_MODEL_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINTS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    ENCODE_BACKEND_FIELD_NUMBER: _ClassVar[int]
    READER_DTYPE_FIELD_NUMBER: _ClassVar[int]
    pack: PackInfo
    description: str
    calibrated: bool
    pack_model: PackModel
    hook_points: _containers.RepeatedCompositeFieldContainer[HookPoint]
    heads: _containers.RepeatedCompositeFieldContainer[Head]
    sources: _containers.RepeatedCompositeFieldContainer[Source]
    evaluation: _struct_pb2.Struct
    model: ModelInfo
    policy: PolicyInfo
    encode_backend: str
    reader_dtype: str
    def __init__(self, pack: _Optional[_Union[PackInfo, _Mapping]] = ..., description: _Optional[str] = ..., calibrated: _Optional[bool] = ..., pack_model: _Optional[_Union[PackModel, _Mapping]] = ..., hook_points: _Optional[_Iterable[_Union[HookPoint, _Mapping]]] = ..., heads: _Optional[_Iterable[_Union[Head, _Mapping]]] = ..., sources: _Optional[_Iterable[_Union[Source, _Mapping]]] = ..., evaluation: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., policy: _Optional[_Union[PolicyInfo, _Mapping]] = ..., encode_backend: _Optional[str] = ..., reader_dtype: _Optional[str] = ...) -> None: ...

class PackModel(_message.Message):
    __slots__ = ("name", "weights", "tokenizer", "d_model", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    D_MODEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    weights: str
    tokenizer: str
    d_model: int
    dtype: str
    def __init__(self, name: _Optional[str] = ..., weights: _Optional[str] = ..., tokenizer: _Optional[str] = ..., d_model: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class HookPoint(_message.Message):
    __slots__ = ("name", "latents", "probes", "sae_width", "sae_architecture", "sae_k", "sae_tokens", "fvu", "l0", "dead_share")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    SAE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    SAE_ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    SAE_K_FIELD_NUMBER: _ClassVar[int]
    SAE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FVU_FIELD_NUMBER: _ClassVar[int]
    L0_FIELD_NUMBER: _ClassVar[int]
    DEAD_SHARE_FIELD_NUMBER: _ClassVar[int]
    name: str
    latents: int
    probes: int
    sae_width: int
    sae_architecture: str
    sae_k: float
    sae_tokens: int
    fvu: float
    l0: float
    dead_share: float
    def __init__(self, name: _Optional[str] = ..., latents: _Optional[int] = ..., probes: _Optional[int] = ..., sae_width: _Optional[int] = ..., sae_architecture: _Optional[str] = ..., sae_k: _Optional[float] = ..., sae_tokens: _Optional[int] = ..., fvu: _Optional[float] = ..., l0: _Optional[float] = ..., dead_share: _Optional[float] = ...) -> None: ...

class Head(_message.Message):
    __slots__ = ("domain", "head", "flag_at", "block_at")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    FLAG_AT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_AT_FIELD_NUMBER: _ClassVar[int]
    domain: str
    head: HeadKind
    flag_at: float
    block_at: float
    def __init__(self, domain: _Optional[str] = ..., head: _Optional[_Union[HeadKind, str]] = ..., flag_at: _Optional[float] = ..., block_at: _Optional[float] = ...) -> None: ...

class Source(_message.Message):
    __slots__ = ("name", "licence", "use")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    USE_FIELD_NUMBER: _ClassVar[int]
    name: str
    licence: str
    use: str
    def __init__(self, name: _Optional[str] = ..., licence: _Optional[str] = ..., use: _Optional[str] = ...) -> None: ...

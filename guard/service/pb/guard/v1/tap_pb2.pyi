from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ObserveRequest(_message.Message):
    __slots__ = ("hello", "step")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    step: Step
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ...) -> None: ...

class ObserveResponse(_message.Message):
    __slots__ = ("welcome", "stop")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    stop: Stop
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("engine", "engine_version", "pack_hash", "model", "hook_points", "dtype")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PACK_HASH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    engine: str
    engine_version: str
    pack_hash: str
    model: str
    hook_points: _containers.RepeatedScalarFieldContainer[str]
    dtype: str
    def __init__(self, engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., pack_hash: _Optional[str] = ..., model: _Optional[str] = ..., hook_points: _Optional[_Iterable[str]] = ..., dtype: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("accepted", "message")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    message: str
    def __init__(self, accepted: _Optional[bool] = ..., message: _Optional[str] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("rows", "missed", "ended", "dropped")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[Rows]
    missed: _containers.RepeatedCompositeFieldContainer[Missed]
    ended: _containers.RepeatedCompositeFieldContainer[Ended]
    dropped: int
    def __init__(self, rows: _Optional[_Iterable[_Union[Rows, _Mapping]]] = ..., missed: _Optional[_Iterable[_Union[Missed, _Mapping]]] = ..., ended: _Optional[_Iterable[_Union[Ended, _Mapping]]] = ..., dropped: _Optional[int] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("request_id", "begin", "prompt_tokens", "token_ids", "token", "row", "value", "probe", "finite")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    FINITE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    begin: int
    prompt_tokens: int
    token_ids: bytes
    token: bytes
    row: bytes
    value: bytes
    probe: bytes
    finite: bool
    def __init__(self, request_id: _Optional[str] = ..., begin: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., token: _Optional[bytes] = ..., row: _Optional[bytes] = ..., value: _Optional[bytes] = ..., probe: _Optional[bytes] = ..., finite: _Optional[bool] = ...) -> None: ...

class Missed(_message.Message):
    __slots__ = ("request_id", "detail")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    detail: str
    def __init__(self, request_id: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("request_id", "reason", "tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reason: str
    tokens: int
    def __init__(self, request_id: _Optional[str] = ..., reason: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

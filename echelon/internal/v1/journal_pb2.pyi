from echelon.internal.v1 import link_pb2 as _link_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JournalRecord(_message.Message):
    __slots__ = ("term", "opened", "assigned", "tokens", "finished", "forgotten", "prompted", "clock_origin")
    TERM_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    PROMPTED_FIELD_NUMBER: _ClassVar[int]
    CLOCK_ORIGIN_FIELD_NUMBER: _ClassVar[int]
    term: int
    opened: Opened
    assigned: Assigned
    tokens: Tokens
    finished: Finished
    forgotten: Forgotten
    prompted: _link_pb2.Prompted
    clock_origin: ClockOrigin
    def __init__(self, term: _Optional[int] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., assigned: _Optional[_Union[Assigned, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., forgotten: _Optional[_Union[Forgotten, _Mapping]] = ..., prompted: _Optional[_Union[_link_pb2.Prompted, _Mapping]] = ..., clock_origin: _Optional[_Union[ClockOrigin, _Mapping]] = ...) -> None: ...

class ClockOrigin(_message.Message):
    __slots__ = ("boot_id", "unix_s")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    boot_id: str
    unix_s: float
    def __init__(self, boot_id: _Optional[str] = ..., unix_s: _Optional[float] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("request", "digest", "model", "prompt", "sampling", "deadline_unix_s", "opened_unix_s", "received", "priority", "cache_salt")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    OPENED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    request: str
    digest: bytes
    model: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    sampling: _link_pb2.Sampling
    deadline_unix_s: float
    opened_unix_s: float
    received: _containers.RepeatedCompositeFieldContainer[_link_pb2.Ids]
    priority: int
    cache_salt: str
    def __init__(self, request: _Optional[str] = ..., digest: _Optional[bytes] = ..., model: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_link_pb2.Sampling, _Mapping]] = ..., deadline_unix_s: _Optional[float] = ..., opened_unix_s: _Optional[float] = ..., received: _Optional[_Iterable[_Union[_link_pb2.Ids, _Mapping]]] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class Assigned(_message.Message):
    __slots__ = ("request", "attempt", "replica", "epoch", "recomputed_tokens")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request: str
    attempt: int
    replica: int
    epoch: int
    recomputed_tokens: int
    def __init__(self, request: _Optional[str] = ..., attempt: _Optional[int] = ..., replica: _Optional[int] = ..., epoch: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("request", "choice", "attempt", "first_token", "ids", "logprobs")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request: str
    choice: int
    attempt: int
    first_token: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_link_pb2.Logprob]
    def __init__(self, request: _Optional[str] = ..., choice: _Optional[int] = ..., attempt: _Optional[int] = ..., first_token: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_link_pb2.Logprob, _Mapping]]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("request", "finishes", "error_reason", "error_message", "finished_unix_s")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    FINISHES_FIELD_NUMBER: _ClassVar[int]
    ERROR_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    request: str
    finishes: _containers.RepeatedScalarFieldContainer[_link_pb2.Finish]
    error_reason: str
    error_message: str
    finished_unix_s: float
    def __init__(self, request: _Optional[str] = ..., finishes: _Optional[_Iterable[_Union[_link_pb2.Finish, str]]] = ..., error_reason: _Optional[str] = ..., error_message: _Optional[str] = ..., finished_unix_s: _Optional[float] = ...) -> None: ...

class Forgotten(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: str
    def __init__(self, request: _Optional[str] = ...) -> None: ...

from echelon.internal.v1 import control_pb2 as _control_pb2
from echelon.internal.v1 import link_pb2 as _link_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepPlan(_message.Message):
    __slots__ = ("fence", "step", "admits", "blocks", "rows", "token_ids", "rules", "told", "told_ids", "after", "lanes", "rebalances", "captures", "scored")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ADMITS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    TOLD_FIELD_NUMBER: _ClassVar[int]
    TOLD_IDS_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    REBALANCES_FIELD_NUMBER: _ClassVar[int]
    CAPTURES_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    fence: _control_pb2.Fence
    step: int
    admits: bytes
    blocks: bytes
    rows: bytes
    token_ids: bytes
    rules: _containers.RepeatedCompositeFieldContainer[Rules]
    told: bytes
    told_ids: bytes
    after: int
    lanes: _containers.RepeatedCompositeFieldContainer[Lane]
    rebalances: bool
    captures: int
    scored: bytes
    def __init__(self, fence: _Optional[_Union[_control_pb2.Fence, _Mapping]] = ..., step: _Optional[int] = ..., admits: _Optional[bytes] = ..., blocks: _Optional[bytes] = ..., rows: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., rules: _Optional[_Iterable[_Union[Rules, _Mapping]]] = ..., told: _Optional[bytes] = ..., told_ids: _Optional[bytes] = ..., after: _Optional[int] = ..., lanes: _Optional[_Iterable[_Union[Lane, _Mapping]]] = ..., rebalances: bool = ..., captures: _Optional[int] = ..., scored: _Optional[bytes] = ...) -> None: ...

class Lane(_message.Message):
    __slots__ = ("tokens", "decodes", "wanted", "scores", "alternatives")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODES_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    decodes: bool
    wanted: _containers.RepeatedScalarFieldContainer[int]
    scores: _containers.RepeatedScalarFieldContainer[int]
    alternatives: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[int] = ..., decodes: bool = ..., wanted: _Optional[_Iterable[int]] = ..., scores: _Optional[_Iterable[int]] = ..., alternatives: _Optional[_Iterable[int]] = ...) -> None: ...

class Rules(_message.Message):
    __slots__ = ("slot", "stop_ids", "biased_ids", "biases", "bad_words", "grammar")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    BIASED_IDS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    slot: int
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    biased_ids: _containers.RepeatedScalarFieldContainer[int]
    biases: _containers.RepeatedScalarFieldContainer[float]
    bad_words: _containers.RepeatedCompositeFieldContainer[_link_pb2.Ids]
    grammar: str
    def __init__(self, slot: _Optional[int] = ..., stop_ids: _Optional[_Iterable[int]] = ..., biased_ids: _Optional[_Iterable[int]] = ..., biases: _Optional[_Iterable[float]] = ..., bad_words: _Optional[_Iterable[_Union[_link_pb2.Ids, _Mapping]]] = ..., grammar: _Optional[str] = ...) -> None: ...

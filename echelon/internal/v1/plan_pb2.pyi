from echelon.internal.v1 import control_pb2 as _control_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepPlan(_message.Message):
    __slots__ = ("fence", "step", "admits", "blocks", "rows", "token_ids")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ADMITS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    fence: _control_pb2.Fence
    step: int
    admits: bytes
    blocks: bytes
    rows: bytes
    token_ids: bytes
    def __init__(self, fence: _Optional[_Union[_control_pb2.Fence, _Mapping]] = ..., step: _Optional[int] = ..., admits: _Optional[bytes] = ..., blocks: _Optional[bytes] = ..., rows: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ...) -> None: ...

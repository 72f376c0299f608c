from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Model(_message.Message):
    __slots__ = ("name", "source", "state", "dtype", "max_context", "architecture")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Model.State]
        STATE_LOADING: _ClassVar[Model.State]
        STATE_ACTIVE: _ClassVar[Model.State]
    STATE_UNSPECIFIED: Model.State
    STATE_LOADING: Model.State
    STATE_ACTIVE: Model.State
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    state: Model.State
    dtype: str
    max_context: int
    architecture: str
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., state: _Optional[_Union[Model.State, str]] = ..., dtype: _Optional[str] = ..., max_context: _Optional[int] = ..., architecture: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Cluster(_message.Message):
    __slots__ = ("version", "nodes", "models", "term", "queued", "running", "replicas", "coordinator_pid", "parked", "spares", "journal", "spare_devices")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_PID_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    SPARES_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_FIELD_NUMBER: _ClassVar[int]
    SPARE_DEVICES_FIELD_NUMBER: _ClassVar[int]
    version: str
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    term: int
    queued: int
    running: int
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    coordinator_pid: int
    parked: int
    spares: _containers.RepeatedCompositeFieldContainer[Spare]
    journal: str
    spare_devices: _containers.RepeatedCompositeFieldContainer[SpareDevice]
    def __init__(self, version: _Optional[str] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., term: _Optional[int] = ..., queued: _Optional[int] = ..., running: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., coordinator_pid: _Optional[int] = ..., parked: _Optional[int] = ..., spares: _Optional[_Iterable[_Union[Spare, _Mapping]]] = ..., journal: _Optional[str] = ..., spare_devices: _Optional[_Iterable[_Union[SpareDevice, _Mapping]]] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("index", "epoch", "state", "kv_blocks_total", "kv_blocks_referenced", "kv_blocks_cached", "step", "counters", "reason")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    INDEX_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_REFERENCED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    index: int
    epoch: int
    state: str
    kv_blocks_total: int
    kv_blocks_referenced: int
    kv_blocks_cached: int
    step: int
    counters: _containers.ScalarMap[str, int]
    reason: str
    def __init__(self, index: _Optional[int] = ..., epoch: _Optional[int] = ..., state: _Optional[str] = ..., kv_blocks_total: _Optional[int] = ..., kv_blocks_referenced: _Optional[int] = ..., kv_blocks_cached: _Optional[int] = ..., step: _Optional[int] = ..., counters: _Optional[_Mapping[str, int]] = ..., reason: _Optional[str] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("id", "address", "ranks")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    ranks: _containers.RepeatedCompositeFieldContainer[Rank]
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[Rank, _Mapping]]] = ...) -> None: ...

class Rank(_message.Message):
    __slots__ = ("replica", "pipeline", "data", "tensor", "expert", "leader", "pid", "node_id", "epoch", "state", "device", "parameter_bytes", "kv_bytes", "planned_parameter_bytes", "planned_kv_bytes")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    LEADER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    PLANNED_PARAMETER_BYTES_FIELD_NUMBER: _ClassVar[int]
    PLANNED_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    replica: int
    pipeline: int
    data: int
    tensor: int
    expert: int
    leader: bool
    pid: int
    node_id: str
    epoch: int
    state: str
    device: str
    parameter_bytes: int
    kv_bytes: int
    planned_parameter_bytes: int
    planned_kv_bytes: int
    def __init__(self, replica: _Optional[int] = ..., pipeline: _Optional[int] = ..., data: _Optional[int] = ..., tensor: _Optional[int] = ..., expert: _Optional[int] = ..., leader: bool = ..., pid: _Optional[int] = ..., node_id: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[str] = ..., device: _Optional[str] = ..., parameter_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., planned_parameter_bytes: _Optional[int] = ..., planned_kv_bytes: _Optional[int] = ...) -> None: ...

class Spare(_message.Message):
    __slots__ = ("replica", "rank", "pid", "node_id", "state", "on_spare_device")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ON_SPARE_DEVICE_FIELD_NUMBER: _ClassVar[int]
    replica: int
    rank: int
    pid: int
    node_id: str
    state: str
    on_spare_device: bool
    def __init__(self, replica: _Optional[int] = ..., rank: _Optional[int] = ..., pid: _Optional[int] = ..., node_id: _Optional[str] = ..., state: _Optional[str] = ..., on_spare_device: bool = ...) -> None: ...

class SpareDevice(_message.Message):
    __slots__ = ("slot", "node_id", "state", "rank")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    slot: str
    node_id: str
    state: str
    rank: str
    def __init__(self, slot: _Optional[str] = ..., node_id: _Optional[str] = ..., state: _Optional[str] = ..., rank: _Optional[str] = ...) -> None: ...

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetExpertLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetExpertLoadResponse(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerExpertLoad]
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerExpertLoad, _Mapping]]] = ...) -> None: ...

class LayerExpertLoad(_message.Message):
    __slots__ = ("layer", "tokens_per_expert", "physical_to_logical", "max_over_mean", "replica", "epoch", "slots_per_rank")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_EXPERT_FIELD_NUMBER: _ClassVar[int]
    PHYSICAL_TO_LOGICAL_FIELD_NUMBER: _ClassVar[int]
    MAX_OVER_MEAN_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SLOTS_PER_RANK_FIELD_NUMBER: _ClassVar[int]
    layer: int
    tokens_per_expert: _containers.RepeatedScalarFieldContainer[int]
    physical_to_logical: _containers.RepeatedScalarFieldContainer[int]
    max_over_mean: float
    replica: int
    epoch: int
    slots_per_rank: int
    def __init__(self, layer: _Optional[int] = ..., tokens_per_expert: _Optional[_Iterable[int]] = ..., physical_to_logical: _Optional[_Iterable[int]] = ..., max_over_mean: _Optional[float] = ..., replica: _Optional[int] = ..., epoch: _Optional[int] = ..., slots_per_rank: _Optional[int] = ...) -> None: ...

class WatchClusterEventsRequest(_message.Message):
    __slots__ = ("after_sequence", "follow")
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    after_sequence: int
    follow: bool
    def __init__(self, after_sequence: _Optional[int] = ..., follow: bool = ...) -> None: ...

class WatchClusterEventsResponse(_message.Message):
    __slots__ = ("sequence", "time", "kind", "subject", "detail")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    time: _timestamp_pb2.Timestamp
    kind: str
    subject: str
    detail: _struct_pb2.Struct
    def __init__(self, sequence: _Optional[int] = ..., time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., kind: _Optional[str] = ..., subject: _Optional[str] = ..., detail: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Fence(_message.Message):
    __slots__ = ("term", "replica", "epoch")
    TERM_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    term: int
    replica: int
    epoch: int
    def __init__(self, term: _Optional[int] = ..., replica: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class RankMessage(_message.Message):
    __slots__ = ("fence", "hello", "heartbeat", "store_opened", "progress", "ready", "fault", "retired", "loaded", "written", "blamed", "formed", "expert_loads", "graphs")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    STORE_OPENED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    RETIRED_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    BLAMED_FIELD_NUMBER: _ClassVar[int]
    FORMED_FIELD_NUMBER: _ClassVar[int]
    EXPERT_LOADS_FIELD_NUMBER: _ClassVar[int]
    GRAPHS_FIELD_NUMBER: _ClassVar[int]
    fence: Fence
    hello: RankHello
    heartbeat: Heartbeat
    store_opened: StoreOpened
    progress: LoadProgress
    ready: RankReady
    fault: RankFault
    retired: RankRetired
    loaded: WeightsLoaded
    written: ShardWritten
    blamed: RankBlamed
    formed: EpochFormed
    expert_loads: ExpertLoads
    graphs: GraphsCaptured
    def __init__(self, fence: _Optional[_Union[Fence, _Mapping]] = ..., hello: _Optional[_Union[RankHello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., store_opened: _Optional[_Union[StoreOpened, _Mapping]] = ..., progress: _Optional[_Union[LoadProgress, _Mapping]] = ..., ready: _Optional[_Union[RankReady, _Mapping]] = ..., fault: _Optional[_Union[RankFault, _Mapping]] = ..., retired: _Optional[_Union[RankRetired, _Mapping]] = ..., loaded: _Optional[_Union[WeightsLoaded, _Mapping]] = ..., written: _Optional[_Union[ShardWritten, _Mapping]] = ..., blamed: _Optional[_Union[RankBlamed, _Mapping]] = ..., formed: _Optional[_Union[EpochFormed, _Mapping]] = ..., expert_loads: _Optional[_Union[ExpertLoads, _Mapping]] = ..., graphs: _Optional[_Union[GraphsCaptured, _Mapping]] = ...) -> None: ...

class RankHello(_message.Message):
    __slots__ = ("protocol_version", "rank", "incarnation", "pid", "node_id", "phase", "device", "memory_bytes", "ready", "layout")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    rank: int
    incarnation: str
    pid: int
    node_id: str
    phase: str
    device: str
    memory_bytes: int
    ready: RankReady
    layout: str
    def __init__(self, protocol_version: _Optional[int] = ..., rank: _Optional[int] = ..., incarnation: _Optional[str] = ..., pid: _Optional[int] = ..., node_id: _Optional[str] = ..., phase: _Optional[str] = ..., device: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., ready: _Optional[_Union[RankReady, _Mapping]] = ..., layout: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("phase", "step", "kind", "slowest_s")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SLOWEST_S_FIELD_NUMBER: _ClassVar[int]
    phase: str
    step: int
    kind: str
    slowest_s: float
    def __init__(self, phase: _Optional[str] = ..., step: _Optional[int] = ..., kind: _Optional[str] = ..., slowest_s: _Optional[float] = ...) -> None: ...

class StoreOpened(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class LoadProgress(_message.Message):
    __slots__ = ("loaded_bytes", "total_bytes")
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    loaded_bytes: int
    total_bytes: int
    def __init__(self, loaded_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class RankReady(_message.Message):
    __slots__ = ("parameter_bytes", "kv_bytes", "settled")
    PARAMETER_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    parameter_bytes: int
    kv_bytes: int
    settled: Settled
    def __init__(self, parameter_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., settled: _Optional[_Union[Settled, _Mapping]] = ...) -> None: ...

class Settled(_message.Message):
    __slots__ = ("reserved_blocks", "graphs")
    RESERVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    GRAPHS_FIELD_NUMBER: _ClassVar[int]
    reserved_blocks: int
    graphs: bool
    def __init__(self, reserved_blocks: _Optional[int] = ..., graphs: bool = ...) -> None: ...

class WeightsLoaded(_message.Message):
    __slots__ = ("origin", "bytes", "took_s", "reason", "left")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    origin: str
    bytes: int
    took_s: float
    reason: str
    left: str
    def __init__(self, origin: _Optional[str] = ..., bytes: _Optional[int] = ..., took_s: _Optional[float] = ..., reason: _Optional[str] = ..., left: _Optional[str] = ...) -> None: ...

class EpochFormed(_message.Message):
    __slots__ = ("took_s",)
    class TookSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    took_s: _containers.ScalarMap[str, float]
    def __init__(self, took_s: _Optional[_Mapping[str, float]] = ...) -> None: ...

class GraphsCaptured(_message.Message):
    __slots__ = ("count", "took_s", "reason")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    count: int
    took_s: float
    reason: str
    def __init__(self, count: _Optional[int] = ..., took_s: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class ExpertLoads(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ...) -> None: ...

class LayerLoad(_message.Message):
    __slots__ = ("layer", "rows", "slots", "slots_per_rank")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_PER_RANK_FIELD_NUMBER: _ClassVar[int]
    layer: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    slots_per_rank: int
    def __init__(self, layer: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., slots: _Optional[_Iterable[int]] = ..., slots_per_rank: _Optional[int] = ...) -> None: ...

class ShardWritten(_message.Message):
    __slots__ = ("bytes", "took_s", "reason")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    took_s: float
    reason: str
    def __init__(self, bytes: _Optional[int] = ..., took_s: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class RankFault(_message.Message):
    __slots__ = ("phase", "error", "first_step", "last_step", "of_peer", "requests")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    OF_PEER_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    phase: str
    error: str
    first_step: int
    last_step: int
    of_peer: bool
    requests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, phase: _Optional[str] = ..., error: _Optional[str] = ..., first_step: _Optional[int] = ..., last_step: _Optional[int] = ..., of_peer: bool = ..., requests: _Optional[_Iterable[str]] = ...) -> None: ...

class RankBlamed(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, requests: _Optional[_Iterable[str]] = ...) -> None: ...

class RankRetired(_message.Message):
    __slots__ = ("memory_bytes",)
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    memory_bytes: int
    def __init__(self, memory_bytes: _Optional[int] = ...) -> None: ...

class RankCommand(_message.Message):
    __slots__ = ("fence", "accepted", "open_store", "form", "refused", "retire", "blame")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    OPEN_STORE_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    RETIRE_FIELD_NUMBER: _ClassVar[int]
    BLAME_FIELD_NUMBER: _ClassVar[int]
    fence: Fence
    accepted: Accepted
    open_store: OpenStore
    form: FormEpoch
    refused: Refused
    retire: Retire
    blame: Blame
    def __init__(self, fence: _Optional[_Union[Fence, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., open_store: _Optional[_Union[OpenStore, _Mapping]] = ..., form: _Optional[_Union[FormEpoch, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., retire: _Optional[_Union[Retire, _Mapping]] = ..., blame: _Optional[_Union[Blame, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenStore(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Retire(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Blame(_message.Message):
    __slots__ = ("first_step", "last_step")
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    first_step: int
    last_step: int
    def __init__(self, first_step: _Optional[int] = ..., last_step: _Optional[int] = ...) -> None: ...

class FormEpoch(_message.Message):
    __slots__ = ("store_address", "model_path", "dtype", "tensor", "kv_blocks", "block_tokens", "max_running", "max_step_tokens", "max_context", "kv_blocks_limit", "pipeline", "data", "expert", "pipeline_depth", "rebalance_steps", "speculation_tokens", "redundant_experts", "cuda_graphs", "predicts", "keep_float8", "trace_dir", "checkpoint_dir", "model_digest", "settled", "random_weights", "layout")
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_LIMIT_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    REBALANCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REDUNDANT_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    CUDA_GRAPHS_FIELD_NUMBER: _ClassVar[int]
    PREDICTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FLOAT8_FIELD_NUMBER: _ClassVar[int]
    TRACE_DIR_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIR_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    RANDOM_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    store_address: str
    model_path: str
    dtype: str
    tensor: int
    kv_blocks: int
    block_tokens: int
    max_running: int
    max_step_tokens: int
    max_context: int
    kv_blocks_limit: int
    pipeline: int
    data: int
    expert: int
    pipeline_depth: int
    rebalance_steps: int
    speculation_tokens: int
    redundant_experts: int
    cuda_graphs: bool
    predicts: bool
    keep_float8: bool
    trace_dir: str
    checkpoint_dir: str
    model_digest: str
    settled: Settled
    random_weights: bool
    layout: str
    def __init__(self, store_address: _Optional[str] = ..., model_path: _Optional[str] = ..., dtype: _Optional[str] = ..., tensor: _Optional[int] = ..., kv_blocks: _Optional[int] = ..., block_tokens: _Optional[int] = ..., max_running: _Optional[int] = ..., max_step_tokens: _Optional[int] = ..., max_context: _Optional[int] = ..., kv_blocks_limit: _Optional[int] = ..., pipeline: _Optional[int] = ..., data: _Optional[int] = ..., expert: _Optional[int] = ..., pipeline_depth: _Optional[int] = ..., rebalance_steps: _Optional[int] = ..., speculation_tokens: _Optional[int] = ..., redundant_experts: _Optional[int] = ..., cuda_graphs: bool = ..., predicts: bool = ..., keep_float8: bool = ..., trace_dir: _Optional[str] = ..., checkpoint_dir: _Optional[str] = ..., model_digest: _Optional[str] = ..., settled: _Optional[_Union[Settled, _Mapping]] = ..., random_weights: bool = ..., layout: _Optional[str] = ...) -> None: ...

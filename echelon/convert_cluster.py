"""The cluster's nouns of `types.py` as protobuf messages, both directions; `convert.py` has the rest.

Used by the SDK and by the coordinator's server. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf import json_format

from echelon.convert import timestamp_from_proto, timestamp_to_proto
from echelon.types import Cluster, ClusterEvent, ExpertLoad, Model, Rank, Replica, Spare, SpareDevice
from echelon.v1 import cluster_pb2

_RANK_FIELDS = tuple(field.name for field in cluster_pb2.Rank.DESCRIPTOR.fields)
_REPLICA_FIELDS = tuple(field.name for field in cluster_pb2.Replica.DESCRIPTOR.fields)
_SPARE_FIELDS = tuple(field.name for field in cluster_pb2.Spare.DESCRIPTOR.fields)
_DEVICE_FIELDS = tuple(field.name for field in cluster_pb2.SpareDevice.DESCRIPTOR.fields)
_CLUSTER_FIELDS = ("version", "term", "coordinator_pid", "queued", "running", "parked", "journal")
_MODEL_FIELDS = ("name", "source", "dtype", "architecture", "max_context")


def rank_to_proto(rank: Rank) -> cluster_pb2.Rank:
    return cluster_pb2.Rank(**{name: getattr(rank, name) for name in _RANK_FIELDS})


def rank_from_proto(message: cluster_pb2.Rank) -> Rank:
    return Rank(**{name: getattr(message, name) for name in _RANK_FIELDS})


def spare_to_proto(spare: Spare) -> cluster_pb2.Spare:
    return cluster_pb2.Spare(**{name: getattr(spare, name) for name in _SPARE_FIELDS})


def spare_from_proto(message: cluster_pb2.Spare) -> Spare:
    return Spare(**{name: getattr(message, name) for name in _SPARE_FIELDS})


def device_to_proto(device: SpareDevice) -> cluster_pb2.SpareDevice:
    return cluster_pb2.SpareDevice(**{name: getattr(device, name) for name in _DEVICE_FIELDS})


def device_from_proto(message: cluster_pb2.SpareDevice) -> SpareDevice:
    return SpareDevice(**{name: getattr(message, name) for name in _DEVICE_FIELDS})


def replica_to_proto(replica: Replica) -> cluster_pb2.Replica:
    return cluster_pb2.Replica(**{name: getattr(replica, name) for name in _REPLICA_FIELDS})


def replica_from_proto(message: cluster_pb2.Replica) -> Replica:
    fields = {name: getattr(message, name) for name in _REPLICA_FIELDS}
    return Replica(**fields | {"counters": dict(message.counters)})


def model_to_proto(model: Model) -> cluster_pb2.Model:
    """state is one of the proto's, in lower case: loading or active."""
    return cluster_pb2.Model(
        state=f"STATE_{model.state.upper()}", **{name: getattr(model, name) for name in _MODEL_FIELDS}
    )


def model_from_proto(message: cluster_pb2.Model) -> Model:
    state = cluster_pb2.Model.State.Name(message.state).removeprefix("STATE_").lower()
    return Model(state=state, **{name: getattr(message, name) for name in _MODEL_FIELDS})


def cluster_to_proto(cluster: Cluster) -> cluster_pb2.Cluster:
    nodes = {rank.node_id: cluster_pb2.Node(id=rank.node_id) for rank in cluster.ranks}
    for rank in cluster.ranks:
        nodes[rank.node_id].ranks.append(rank_to_proto(rank))
    return cluster_pb2.Cluster(
        **{name: getattr(cluster, name) for name in _CLUSTER_FIELDS},
        nodes=nodes.values(),
        models=[model_to_proto(model) for model in cluster.models],
        replicas=[replica_to_proto(replica) for replica in cluster.replicas],
        spares=[spare_to_proto(spare) for spare in cluster.spares],
        spare_devices=[device_to_proto(device) for device in cluster.spare_devices],
    )


def cluster_from_proto(message: cluster_pb2.Cluster) -> Cluster:
    """Ranks in the order of the mesh, whichever node they are on."""
    ranks = [rank_from_proto(rank) for node in message.nodes for rank in node.ranks]
    return Cluster(
        **{name: getattr(message, name) for name in _CLUSTER_FIELDS},
        models=tuple(model_from_proto(model) for model in message.models),
        replicas=tuple(replica_from_proto(replica) for replica in message.replicas),
        spares=tuple(spare_from_proto(spare) for spare in message.spares),
        spare_devices=tuple(device_from_proto(device) for device in message.spare_devices),
        ranks=tuple(sorted(ranks, key=lambda rank: (rank.replica, rank.pipeline, rank.data, rank.tensor))),
    )


def expert_load_to_proto(load: ExpertLoad) -> cluster_pb2.LayerExpertLoad:
    return cluster_pb2.LayerExpertLoad(
        replica=load.replica,
        epoch=load.epoch,
        layer=load.layer,
        tokens_per_expert=load.rows,
        physical_to_logical=[expert for rank in load.slots for expert in rank],
        slots_per_rank=len(load.slots[0]) if load.slots else 0,
        max_over_mean=load.max_over_mean,
    )


def expert_load_from_proto(message: cluster_pb2.LayerExpertLoad) -> ExpertLoad:
    return ExpertLoad(
        replica=message.replica,
        epoch=message.epoch,
        layer=message.layer,
        rows=tuple(message.tokens_per_expert),
        slots=slots_by_rank(message.physical_to_logical, message.slots_per_rank),
    )


def slots_by_rank(experts: Sequence[int], per_rank: int) -> tuple[tuple[int, ...], ...]:
    """The experts of each rank, from those of all slots one behind the other."""
    return tuple(tuple(experts[first : first + per_rank]) for first in range(0, len(experts), per_rank or 1))


def event_to_proto(event: ClusterEvent) -> cluster_pb2.WatchClusterEventsResponse:
    message = cluster_pb2.WatchClusterEventsResponse(
        sequence=event.sequence, time=timestamp_to_proto(event.unix_s), kind=event.kind, subject=event.subject
    )
    json_format.ParseDict(dict(event.detail), message.detail)
    return message


def event_from_proto(message: cluster_pb2.WatchClusterEventsResponse) -> ClusterEvent:
    detail = {name: _whole(value) for name, value in json_format.MessageToDict(message.detail).items()}
    unix_s = timestamp_from_proto(message.time)
    return ClusterEvent(message.sequence, unix_s, message.kind, message.subject, detail)


def _whole(value: object) -> object:
    """Numbers of a Struct travel as doubles; a pid or an epoch should come back as the integer it was."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [_whole(item) for item in value]
        case dict():
            return {name: _whole(item) for name, item in value.items()}
    return value

"""Degrees: how many ranks share what, and the place of each rank in that product.

The mesh is an arange reshaped: ranks of a replica are numbered stage by stage, in a stage data rank by data rank, and
tensor ranks are neighbours. Pure and torch-free, in the coordinator, in ranks and in tests; it knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

from echelon.errors import ConfigError

NAMES = ("replicas", "pipeline", "data", "tensor", "expert")


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """replicas * pipeline * data * tensor ranks.

    Each replica cuts the layers into `pipeline` stages. The data * tensor ranks of a stage hold its experts: `expert`
    groups of neighbours have different ones, and the ranks of a group split each of theirs. Attention runs on `data`
    groups with requests of their own, `tensor` ranks in each split every matrix. redundant_experts: slots of a layer
    for copies of experts, beyond one for each expert; an equal part of them in each group. Raises ConfigError.
    """

    replicas: int = 1
    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    expert: int = 1
    redundant_experts: int = 0

    def __post_init__(self) -> None:
        for name in NAMES:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not a number of ranks; it is 1 or more", field=name)
        if self.stage_ranks % self.expert:
            raise ConfigError(
                f"expert={self.expert} does not divide data {self.data} * tensor {self.tensor} = {self.stage_ranks} "
                f"ranks of a stage; expert may be {', '.join(map(str, divisors(self.stage_ranks)))}",
                field="expert",
            )
        if self.redundant_experts % self.expert:
            raise ConfigError(
                f"redundant-experts={self.redundant_experts} is no equal part for each of expert={self.expert} groups "
                f"of ranks; it may be any multiple of {self.expert}",
                field="redundant_experts",
            )

    def __str__(self) -> str:
        """The whole product, as errors show it."""
        product = f"replicas {self.replicas} * pipeline {self.pipeline} * data {self.data} * tensor {self.tensor}"
        return f"{product} = {self.ranks} ranks"

    @property
    def stage_ranks(self) -> int:
        """Ranks that compute one stage of a replica."""
        return self.data * self.tensor

    @property
    def replica_ranks(self) -> int:
        return self.pipeline * self.stage_ranks

    @property
    def ranks(self) -> int:
        return self.replicas * self.replica_ranks

    @property
    def expert_tensor(self) -> int:
        """Ranks that split each expert."""
        return self.stage_ranks // self.expert

    @property
    def exchanges_rows(self) -> bool:
        """Whether rows travel to the ranks that hold their experts, and each rank minds rows of its own meanwhile."""
        return self.expert > 1 or self.data > 1

    def place(self, rank: int) -> Place:
        """Where a rank of a replica stands."""
        assert 0 <= rank < self.replica_ranks, f"rank {rank} of {self}"
        stage, stage_rank = divmod(rank, self.stage_ranks)
        return Place(self, stage, *divmod(stage_rank, self.tensor))


@dataclass(frozen=True, slots=True)
class Place:
    """One rank of a replica, by its coordinates."""

    degrees: Degrees
    pipeline_rank: int
    data_rank: int
    tensor_rank: int

    @property
    def rank(self) -> int:
        """Its number within the replica."""
        return self.pipeline_rank * self.degrees.stage_ranks + self.stage_rank

    @property
    def stage_rank(self) -> int:
        """Its number within the stage."""
        return self.data_rank * self.degrees.tensor + self.tensor_rank

    @property
    def expert_rank(self) -> int:
        """Which of the stage's experts it holds."""
        return self.stage_rank // self.degrees.expert_tensor

    @property
    def expert_tensor_rank(self) -> int:
        """Which part of each of them."""
        return self.stage_rank % self.degrees.expert_tensor

    @property
    def first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline_rank == self.degrees.pipeline - 1

    def on_stage(self, pipeline_rank: int) -> Place:
        """The rank of another stage that it exchanges activations with."""
        return Place(self.degrees, pipeline_rank, self.data_rank, self.tensor_rank)


def divisors(number: int) -> list[int]:
    """Of a number of ranks, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]

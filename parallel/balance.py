"""The expert balancer: loads of a layer's experts -> which expert lies in each physical slot of each rank.

Pure and torch-free, in the coordinator and in tests. Greedy replicate-and-pack as DeepSeek's EPLB does it (DeepSeek-V3,
3.4; github.com/deepseek-ai/EPLB), then swaps; from a placement that is in use it starts there and moves few experts.
It knows no weights, no process group and no dispatch: replicas of an expert are taken to share its load equally.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from parallel.degrees import Degrees
from parallel.packing import Bins, heaviest, pack, recounted, renumbered, replicate, swapped

TOLERANCE = 0.02  # of the heaviest rank's load: what fewer moves may cost


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """experts over ranks * slots_per_rank physical slots; slots beyond the experts hold replicas.

    groups: runs of experts that a router picks together (group-limited routing), kept on one node each. nodes: runs of
    ranks with fast links. One group or one node: ranks are filled without regard to nodes.
    """

    experts: int
    ranks: int
    slots_per_rank: int
    groups: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        slots = self.ranks * self.slots_per_rank
        assert self.experts <= slots, f"{self.experts} experts in {self.ranks} * {self.slots_per_rank} = {slots} slots"
        assert self.ranks % self.nodes == 0, f"{self.ranks} ranks over {self.nodes} nodes"
        assert self.groups % self.nodes == 0, f"{self.groups} groups over {self.nodes} nodes"
        assert self.experts % self.groups == 0, f"{self.experts} experts in {self.groups} groups"
        held = self.experts // self.nodes
        assert self.slots_per_rank <= held, f"{self.slots_per_rank} slots a rank for the {held} experts of its node"

    def of_node(self) -> ExpertLayout:
        """The layout within one node, where groups no longer matter."""
        return replace(self, experts=self.experts // self.nodes, ranks=self.ranks // self.nodes, groups=1, nodes=1)


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """slots[rank][i]: the expert in slot i of the rank; physical slot number rank * slots_per_rank + i."""

    slots: tuple[tuple[int, ...], ...]

    def physical(self, experts: int) -> tuple[tuple[int, ...], ...]:
        """[experts][replicas]: the physical slots of each expert, ascending."""
        found: list[list[int]] = [[] for _ in range(experts)]
        for slot, expert in enumerate(expert for rank in self.slots for expert in rank):
            found[expert].append(slot)
        return tuple(map(tuple, found))

    def rank_loads(self, loads: Sequence[float]) -> list[float]:
        """[ranks]: what each rank computes when replicas share their expert's load equally."""
        shares = [load / len(slots) for load, slots in zip(loads, self.physical(len(loads)), strict=True)]
        return [sum(shares[expert] for expert in rank) for rank in self.slots]

    def moved(self, other: ExpertPlacement) -> tuple[int, ...]:
        """The physical slots that hold another expert there: what must be loaded or received to change over."""
        pairs = zip((e for rank in self.slots for e in rank), (e for rank in other.slots for e in rank), strict=True)
        return tuple(slot for slot, (before, after) in enumerate(pairs) if before != after)


def first_placement(layout: ExpertLayout) -> ExpertPlacement:
    """Before any loads are known: each rank has an equal run of experts, and copies of those that the next begins with.

    layout: whose ranks divide the experts.
    """
    held = layout.experts // layout.ranks
    assert held * layout.ranks == layout.experts, f"{layout.experts} experts on {layout.ranks} ranks"
    places = range(layout.slots_per_rank)
    slots = (tuple((rank * held + place) % layout.experts for place in places) for rank in range(layout.ranks))
    return ExpertPlacement(tuple(slots))


def placement_of(experts: int, degrees: Degrees) -> ExpertPlacement:
    """Where the experts of a layer lie before any is moved."""
    return first_placement(
        ExpertLayout(experts, degrees.expert, (experts + degrees.redundant_experts) // degrees.expert)
    )


def transfers(before: ExpertPlacement, after: ExpertPlacement) -> tuple[tuple[int, int], ...]:
    """(source, target) for each physical slot that is to hold another expert, targets ascending.

    The source is on the target's own rank if that has the expert, else on the rank with fewest to send so far.
    """
    per_rank = len(before.slots[0])
    wanted = [expert for rank in after.slots for expert in rank]
    holders = before.physical(max(wanted) + 1)
    sends = [0] * len(before.slots)
    found = []
    for target in before.moved(after):
        own = target // per_rank
        ranks = {slot // per_rank: slot for slot in holders[wanted[target]]}
        rank = own if own in ranks else min(ranks, key=sends.__getitem__)
        sends[rank] += rank != own
        found.append((ranks[rank], target))
    return tuple(found)


def imbalance(placement: ExpertPlacement, loads: Sequence[float]) -> float:
    """Heaviest rank over the mean of ranks, 1 at best: the factor by which the layer waits for one rank."""
    ranks = placement.rank_loads(loads)
    return max(ranks) * len(ranks) / sum(ranks) if sum(ranks) > 0 else 1.0


def imbalance_bound(loads: Sequence[float], layout: ExpertLayout) -> float:
    """No placement has a smaller imbalance: the mean, and the heaviest replica when replication is the best there is.

    Without regard to nodes. Taking the heaviest replica apart again and again minimises the heaviest (each step is
    forced), so the second part is exact.
    """
    if sum(loads) <= 0:
        return 1.0
    counts = replicate(loads, layout.ranks * layout.slots_per_rank, layout.ranks)
    replica = max(load / count for load, count in zip(loads, counts, strict=True))
    return max(1.0, replica * layout.ranks / sum(loads))


def place_experts(
    loads: Sequence[float],
    layout: ExpertLayout,
    previous: ExpertPlacement | None = None,
    tolerance: float = TOLERANCE,
) -> ExpertPlacement:
    """Where the experts of one layer go; loads [experts] >= 0, tokens routed to each in some window.

    1. Groups are packed onto nodes, as many on each, so that nodes are balanced (skipped with one node).
    2. Within a node the slots that are left over go one by one to the expert whose replicas are loaded most.
    3. Replicas are packed onto the node's ranks, heaviest first, each to the lightest rank that has room and lacks the
       expert; then ranks swap experts while that lowers the heaviest.
    4. With a previous placement, the first of these is taken whose heaviest rank exceeds that of step 3 by at most
       `tolerance`: it, with as many swaps as that needs, none if it is still good; it with the new numbers of replicas,
       and swaps; step 3's, its ranks numbered so that most experts stay.
    """
    assert len(loads) == layout.experts, f"loads of {len(loads)} experts, the layout has {layout.experts}"
    shape = [layout.slots_per_rank] * layout.ranks
    assert previous is None or [len(rank) for rank in previous.slots] == shape, f"{previous} is of another layout"
    within = layout.of_node()
    homes = _homes(loads, layout, previous, tolerance)
    slots: list[tuple[int, ...]] = []
    for node in range(layout.nodes):
        experts = [expert for expert in range(layout.experts) if homes[expert] == node]
        local = {expert: index for index, expert in enumerate(experts)}
        before: Bins | None = None
        if previous is not None:
            ranks = previous.slots[node * within.ranks : (node + 1) * within.ranks]
            kept = all(expert in local for rank in ranks for expert in rank)
            before = [[local[expert] for expert in rank] for rank in ranks] if kept else None
        for rank in _place_on_node([loads[expert] for expert in experts], within, before, tolerance):
            slots.append(tuple(experts[index] for index in rank))
    return ExpertPlacement(tuple(slots))


def _homes(
    loads: Sequence[float], layout: ExpertLayout, previous: ExpertPlacement | None, tolerance: float
) -> list[int]:
    """Step 1: the node of each expert; as before, if that is nearly as good."""
    size = layout.experts // layout.groups
    group_loads = [sum(loads[group * size : (group + 1) * size]) for group in range(layout.groups)]
    packed = pack(group_loads, [1] * layout.groups, layout.nodes, layout.groups // layout.nodes)
    fresh = [0] * layout.groups
    for node, groups in enumerate(packed):
        for group in groups:
            fresh[group] = node
    if previous is not None:
        ranks_per_node = layout.ranks // layout.nodes
        physical = previous.physical(layout.experts)
        before = [
            physical[group * size][0] // layout.slots_per_rank // ranks_per_node for group in range(layout.groups)
        ]
        goal = (1 + tolerance) * _heaviest(fresh, group_loads, layout.nodes)
        if _heaviest(before, group_loads, layout.nodes) <= goal:
            fresh = before
    return [node for node in fresh for _ in range(size)]


def _heaviest(homes: Sequence[int], loads: Sequence[float], nodes: int) -> float:
    return max(sum(load for load, home in zip(loads, homes, strict=True) if home == node) for node in range(nodes))


def _place_on_node(loads: Sequence[float], layout: ExpertLayout, before: Bins | None, tolerance: float) -> Bins:
    """Steps 2 to 4, with experts numbered within the node."""
    counts = replicate(loads, layout.ranks * layout.slots_per_rank, layout.ranks)
    mean = sum(loads) / layout.ranks
    fresh = swapped(pack(loads, counts, layout.ranks, layout.slots_per_rank), loads, mean)
    if before is None:
        return fresh
    goal = (1 + tolerance) * heaviest(fresh, loads)

    def candidates(before: Bins) -> Iterator[Bins]:
        yield swapped(before, loads, goal)
        if (kept := recounted(before, loads, counts)) is not None:
            yield swapped(kept, loads, goal)

    good = (bins for bins in candidates(before) if heaviest(bins, loads) <= goal)
    return next(good, renumbered(fresh, before))

"""The simulated network: it keeps order, and in peace nothing is late enough to be taken for silence."""

from __future__ import annotations

from random import Random

from coordinator.replica.health import READY, HealthLimits
from tests.simulation.network import LONGEST_S, Clock, Connection
from tests.simulation.ranks import HEARTBEAT_S
from tests.simulation.world import PEER


def test_what_is_sent_arrives_in_order_and_before_anybody_is_taken_for_silent() -> None:
    clock = Clock()
    connection = Connection(clock, Random(0), latency_s=0.2)
    arrived: list[tuple[int, float]] = []
    connection.ends[PEER].on_message = lambda number: arrived.append((number, clock.now))
    start = clock.now
    for number in range(5000):
        clock.after(number * HEARTBEAT_S, connection.send, PEER, number)
    clock.run(start + 6000.0)
    assert [number for number, _ in arrived] == list(range(5000))
    delays = [at - (start + number * HEARTBEAT_S) for number, at in arrived]
    assert max(delays) <= LONGEST_S
    assert HealthLimits().phases[READY].silence_s > HEARTBEAT_S + LONGEST_S

"""What is struck, how, and when: plans written in YAML or drawn by a seed.

Pure. Injections come in rounds: the first of a round strikes while streams run, those behind it strike at moments of
the recovery from the one before. Names victims by their role; who that is now, `victims.py` finds.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from echelon.chaos.moments import ORDER, RECOVERY
from echelon.chaos.victims import check_victim
from echelon.errors import ConfigError

FAULTS = ("kill", "stop", "partition")  # partition: stopped for longer than the lease, then woken
MOMENTS = ORDER
OPENING = "decode"  # when the first injection of a round that is aimed at a recovery strikes


@dataclass(frozen=True, slots=True)
class Injection:
    """fault: of FAULTS. victim: as VICTIM has it. when: of MOMENTS."""

    fault: str
    victim: str
    when: str = OPENING

    def __str__(self) -> str:
        return f"{self.fault} {self.victim} in {self.when}"


Round = tuple[Injection, ...]


def parse_plan(content: object) -> tuple[Round, ...]:
    """The rounds of a plan that was read from YAML: a list of {fault, victim, when}.

    Raises ConfigError naming the entry and what it may be.
    """
    if not isinstance(content, list) or not content:
        raise ConfigError("the plan must be a list of {fault, victim, when}", field="plan")
    return in_rounds([_injection(number, entry) for number, entry in enumerate(content, 1)])


def in_rounds(injections: Iterable[Injection]) -> tuple[Round, ...]:
    """A moment of a recovery belongs to the injection before it; any other begins a round.

    Raises ConfigError for a recovery from nothing.
    """
    rounds: list[Round] = []
    for injection in injections:
        if injection.when not in RECOVERY:
            rounds.append((injection,))
        elif rounds:
            rounds[-1] += (injection,)
        else:
            raise ConfigError(
                f"{injection}: {injection.when} is a moment of a recovery; put the injection that it recovers from "
                "before it",
                field="plan",
            )
    return tuple(rounds)


def draw_plan(
    seed: int, injections: int, faults: Sequence[str], victims: Sequence[str], moments: Sequence[str]
) -> tuple[Round, ...]:
    """A plan of so many injections, the same for the same seed. Each kind of fault, victim and moment is as likely.

    A round that is aimed at a recovery is opened by the kill of a rank, which counts as one of the injections. Raises
    ConfigError where nothing can be drawn.
    """
    for name, given, known in (("faults", faults, FAULTS), ("moments", moments, MOMENTS)):
        if unknown := sorted(set(given) - set(known)):
            raise ConfigError(f"{name}: {unknown[0]!r} is none of {', '.join(known)}", field=name)
    for victim in victims:
        check_victim(victim, "victims")
    choices = [Injection(f, v, m) for f in faults for v in victims for m in moments if not unfit(Injection(f, v, m))]
    if not choices:
        raise ConfigError("no injection is possible with these faults, victims and moments", field="victims")
    source = random.Random(seed)
    rounds: list[Round] = []
    while (left := injections - sum(map(len, rounds))) > 0:
        fit = [choice for choice in choices if left > 1 or choice.when not in RECOVERY]
        if not fit and not rounds:
            raise ConfigError("a moment of a recovery takes two injections: one to recover from", field="injections")
        if not fit:
            break
        drawn = source.choice(fit)
        opening = (Injection("kill", "rank", OPENING),) if drawn.when in RECOVERY else ()
        rounds.append((*opening, drawn))
    return tuple(rounds)


def unfit(injection: Injection) -> str:
    """Why an injection makes no sense, or nothing."""
    if injection.when == "journal" and injection.victim != "coordinator":
        return "the coordinator alone writes the journal"
    if injection.victim == "supervisor" and injection.fault != "partition":
        return "nobody replaces the supervisor: its death ends the cluster"
    if injection.fault == "partition" and injection.when in RECOVERY:
        return "a partition outlasts a recovery: nothing would be left to strike in"
    return ""


def _injection(number: int, entry: object) -> Injection:
    keys = [field.name for field in fields(Injection)]
    where = f"plan, entry {number}"
    if not isinstance(entry, Mapping) or not {"fault", "victim"} <= set(entry) <= set(keys):
        raise ConfigError(f"{where}: must have the keys {', '.join(keys)} (when may be left out)", field="plan")
    injection = Injection(**{str(key): str(value) for key, value in entry.items()})
    for name, value, known in (("fault", injection.fault, FAULTS), ("when", injection.when, MOMENTS)):
        if value not in known:
            raise ConfigError(f"{where}: {name} must be one of {', '.join(known)}, got {value!r}", field="plan")
    check_victim(injection.victim, "plan", where)
    if reason := unfit(injection):
        raise ConfigError(f"{where}: {injection}: {reason}", field="plan")
    return injection

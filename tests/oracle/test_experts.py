"""Experts shared by the ranks of a stage, against transformers in float64: every row, in every way it may travel.

Data ranks have sequences of their own, or none. What each rank holds and sends is counted by hand from the routers'
choices as transformers made them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models.config import read_model_config
from models.expert_balance import Rebalanced, rebalance_experts
from models.moe import MixtureOfExperts
from models.registry import build_model
from models.tables import parameter_bytes
from parallel.context import ParallelContext
from parallel.degrees import Degrees
from parallel.expert import ExchangedExperts, ExpertStep
from tests.oracle.harness import BLOCK_TOKENS, NUM_BLOCKS, Driver, Piece
from tests.ranks import as_ranks
from tests.tiny import make_checkpoint
from worker.kv_cache import KVCache
from worker.loader import load_weights

PROMPTS, LENGTHS = (23, 15), (29, 26)
CHUNK_TOKENS = 9
FLOAT64_BYTES = 8
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3-moe": {"norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "one-expert": {"num_experts_per_tok": 1},  # its router chooses the same for every row
    "deepseek-v2": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
    "deepseek-v3": {"num_hidden_layers": 3, "n_shared_experts": 1},
    "every-expert": {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1},  # chosen by every row
}
OF_FAMILY = {"one-expert": "qwen3-moe", "every-expert": "deepseek-v3"}
LONG = ("deepseek-v2", "deepseek-v3", "every-expert")
DEGREES = {
    "alone": Degrees(),
    "tensor-2-expert-2": Degrees(tensor=2, expert=2),
    "data-2": Degrees(data=2),
    "data-2-expert-2": Degrees(data=2, expert=2),
    "data-2-tensor-2-expert-2": Degrees(data=2, tensor=2, expert=2),
    "data-2-tensor-2-expert-4": Degrees(data=2, tensor=2, expert=4),
}
OWNERS = {"apart": (0, 1), "one-idle": (0, 0)}  # the data rank of each sequence, if there are two of them

Step = tuple[list[Piece], ExpertStep]


@dataclass(frozen=True, slots=True)
class Expected:
    """choices: [layer with experts][sequence][token]: the experts that transformers' router chose."""

    directory: Path
    sequences: list[list[int]]
    logprobs: list[npt.NDArray[np.float64]]
    choices: list[list[list[list[int]]]]


@dataclass(frozen=True, slots=True)
class Found:
    """What one rank has; logprobs of its data rank's sequences."""

    logprobs: dict[int, npt.NDArray[np.float64]]
    parameter_bytes: int
    expert_bytes: int
    dispatches: int
    rows_sent: int
    rows_received: int
    loads: list[list[int]]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in FAMILIES]
)
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    directory = tmp_path_factory.mktemp(request.param)
    make_checkpoint(directory, OF_FAMILY.get(request.param, request.param), **FAMILIES[request.param])
    if request.param == "one-expert":
        weights = load_file(directory / "model.safetensors")
        flat = {name: torch.zeros_like(w) if name.endswith(".gate.weight") else w for name, w in weights.items()}
        save_file(flat, directory / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, experts_implementation="eager"
    )
    chosen: list[list[list[int]]] = []
    for name, gate in model.named_modules():
        if name.endswith(".gate"):
            gate.register_forward_hook(lambda gate, inputs, outputs: chosen.append(outputs[2].tolist()))
    random = np.random.default_rng(5)
    sequences = [random.integers(2, 320, size=length).tolist() for length in LENGTHS]
    logprobs, choices = [], []
    with torch.inference_mode():
        for ids in sequences:
            logprobs.append(model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy())
            choices.append(chosen.copy())
            chosen.clear()
    return Expected(directory, sequences, logprobs, [list(layer) for layer in zip(*choices, strict=True)])


def steps_of(owners: Sequence[int], data: int) -> list[list[Step]]:
    """By data rank: prompts in chunks, then one token a step; decode is a step in which no rank has a chunk."""
    queues = []
    for sequence, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        chunks = [Piece(sequence, first, min(CHUNK_TOKENS, prompt - first)) for first in range(0, prompt, CHUNK_TOKENS)]
        queues.append(chunks + [Piece(sequence, position, 1) for position in range(prompt, length)])
    ranks: list[list[Step]] = [[] for _ in range(data)]
    for pieces in itertools.zip_longest(*queues):
        present = [piece for piece in pieces if piece is not None]
        of_ranks = [[piece for piece in present if owners[piece.sequence] == rank] for rank in range(data)]
        rows = tuple(sum(piece.tokens for piece in own) for own in of_ranks)
        step = ExpertStep(all(piece.decodes for piece in present), rows)
        for rank, own in enumerate(of_ranks):
            ranks[rank].append((own, step))
    return ranks


class StageDriver(Driver):
    """A driver of one data rank, which may have nothing in a step."""

    @torch.inference_mode()
    def stage_logprobs(
        self, steps: Sequence[Step], between: Callable[[StageDriver, int], None] = lambda driver, step: None
    ) -> dict[int, npt.NDArray[np.float64]]:
        """By sequence. between: called after each step."""
        rows: dict[int, list[npt.NDArray[np.float64]]] = {}
        for number, (pieces, step) in enumerate(steps):
            if number:
                between(self, number - 1)
            pieces = sorted(pieces, key=lambda piece: not piece.decodes)
            hidden = self.model(replace(self._batch(pieces), experts=step), self.cache)
            if not pieces:
                continue
            logits = self.group.all_gather(self.model.row_logits(hidden))[: len(hidden)]
            parts = torch.split(logits.log_softmax(-1), [piece.tokens for piece in pieces])
            for piece, part in zip(pieces, parts, strict=False):
                rows.setdefault(piece.sequence, []).append(part.numpy())
        return {sequence: np.concatenate(parts) for sequence, parts in rows.items()}


def driver_of(expected: Expected, context: ParallelContext) -> StageDriver:
    config = read_model_config(expected.directory)
    model = build_model(config, context)
    load_weights(model, config, expected.directory, context, lambda loaded_bytes, total_bytes: None)
    cache = KVCache(config, context, NUM_BLOCKS, BLOCK_TOKENS)
    return StageDriver(model, cache, context.tensor, expected.sequences)


def run(expected: Expected, degrees: Degrees, steps: list[list[Step]]) -> list[Found]:
    def as_rank(context: ParallelContext) -> Found:
        driver = driver_of(expected, context)
        logprobs = driver.stage_logprobs(steps[context.place.data_rank])
        sparse = [layer.mlp for layer in driver.model.layers if isinstance(layer.mlp, MixtureOfExperts)]
        exchanges = [mlp.dispatcher for mlp in sparse if isinstance(mlp.dispatcher, ExchangedExperts)]
        return Found(
            logprobs=logprobs,
            parameter_bytes=driver.model.resident_bytes,
            expert_bytes=sum(mlp.experts.gate_up.nbytes + mlp.experts.down.nbytes for mlp in sparse),
            dispatches=sum(exchange.traffic.dispatches for exchange in exchanges),
            rows_sent=sum(exchange.traffic.rows_sent for exchange in exchanges),
            rows_received=sum(exchange.traffic.rows_received for exchange in exchanges),
            loads=[exchange.map.loads.tolist() for exchange in exchanges],
        )

    return as_ranks(degrees, as_rank)


@pytest.mark.parametrize(
    "degrees",
    [
        DEGREES["tensor-2-expert-2"],
        DEGREES["data-2-expert-2"],
        DEGREES["data-2-tensor-2-expert-2"],
        Degrees(data=2, expert=2, redundant_experts=2),
        Degrees(data=2, tensor=2, expert=2, redundant_experts=2),
    ],
    ids=lambda d: f"tensor-{d.tensor}-data-{d.data}-redundant-{d.redundant_experts}",
)
def test_answers_stay_when_experts_move(expected: Expected, degrees: Degrees) -> None:
    """After every fourth step; each move lowers the heaviest rank's load of the steps before, or keeps it."""
    steps = steps_of(OWNERS["one-idle"], degrees.data)

    def as_rank(context: ParallelContext) -> tuple[dict[int, npt.NDArray[np.float64]], list[Rebalanced]]:
        done: list[Rebalanced] = []

        def between(driver: StageDriver, step: int) -> None:
            if step % 4 == 3:
                done.extend(rebalance_experts(driver.model, context).values())

        driver = driver_of(expected, context)
        logprobs = driver.stage_logprobs(steps[context.place.data_rank], between)
        rebalance_experts(driver.model, context)
        assert set(rebalance_experts(driver.model, context).values()) == {Rebalanced(1.0, 1.0, 0)}  # no load since
        return logprobs, done

    ranks = as_ranks(degrees, as_rank)
    for logprobs, done in ranks:
        for sequence, found in logprobs.items():
            np.testing.assert_allclose(found, expected.logprobs[sequence], rtol=0, atol=1e-6)
        assert len(done) == (len(steps[0]) - 1) // 4 * len(expected.choices)
        assert all(layer.after <= layer.before + 1e-9 for layer in done)
    received = sum(layer.received for _, done in ranks for layer in done)
    chosen = json.loads((expected.directory / "config.json").read_text())["num_experts_per_tok"]
    every = chosen == len(expected_experts(expected))
    after = {layer.after for _, done in ranks for layer in done}
    if degrees.redundant_experts:  # copies share the rows of one expert that has all of them
        assert (received > 0) == (not every)
        assert after == {1.0} or not (chosen == 1 or every)
    elif chosen == 1 or every:  # no exchange of experts helps
        assert received == 0
    else:
        assert received > 0
        assert any(layer.after < layer.before for _, done in ranks for layer in done)


def expected_experts(expected: Expected) -> range:
    """Of a layer that has some."""
    config = read_model_config(expected.directory)
    return range(next(found.routing.experts for found in config.layers if found.routing is not None))


def rows_sent(expected: Expected, degrees: Degrees, rank: int, steps: Sequence[Step]) -> int:
    """To other ranks: once to each that holds a chosen expert, and in decode to every one, padding included, unless
    all ranks have all rows."""
    place, sent = degrees.place(rank), 0
    experts = len(expected_experts(expected))
    for layer in expected.choices:
        for pieces, step in steps:
            pieces = sorted(pieces, key=lambda piece: not piece.decodes)
            tokens = [(piece.sequence, piece.first + i) for piece in pieces for i in range(piece.tokens)]
            share = -(-len(tokens) // degrees.tensor)
            if step.decode:
                padded = -(-max(step.rows_per_rank) // degrees.tensor) * (degrees.stage_ranks - 1)
                sent += padded if degrees.data > 1 else 0
                continue
            for sequence, token in tokens[place.tensor_rank * share : (place.tensor_rank + 1) * share]:
                owners = {expert * degrees.expert // experts for expert in layer[sequence][token]}
                others = (other for other in range(degrees.stage_ranks) if other != rank)
                sent += sum(degrees.place(other).expert_rank in owners for other in others)
    return sent


@pytest.mark.parametrize(
    ("name", "owners"), [(name, o) for name, d in DEGREES.items() for o in OWNERS if d.data > 1 or o == "one-idle"]
)
def test_logprobs_equal_transformers(expected: Expected, name: str, owners: str) -> None:
    degrees = DEGREES[name]
    steps = steps_of(OWNERS[owners], degrees.data)
    modes = {step.decode for _, step in steps[0]}
    assert modes == {True, False}
    found = run(expected, degrees, steps)
    seen = set()
    for rank in found:
        for sequence, logprobs in rank.logprobs.items():
            np.testing.assert_allclose(logprobs, expected.logprobs[sequence], rtol=0, atol=1e-6)
            assert (logprobs.argmax(-1) == expected.logprobs[sequence].argmax(-1)).all()
            seen.add(sequence)
    assert seen == {0, 1}
    _check_holdings(expected, degrees, found)
    if degrees.stage_ranks > 1:
        _check_traffic(expected, degrees, found, steps)


def _check_holdings(expected: Expected, degrees: Degrees, found: Sequence[Found]) -> None:
    """Each rank has its share of the experts: numbers by the config, divided by the ranks of the stage."""
    keys = json.loads((expected.directory / "config.json").read_text())
    neurons = keys.get("moe_intermediate_size", keys["intermediate_size"])
    numbers = len(expected.choices) * len(expected_experts(expected)) * 3 * neurons * keys["hidden_size"]
    for rank, held in enumerate(found):
        assert held.expert_bytes == numbers * FLOAT64_BYTES // degrees.stage_ranks
        place = degrees.place(rank)
        assert held.parameter_bytes == parameter_bytes(read_model_config(expected.directory), place, FLOAT64_BYTES)


def _check_traffic(expected: Expected, degrees: Degrees, found: Sequence[Found], steps: list[list[Step]]) -> None:
    """Rows sent as computed, received as sent; loads as transformers' routers chose, over all ranks."""
    for rank, counted in enumerate(found):
        own = steps[degrees.place(rank).data_rank]
        assert counted.dispatches == len(own) * len(expected.choices)
        assert counted.rows_sent == rows_sent(expected, degrees, rank, own)
    assert sum(rank.rows_received for rank in found) == sum(rank.rows_sent for rank in found) > 0
    for layer, choices in enumerate(expected.choices):
        chosen = [expert for sequence in choices for token in sequence for expert in token]
        total = np.sum([rank.loads[layer] for rank in found], axis=0)
        assert total.tolist() == np.bincount(chosen, minlength=len(total)).tolist()


def test_the_forced_router_has_one_favourite(expected: Expected) -> None:
    chosen = {expert for layer in expected.choices for sequence in layer for token in sequence for expert in token}
    config = json.loads((expected.directory / "config.json").read_text())
    assert (len(chosen) == 1) == (config["num_experts_per_tok"] == 1)

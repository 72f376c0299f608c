"""Constrained answers of a random model: whole and valid, the same after a replay, and faults that stay one row's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer

from echelon.internal.link import Sampling
from models.constraints import compile_constraint
from parallel.context import ParallelContext, solo_context
from tests.tiny import make_checkpoint
from tests.unit.plans import CPU, FENCE, Ask, as_two_ranks, new_runner
from tests.unit.random_schemas import random_schema
from worker.plan import NO_ID, Admit, Row, StepPlan, StepResult, decode, encode
from worker.runner import Runner, RunnerLimits

SCHEMAS = 200
LIMITS = RunnerLimits(max_running=40, max_context=512, block_tokens=16)
BLOCKS_PER_SLOT = LIMITS.max_context // LIMITS.block_tokens
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
PROMPT = (7, 8, 9)
END = 1
TEMPERATURE = 4.0  # the model would rather repeat itself
VOCABULARY = 340  # padded: the tokenizer has 320


def asking(grammar: str, seed: int = 0) -> Sampling:
    return Sampling(TEMPERATURE, 1.0, 0, 500, seed, stop_token_ids=(END,), grammar=grammar)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY, num_hidden_layers=1)


def runner_of(checkpoint: Path, context: ParallelContext | None = None) -> Runner:
    context = context or solo_context(CPU, torch.float32, FENCE.epoch)
    return new_runner(checkpoint, context, LIMITS, LIMITS.max_running * BLOCKS_PER_SLOT)


class Slots:
    """Answers requests as an engine does: a constrained row is planned once its last id is known."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._step = 0

    def step(self, rows: Sequence[Row], admits: Sequence[Admit] = ()) -> StepResult:
        self._step += 1
        blocks = tuple(
            (admit.slot, index, admit.slot * BLOCKS_PER_SLOT + index)
            for admit in admits
            for index in range(BLOCKS_PER_SLOT)
        )
        return self._runner.run(decode(encode(StepPlan(FENCE, self._step, tuple(admits), blocks, tuple(rows)))))

    def answers(
        self, asked: Sequence[Sampling], given: Sequence[tuple[int, ...]] | None = None
    ) -> list[tuple[int, ...]]:
        """The generated ids of each, up to its end token. given: ids that are replayed first."""
        ids = [list(replayed) for replayed in given or [()] * len(asked)]
        waiting = list(range(len(asked)))[::-1]
        running: dict[int, int] = {}  # slot -> which
        while waiting or running:
            rows = [Row(slot, len(PROMPT) + len(ids[one]) - 1, 1, None, True) for slot, one in running.items()]
            admits = []
            for slot in sorted(set(range(LIMITS.max_running)) - set(running))[: len(waiting)]:
                one = running[slot] = waiting.pop()
                admits.append(Admit(slot, 0, len(PROMPT), asked[one]))
                rows.append(Row(slot, 0, len(PROMPT) + len(ids[one]), (*PROMPT, *ids[one]), True))
            result = self.step(rows, admits)
            assert not result.faults
            for row, token in zip(rows, result.ids, strict=True):
                one = running[row.slot]
                ids[one].append(token)
                if token == END or len(ids[one]) == asked[one].max_tokens:
                    del running[row.slot]
        return [tuple(answer) for answer in ids]


def tokenizer_of(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


def id_of(checkpoint: Path, token: str) -> int:
    return int(tokenizer_of(checkpoint).token_to_id(token) or 0)


def texts(checkpoint: Path, answers: Sequence[tuple[int, ...]]) -> list[str]:
    """What each says; all must have come to their end."""
    tokenizer = tokenizer_of(checkpoint)
    assert all(ids[-1] == END and END not in ids[:-1] for ids in answers)
    return [tokenizer.decode(list(ids)) for ids in answers]


@pytest.mark.long
def test_answers_to_random_schemas_are_valid_and_a_replay_goes_on_alike(checkpoint: Path) -> None:
    random = Random(11)
    schemas = [random_schema(random) for _ in range(SCHEMAS)]
    asked = [asking(compile_constraint("json_schema", json.dumps(schema)), seed) for seed, schema in enumerate(schemas)]
    answers = Slots(runner_of(checkpoint)).answers(asked)
    checker = jsonschema.FormatChecker()
    for schema, text in zip(schemas, texts(checkpoint, answers), strict=True):
        jsonschema.validate(json.loads(text), schema, format_checker=checker)
    given = [ids[: random.randrange(len(ids))] for ids in answers]
    order = random.sample(range(SCHEMAS), 60)
    replayed = Slots(runner_of(checkpoint)).answers([asked[one] for one in order], [given[one] for one in order])
    assert replayed == [answers[one] for one in order]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_regex_choice_and_lark_hold_for_every_answer(checkpoint: Path, device: torch.device) -> None:
    options = ["yes", "no", 'per"haps', "日本"]
    lark = 'start: "(" sum ")"\nsum: NUMBER ("+" NUMBER){0,3}\nNUMBER: /[1-9][0-9]{0,2}/'
    grammars = [
        compile_constraint("regex", "[a-f]{3,9}(-[0-9]{2}){0,2}"),
        compile_constraint("choice", options),
        compile_constraint("grammar", lark),
    ]
    asked = [asking(grammar, seed) for grammar in grammars for seed in range(20)]
    runner = runner_of(checkpoint, solo_context(device, torch.float32, FENCE.epoch))
    found = texts(checkpoint, Slots(runner).answers(asked))
    assert all(re.fullmatch("[a-f]{3,9}(-[0-9]{2}){0,2}", text) for text in found[:20])
    assert set(found[20:40]) <= set(options) and len(set(found[20:40])) > 1
    assert all(re.fullmatch(r"\([1-9]\d{0,2}(\+[1-9]\d{0,2}){0,3}\)", text) for text in found[40:])
    assert len(set(found[:20])) > 10 and len(set(found[40:])) > 10


def test_each_row_has_its_own_mask_whatever_paths_its_company_takes(checkpoint: Path) -> None:
    words = ["aa", "bb", "cc", "dd", "ee", "ff"]
    paths = [{"temperature": 0.0}, {}, {"top_k": 5}] * 2
    asked = [
        replace(asking(compile_constraint("choice", [word])), **path)  # type: ignore[arg-type]
        for word, path in zip(words, paths, strict=True)
    ]
    assert texts(checkpoint, Slots(runner_of(checkpoint)).answers(asked)) == words


def test_a_constraint_comes_before_other_rules(checkpoint: Path) -> None:
    """Bans that would leave it nothing yield to it, and a bias cannot bring back what it forbids."""
    a, b, c = (id_of(checkpoint, letter) for letter in "abc")
    sampling = replace(
        asking(compile_constraint("regex", "a(b|c)")),
        logit_bias=((c + 1, 100.0),),
        bad_words=((a,), (b,)),
        min_tokens=9,
    )
    assert texts(checkpoint, Slots(runner_of(checkpoint)).answers([sampling])) == ["ac"]


def test_ids_that_do_not_follow_the_constraint_fail_their_row_alone(checkpoint: Path) -> None:
    slots = Slots(runner_of(checkpoint))
    digits = asking(compile_constraint("regex", "[0-9]{3}"))
    free = replace(digits, grammar="")
    seven, letter = id_of(checkpoint, "7"), id_of(checkpoint, "x")
    admits = [Admit(slot, 0, 3, sampling) for slot, sampling in enumerate((digits, digits, free))]
    given = ((*PROMPT, seven, letter), (*PROMPT, seven), (*PROMPT, letter))
    result = slots.step([Row(slot, 0, len(ids), ids, True) for slot, ids in enumerate(given)], admits)
    assert result.ids[0] == NO_ID
    ((row, reason),) = result.faults
    assert row == 0
    assert "does not follow its constraint" in reason and "<state>" not in reason
    assert tokenizer_of(checkpoint).decode([result.ids[1]]).isdigit()
    again = slots.answers([digits] * 2)  # the slots serve others
    assert all(text.isdigit() and len(text) == 3 for text in texts(checkpoint, again))


DEAD_END = 'start: "a" loop\nloop: loop "b"'  # it can begin, and never goes on


def test_a_grammar_that_breaks_in_the_middle_is_told_by_every_rank(checkpoint: Path) -> None:
    asks = [Ask(PROMPT, slot=slot, sampling=asking(DEAD_END if slot == 2 else "", slot)) for slot in range(3)]

    def work(context: ParallelContext) -> list[StepResult]:
        slots = Slots(runner_of(checkpoint, context))
        first = slots.step([Row(ask.slot, 0, 3, PROMPT, True) for ask in asks], [ask.admit() for ask in asks])
        second = slots.step([Row(ask.slot, 3, 1, None, True, logprobs=2) for ask in asks])
        return [first, second]

    for first, second in as_two_ranks(work):  # the third row is sampled by the second rank alone
        assert first.faults == () and first.ids[2] != NO_ID
        ((row, reason),) = second.faults
        assert row == 2 and "the constraint cannot be followed further" in reason
        assert second.ids[2] == NO_ID and NO_ID not in second.ids[:2]

"""The layer for multi-token prediction as drafter: guesses are those of a plain reference, and no answer changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from echelon.errors import ConfigError
from echelon.internal.link import Assign, Progress
from examples.quantize_fp8 import quantise_checkpoint, quantise_file, quantised_names
from models.config import read_model_config, with_prediction
from models.files import check_model_directory, checkpoint_index
from models.tables import kv_bytes_per_block, parameter_bytes
from parallel.context import solo_context
from parallel.degrees import Degrees
from tests.predicting import LAYER, SHAPE, make_circle, make_wild
from tests.shards import KeepingRank, assert_same
from tests.tiny import make_checkpoint
from tests.unit.paged_device import request
from tests.unit.pipelines import Pipeline
from tests.unit.plans import CPU, FENCE, new_runner
from tests.unit.test_engine_on_model import BLOCK_TOKENS, MAX_CONTEXT, Answers, Replica, check_same
from worker.batch import DecodeRows
from worker.decode_graphs import DecodeGraphs
from worker.limits import EngineLimits
from worker.runner import RunnerLimits
from worker.speculation import Speculation

PROMPT = (5, 6, 7, 40, 41, 42, 43, 44, 45, 46, 47)
PREDICT = Speculation.predict
WITHIN = 1e-6  # rotations and routers are float32, and round otherwise in each shape of batch


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wild(tmp_path_factory.mktemp("wild") / "model")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_circle(tmp_path_factory.mktemp("circle") / "model")


@dataclass
class Drafts:
    """By their places, as the leader is told them of the only request."""

    told: dict[int, int] = field(default_factory=dict)

    def note(self, speculation: Speculation, place: int, token_id: int) -> None:
        assert self.told.setdefault(place, token_id) == token_id
        speculation._prediction = place, token_id


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> Drafts:
    found = Drafts()
    monkeypatch.setattr(Speculation, "predict", lambda speculation, *told: found.note(speculation, *told))
    return found


@torch.no_grad()
def reference(directory: Path, folder: Path, ids: Sequence[int]) -> dict[int, int]:
    """By its place, what plain code predicts after the ids two and more before it.

    transformers knows no prediction: its layer is computed as the only one of a model, whose last norm is its own.
    """
    load: dict[str, Any] = {"dtype": torch.float64, "experts_implementation": "eager"}
    weights = load_file(directory / "model.safetensors")
    shutil.copytree(directory, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "first_k_dense_replace": 0}))
    alone = {name.replace(LAYER, "model.layers.0."): part for name, part in weights.items() if name.startswith(LAYER)}
    alone |= {name: weights[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    alone["model.norm.weight"] = weights[f"{LAYER}shared_head.norm.weight"]
    save_file(alone, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(directory, **load).eval()
    layer = AutoModelForCausalLM.from_pretrained(folder, **load).eval()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])
        return torch.from_numpy(weights[LAYER + name]).double() * scaled.double()

    known = torch.tensor([list(ids)])
    hidden = model.model(known).last_hidden_state[:, :-1]
    joined = torch.cat([norm(model.model.embed_tokens(known[:, 1:]), "enorm.weight"), norm(hidden, "hnorm.weight")], -1)
    made = joined @ torch.from_numpy(weights[f"{LAYER}eh_proj.weight"]).double().T
    return dict(enumerate(layer(inputs_embeds=made).logits[0].argmax(-1).tolist(), 2))


def greedy(max_tokens: int = 40) -> Assign:
    return request("greedy", PROMPT, max_tokens, temperature=0.0, logprobs=2)


def several() -> list[Assign]:
    """With rules, choices and prompts that begin alike."""
    return [
        greedy(),
        request("sampled", PROMPT, 40, temperature=0.5, choices=[Progress(choice) for choice in range(3)], logprobs=0),
        request("cut", PROMPT[:7], 40, temperature=0.9, top_k=20, top_p=0.95, logprobs=0),
        request("penalised", PROMPT[2:], 30, temperature=0.4, repetition_penalty=1.1, logit_bias=((9, 2.0),)),
        request("stops", PROMPT[3:], 40, temperature=0.0, stop_token_ids=tuple(range(60, 80)), min_tokens=3),
    ]


@pytest.mark.parametrize("max_step_tokens", [64, 5])
@pytest.mark.parametrize("right", [True, False], ids=["mostly right", "always wrong"])
def test_drafts_are_those_of_the_reference_and_the_answer_is_the_one_without(
    checkpoint: Path, wild: Path, tmp_path: Path, drafts: Drafts, max_step_tokens: int, right: bool
) -> None:
    """Of a prompt that is computed at once, or in chunks: what follows a chunk's last id is told with it."""
    directory = checkpoint if right else wild
    expected = Replica(directory).answer([greedy()])
    replica = Replica(directory, max_step_tokens=max_step_tokens, speculation_tokens=1, predicts=True)
    check_same(replica.answer([greedy()]), expected, within=WITHIN)
    foreseen = reference(directory, tmp_path / "alone", [*PROMPT, *expected.ids["greedy", 0]])
    shared = sorted(drafts.told.keys() & foreseen.keys())
    assert len(shared) >= 38
    assert [drafts.told[place] for place in shared] == [foreseen[place] for place in shared]
    counters = replica.scheduler.counters
    assert counters["drafted_tokens"] > 0 and (counters["accepted_tokens"] > 10) == right
    assert right or counters["accepted_tokens"] == 0


@pytest.mark.parametrize(
    "degrees",
    [
        Degrees(tensor=2),
        Degrees(pipeline=2),
        pytest.param(Degrees(tensor=2, expert=2), marks=pytest.mark.long),
        pytest.param(Degrees(pipeline=2, data=2, expert=2), marks=pytest.mark.long),
        pytest.param(Degrees(tensor=2, expert=2, redundant_experts=2), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_several_ranks_predict_what_one_does(checkpoint: Path, drafts: Drafts, degrees: Degrees) -> None:
    expected = Replica(checkpoint, speculation_tokens=1, predicts=True).answer([greedy()])
    alone, drafts.told = drafts.told, {}
    sizes: dict[str, Any] = {"stages": degrees.pipeline, "depth": degrees.pipeline, "data": degrees.data}
    limits = EngineLimits(12, 60, BLOCK_TOKENS, 24, MAX_CONTEXT, speculation_tokens=1, predicts=True, **sizes)
    with Pipeline(checkpoint, degrees, limits) as pipeline:
        found = Answers()
        found.take(pipeline.answer([greedy()]))
    check_same(found, expected, within=WITHIN)
    shared = alone.keys() & drafts.told.keys()
    assert len(shared) >= 39 and all(alone[place] == drafts.told[place] for place in shared)
    assert pipeline.core.stats().counters["accepted_tokens"] > 5


@pytest.mark.parametrize(
    "degrees",
    [
        Degrees(),
        pytest.param(Degrees(tensor=2, expert=2), marks=pytest.mark.long),
        pytest.param(Degrees(pipeline=2), marks=pytest.mark.long),
        pytest.param(Degrees(data=2, expert=2), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_graphs_predict_what_eager_steps_do(
    checkpoint: Path, drafts: Drafts, monkeypatch: pytest.MonkeyPatch, degrees: Degrees
) -> None:
    """Answers and guesses, of one row and of several with padding: the prediction is a second graph, behind the ids."""
    replayed: list[int] = []
    predict = DecodeGraphs.predict

    def counting(graphs: DecodeGraphs, rows: DecodeRows) -> torch.Tensor:
        replayed.append(rows.tokens)
        return predict(graphs, rows)

    monkeypatch.setattr(DecodeGraphs, "predict", counting)
    sizes: dict[str, Any] = {"stages": degrees.pipeline, "depth": degrees.pipeline, "data": degrees.data}
    limits = EngineLimits(12, 60, BLOCK_TOKENS, 24, MAX_CONTEXT, speculation_tokens=1, predicts=True, **sizes)

    def answers(assigns: list[Assign], graphs: tuple[int, ...]) -> Answers:
        with Pipeline(checkpoint, degrees, limits, graphs=graphs) as pipeline:
            found = Answers()
            found.take(pipeline.answer(assigns))
        assert pipeline.core.stats().counters["accepted_tokens"] > 5
        return found

    expected = answers([greedy()], ())
    alone, drafts.told = drafts.told, {}
    assert not replayed
    check_same(answers([greedy()], (3, 12)), expected, within=WITHIN)
    shared = alone.keys() & drafts.told.keys()
    assert len(shared) >= 39 and all(alone[place] == drafts.told[place] for place in shared)
    assert {1, 2} <= set(replayed), "rows with and without a draft behind them"
    monkeypatch.setattr(Speculation, "predict", PREDICT)
    check_same(answers(several(), (3, 12)), answers(several(), ()), within=WITHIN)


@pytest.mark.parametrize("kv_blocks", [24, 200])
def test_answers_with_rules_in_company_are_those_without(checkpoint: Path, kv_blocks: int) -> None:
    """Preempted, and behind prompts that are cached."""
    expected = Replica(checkpoint, max_running=8, kv_blocks=200).answer(several())
    sizes: dict[str, Any] = {"max_running": 8, "kv_blocks": kv_blocks, "max_step_tokens": 20}
    replica = Replica(checkpoint, **sizes, speculation_tokens=1, predicts=True)
    check_same(replica.answer(several()), expected, within=WITHIN)
    counters = replica.scheduler.counters
    assert counters["accepted_tokens"] > 20 and (counters["preemptions"] > 0) == (kv_blocks == 24)


def test_drafts_on_their_places_noise_come_true_where_they_are_drawn(checkpoint: Path) -> None:
    replica = Replica(checkpoint, max_running=8, kv_blocks=200, speculation_tokens=1, predicts=True)
    replica.answer([request("drawn", PROMPT, 40, temperature=0.7)])
    counters = replica.scheduler.counters
    assert counters["accepted_tokens"] > counters["drafted_tokens"] / 3 > 3


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(tensor=2, expert=2), Degrees(pipeline=3)], ids=str)
def test_bytes_of_prediction_are_on_the_last_stage(checkpoint: Path, degrees: Degrees) -> None:
    """A decoder layer's and a few matrices, the embedding where the last stage has none, one layer of latent cache."""
    plain = read_model_config(checkpoint)
    config = with_prediction(plain)
    for rank in range(degrees.replica_ranks):
        place = degrees.place(rank)
        cached = kv_bytes_per_block(config, place, 4, 8) - kv_bytes_per_block(plain, place, 4, 8)
        assert cached == (4 * 26 * 8 if place.last_stage else 0)
        more = parameter_bytes(config, place, 8) - parameter_bytes(plain, place, 8)
        assert more > 2 * config.hidden_size**2 * 8 if place.last_stage else more == 0


def test_resident_bytes_are_those_of_the_table(checkpoint: Path) -> None:
    config, place = with_prediction(read_model_config(checkpoint)), Degrees().place(0)
    context = solo_context(CPU, torch.float64, FENCE.epoch)
    runner = new_runner(checkpoint, context, RunnerLimits(4, 64, 4), 8, predicts=True)
    assert runner.model.resident_bytes == parameter_bytes(config, place, 8)


def test_a_model_without_the_layer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    check_model_directory(checkpoint, predicts=True)
    with pytest.raises(ConfigError, match=r"num_nextn_predict_layers=0.*speculation=ngram"):
        check_model_directory(make_checkpoint(tmp_path / "llama"), predicts=True)
    directory = make_checkpoint(tmp_path / "cut", "deepseek-v3", **SHAPE)
    check_model_directory(directory)
    with pytest.raises(ConfigError, match=r"no file holds model\.layers\.3\.enorm\.weight"):
        check_model_directory(directory, predicts=True)


def changed(source: Path, target: Path, change: Callable[[str, NDArray[np.float32]], NDArray[np.float32]]) -> Path:
    """A copy of a checkpoint, its tensors changed by name."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    changes = {name: np.ascontiguousarray(change(name, part)) for name, part in weights.items()}
    save_file(changes, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_layer_whose_numbers_are_not_finite_spoils_guesses_alone(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever path and rules a row has, what is guessed is an id, and nobody's answer ends."""
    expected = Replica(checkpoint, max_running=8, kv_blocks=200).answer(several())
    poison = LAYER + "eh_proj.weight"
    directory = changed(checkpoint, tmp_path / "nan", lambda name, part: part * np.nan if name == poison else part)
    replica = Replica(directory, max_running=8, kv_blocks=200, speculation_tokens=1, predicts=True)
    check_same(replica.answer(several()), expected, within=WITHIN)
    assert replica.scheduler.counters["drafted_tokens"] > 0


def test_an_answer_may_fill_the_context_to_its_last_place(checkpoint: Path) -> None:
    """What is behind the last id has no place, and is not asked for."""
    for prompt in (MAX_CONTEXT - 1, MAX_CONTEXT - 9):
        assign = request("full", [5 + place % 90 for place in range(prompt)], MAX_CONTEXT - prompt, temperature=0.0)
        expected = Replica(checkpoint, kv_blocks=200).answer([assign])
        replica = Replica(checkpoint, kv_blocks=200, speculation_tokens=4, predicts=True)
        check_same(replica.answer([assign]), expected, within=WITHIN)


def test_a_shard_checkpoint_of_before_is_written_anew_with_the_layer(checkpoint: Path, tmp_path: Path) -> None:
    """And without it once more, when nobody asks for it any longer: a shard holds what its rank does."""
    plain = KeepingRank(checkpoint, tmp_path / "store", Degrees(pipeline=2).place(1))
    predicting = replace(plain, predicts=True)
    for rank, other in ((plain, predicting), (predicting, plain)):
        assert rank.keep().bytes > 0
        expected, _ = replace(rank, store=None).load()
        found, loaded = rank.load()
        assert loaded.origin == "shard" and any(name.startswith(LAYER) for name in found) == rank.predicts
        assert_same(found, expected)
        _, loaded = other.load()
        assert loaded.origin == "source" and "shard.json has model." in loaded.reason


def test_the_layer_is_read_in_8_bit_floats_as_it_is_published(checkpoint: Path, tmp_path: Path) -> None:
    """All its matrices are quantised but eh_proj, which is twice as wide as others."""
    directory = tmp_path / "float8"
    quantise_checkpoint(checkpoint, directory, (8, 8))
    names = quantised_names(with_prediction(read_model_config(checkpoint))) - {f"{LAYER}eh_proj.weight"}
    quantise_file(checkpoint / "model.safetensors", directory / "model.safetensors", names, (8, 8))
    check_model_directory(directory, predicts=True)
    stored = checkpoint_index(directory)
    assert f"{LAYER}self_attn.kv_b_proj.weight_scale_inv" in stored and f"{LAYER}eh_proj.weight_scale_inv" not in stored
    expected = Replica(directory).answer([greedy()])
    replica = Replica(directory, speculation_tokens=1, predicts=True)
    check_same(replica.answer([greedy()]), expected, within=WITHIN)
    assert replica.scheduler.counters["accepted_tokens"] > 10

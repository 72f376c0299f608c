"""The planner: planned bytes are the table's, forecasts are floors computed by hand, the best layout is the best."""

from __future__ import annotations

import itertools
import math
import re
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.plan.census import Census, take_census
from coordinator.plan.explain import decode_shares, rivals, why
from coordinator.plan.forecast import (
    Forecast,
    closed_round,
    decode_batch,
    forecast,
    prefill_batch,
    simulated_round,
)
from coordinator.plan.hardware import GPUS, Machines, nearest_gpu, wire
from coordinator.plan.memory import Limits, Load, load
from coordinator.plan.roofline import roofline
from coordinator.plan.search import Planner
from echelon.bench.cases import Case
from echelon.errors import ConfigError
from models.config import ModelConfig, read_model_config, with_prediction
from models.parameter import Parameter
from models.tables import held_parameters, kv_bytes_per_block, parameter_bytes, parameter_table, stage_layers
from parallel.context import solo_context
from parallel.degrees import Degrees, Place
from parallel.sharding import Blocks, Replicated, Split, SplitVocabulary
from tests.published import PUBLISHED, write_config, write_published
from worker.kv_cache import KVCache

H200 = GPUS["h200"]
DEGREE = st.sampled_from([1, 2, 4])


@cache
def published(name: str) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        return read_model_config(write_published(Path(folder), name), planning=True)


@cache
def census(name: str) -> Census:
    return take_census(published(name), 2, 2)


@st.composite
def small_models(draw: st.DrawFn) -> ModelConfig:
    """Models of few layers that 1, 2 and 4 ranks can split in every way, dense and with experts."""
    values: dict[str, object] = {
        "architectures": [draw(st.sampled_from(["LlamaForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"]))],
        "hidden_size": 8,
        "intermediate_size": 4 * draw(st.integers(1, 3)),
        "num_attention_heads": 4,
        "num_key_value_heads": draw(DEGREE),
        "head_dim": 2,
        "num_hidden_layers": draw(st.integers(4, 6)),
        "vocab_size": draw(st.integers(5, 13)),
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw(st.booleans()),
        "torch_dtype": "float32",
        "attention_bias": draw(st.booleans()),
    }
    if draw(st.booleans()):
        values |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": draw(st.sampled_from([4, 8])),
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "decoder_sparse_step": draw(st.sampled_from([1, 2])),
        }
    if draw(st.integers(0, 2)) == 0:
        values |= {
            "architectures": [draw(st.sampled_from(["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"]))],
            "attention_bias": False,
            "q_lora_rank": draw(st.sampled_from([None, 6])),
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 2,
            "v_head_dim": 3,
            "n_routed_experts": 8,
            "n_shared_experts": draw(st.integers(0, 2)),
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": draw(st.integers(0, 2)),
            "norm_topk_prob": False,
            "n_group": 2,
            "topk_group": 1,
            "num_nextn_predict_layers": draw(st.integers(0, 1)),
        }
    with tempfile.TemporaryDirectory() as folder:
        config = read_model_config(write_config(Path(folder), values), planning=True)
    return with_prediction(config) if config.prediction_layers else config


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ModelConfig, Degrees]:
    config = draw(small_models())
    pipeline, data, tensor = draw(DEGREE), draw(st.sampled_from([1, 2])), draw(DEGREE)
    expert = 1
    if any(layer.routing for layer in config.layers):
        expert = draw(st.sampled_from([e for e in (1, 2, 4) if data * tensor % e == 0]))
    return config, Degrees(pipeline=pipeline, data=data, tensor=tensor, expert=expert)


def places(degrees: Degrees) -> list[Place]:
    return [degrees.place(rank) for rank in range(degrees.replica_ranks)]


def shard(values: np.ndarray, parameter: Parameter, place: Place) -> np.ndarray:
    """What a rank keeps of a tensor, without padding."""
    return np.concatenate([values[region] for region in parameter.held_regions(place)], axis=0)


def copies(parameter: Parameter, degrees: Degrees) -> int:
    """How often the ranks of a stage hold each number of a tensor, by the rules of sharding."""
    if parameter.expert is not None:
        return 1
    if parameter.shared and (degrees.data > 1 or degrees.expert > 1):
        return degrees.stage_ranks
    placement = parameter.placement.placement if isinstance(parameter.placement, Blocks) else parameter.placement
    match placement:
        case Blocks():
            raise AssertionError("blocks of blocks")
        case Replicated():
            return degrees.stage_ranks
        case SplitVocabulary():
            return degrees.data
        case Split(_, sections):
            return degrees.data * max(1, degrees.tensor // min(sections))


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_ranks_hold_every_parameter_as_often_as_the_rules_say(layout: tuple[ModelConfig, Degrees]) -> None:
    config, degrees = layout
    holders: dict[str, list[Place]] = {}
    for place in places(degrees):
        for parameter in held_parameters(config, place):
            holders.setdefault(parameter.name, []).append(place)
    twice = (config.tie_word_embeddings or config.prediction is not None) and degrees.pipeline > 1
    for parameter in parameter_table(config):
        found = np.zeros(parameter.shape, dtype=int)
        for place in holders[parameter.name]:
            for region in parameter.held_regions(place):
                found[region] += 1
        stages = {place.pipeline_rank for place in holders[parameter.name]}
        assert len(stages) == (2 if twice and "embed_tokens" in parameter.name else 1), parameter.name
        if isinstance(parameter.placement, Split) and len(parameter.placement.sections) > 1:
            assert found.min() >= degrees.data * len(stages), parameter.name  # each section by a rule of its own
        else:
            assert (found == copies(parameter, degrees) * len(stages)).all(), parameter.name


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_shards_put_together_are_the_tensor(layout: tuple[ModelConfig, Degrees]) -> None:
    config, degrees = layout
    by_place = {place: set(held_parameters(config, place)) for place in places(degrees)}
    for parameter in parameter_table(config):
        values = np.arange(math.prod(parameter.shape)).reshape(parameter.shape)
        again = np.full(parameter.shape, -1)
        for place in (place for place, parameters in by_place.items() if parameter in parameters):
            held = shard(values, parameter, place)
            first = 0
            for region in parameter.held_regions(place):
                rows = region[0].stop - region[0].start
                again[region] = held[first : first + rows]
                first += rows
            assert first == len(held) <= parameter.held_shape(degrees)[0]
        assert (again == values).all(), parameter.name


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from([1, 2, 4]))
def test_planned_bytes_are_what_ranks_load(layout: tuple[ModelConfig, Degrees], size: int) -> None:
    config, degrees = layout
    counted = take_census(config, size, size)
    assert counted.cut(degrees.pipeline) == stage_layers(config, degrees.pipeline)
    held = load(counted, degrees, counted.cut(degrees.pipeline), Machines(gpu=H200, gpus=16), Limits(max_context=16))
    for place in places(degrees):
        stage = held.stages[place.pipeline_rank]
        assert stage.weight_bytes == parameter_bytes(config, place, size)
        assert stage.kv_bytes_per_token * 16 == kv_bytes_per_block(config, place, 16, size)


@pytest.mark.parametrize(
    ("name", "parameters", "for_each_token"),
    [
        ("qwen3-8b", 8_190_735_360, 7.57e9),
        ("mixtral-8x7b", 46_702_792_704, 12.75e9),
        ("qwen3-30b-a3b", 30_532_122_624, 3.04e9),
        ("deepseek-v2-lite", 15_706_484_224, 2.45e9),
        ("deepseek-r1", 671_026_419_200, 36.6e9),
    ],
)
def test_a_published_model_has_as_many_parameters_as_published(
    name: str, parameters: float, for_each_token: float
) -> None:
    assert census(name).parameters == pytest.approx(parameters, rel=1e-4)
    assert census(name).parameters_per_token == pytest.approx(for_each_token, rel=0.01)


def test_the_layer_of_prediction_has_as_many_parameters_as_published() -> None:
    """DeepSeek-V3 (2024): 14 B, copies of embedding and head included."""
    config = published("deepseek-r1")
    more = take_census(with_prediction(config), 2, 2).parameters - census("deepseek-r1").parameters
    assert more + 2 * config.vocab_size * config.hidden_size == pytest.approx(14e9, rel=0.05)


def test_latent_attention_caches_the_same_on_every_tensor_rank() -> None:
    """DeepSeek-V2 (2024), section 2.1: 512 compressed numbers and 64 rotated ones a token and layer."""
    for tensor in (1, 8):
        assert census("deepseek-r1").kv_bytes_per_token(Degrees(tensor=tensor), range(61)) == 61 * 576 * 2
    assert census("deepseek-r1").pair_flop(decode=True) == 2 * (576 + 512)
    assert census("deepseek-r1").pair_flop(decode=False) == 2 * (192 + 128)


def test_every_tensor_of_a_deepseek_checkpoint_is_named_as_there() -> None:
    names = {parameter.name for parameter in parameter_table(published("deepseek-r1"))}
    assert len(names) == len(parameter_table(published("deepseek-r1")))
    last = "model.layers.60"
    parts = {"input_layernorm", "post_attention_layernorm", "mlp.gate", "mlp.experts.255.up_proj"}
    parts |= {"mlp.shared_experts.down_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.q_b_proj"}
    assert {f"{last}.{part}.weight" for part in parts} <= names
    assert f"{last}.mlp.gate.e_score_correction_bias" in names
    assert not any("mlp.gate.weight" in name for name in names if name.startswith("model.layers.2."))
    lite = {parameter.name for parameter in parameter_table(published("deepseek-v2-lite"))}
    assert "model.layers.1.self_attn.q_proj.weight" in lite
    assert not any("q_a_proj" in name or "correction" in name for name in lite)


@pytest.mark.parametrize(
    ("name", "layers", "token_bytes"), [("deepseek-v2-lite", 27, 31_104), ("qwen3-8b", 36, 147_456)]
)
def test_the_cache_takes_what_is_planned(name: str, layers: int, token_bytes: int) -> None:
    config, block_tokens = published(name), 4
    assert census(name).kv_bytes_per_token(Degrees(), range(layers)) == token_bytes
    assert kv_bytes_per_block(config, Degrees().place(0), block_tokens, 2) == block_tokens * token_bytes
    cache = KVCache(config, solo_context(torch.device("cpu"), torch.bfloat16), 3, block_tokens)
    assert cache.resident_bytes == 3 * block_tokens * token_bytes
    padded = KVCache(config, solo_context(torch.device("cpu"), torch.bfloat16), 3, block_tokens, padded=True)
    assert padded.padding_block == 3 and len(padded.keys[0]) == 4, "one more, which no request can have"
    assert padded.resident_bytes == cache.resident_bytes


def found_for(name: str, degrees: Degrees, case: Case, **machine: int) -> tuple[Load, Forecast]:
    machines = Machines(gpu=H200, gpus=degrees.ranks, **machine)
    limits = Limits(max_context=case.tokens, requests=case.requests)
    held = load(census(name), degrees, census(name).cut(degrees.pipeline), machines, limits)
    return held, forecast(roofline(census(name), degrees, machines), held, limits, case)


@pytest.mark.parametrize(
    ("name", "degrees", "case", "floor_s"),
    [
        ("qwen3-8b", Degrees(), Case(1, 128, 256), 0.87),
        ("qwen3-8b", Degrees(), Case(64, 512, 128), 1.15),
        ("qwen3-8b", Degrees(tensor=2), Case(1, 128, 256), 0.60),
        ("qwen3-8b", Degrees(pipeline=2), Case(1, 128, 256), 0.87),
        ("deepseek-v2-lite", Degrees(), Case(1, 128, 256), 0.28),
        ("deepseek-v2-lite", Degrees(), Case(256, 1024, 256), 3.8),
    ],
    ids=str,
)
def test_a_forecast_is_the_floor_computed_by_hand(name: str, degrees: Degrees, case: Case, floor_s: float) -> None:
    """Qwen3-8B: 15.1 GB a step over 4.49 TB/s, 9 us for each of 72 all-reduces, 2 * 7 G products a token over 802
    TFLOP/s. V2-Lite: 4.9 GB a step for one request, 31 GB when all experts are touched, 31 KB of KV cache a token.
    """
    assert found_for(name, degrees, case)[1].total_s == pytest.approx(floor_s, rel=0.03)


def test_experts_are_read_when_tokens_choose_them() -> None:
    one, many = (found_for("mixtral-8x7b", Degrees(tensor=2), Case(n, 64, 64))[1].slots[0] for n in (1, 64))
    whole_s = 32 * 8 * 3 * 4096 * 14336 * 2 / 2 / 4.488e12
    assert one.experts == pytest.approx(whole_s * 2 / 8, rel=1e-3)
    assert many.experts == pytest.approx(whole_s, rel=1e-3)


def ring_s(count: float, ranks: int) -> float:
    return 9.3e-6 + count * (ranks - 1) / ranks / (450e9 * 0.73)


def test_ranks_exchange_hidden_states_and_rows_of_experts() -> None:
    """Four rows of 2,048 numbers each data rank: an all-reduce behind attention, and experts' rows there and back."""
    degrees = Degrees(data=2, tensor=2, expert=4)
    rates = roofline(census("qwen3-30b-a3b"), degrees, Machines(gpu=H200, gpus=4))
    held, _ = found_for("qwen3-30b-a3b", degrees, Case(8, 64, 64))
    hidden = 4 * 2048 * 2
    reduce_s, restore_s = ring_s(2 * hidden, 2), ring_s(hidden, 2)
    decode_s = 48 * (reduce_s + 2 * ring_s(2 * hidden, 4) + restore_s)
    assert rates.slot(held.stages[0], decode_batch(4, 96)).exchange == pytest.approx(decode_s)
    prefill_s = 48 * (reduce_s + 2 * ring_s(hidden / 2 * 4, 4) + restore_s)  # eight experts of four groups: four copies
    assert rates.slot(held.stages[0], prefill_batch(4, 4)).exchange == pytest.approx(prefill_s)


def test_a_dense_layer_reduces_twice_and_one_of_experts_on_one_group_too() -> None:
    for name, layers, hidden in (("qwen3-8b", 36, 4096), ("qwen3-30b-a3b", 48, 2048)):
        slot = found_for(name, Degrees(tensor=2), Case(4, 64, 64))[1].slots[0]
        assert slot.exchange == pytest.approx(2 * layers * ring_s(2 * 4 * hidden * 2, 2))


def test_a_window_bounds_what_is_read_and_multiplied() -> None:
    seen = decode_batch(3, 640.0).windowed(64)
    assert (seen.read_tokens, seen.pairs, seen.rows) == (64, 64, 3)
    prompt = prefill_batch(1280, 1280)
    assert prompt.windowed(64).pairs == pytest.approx(1280 * 64)
    assert prompt.windowed(None) == prompt.windowed(1280) == prompt


def test_the_chunks_of_a_prompt_follow_each_other_through_the_stages() -> None:
    held, found = found_for("qwen3-8b", Degrees(pipeline=2), Case(1, 3 * 2048, 8))
    rates = roofline(census("qwen3-8b"), Degrees(pipeline=2), Machines(gpu=H200, gpus=2))
    chunk = prefill_batch(2048, 3 * 2048)
    first, last = (rates.slot(stage, chunk).total for stage in held.stages)
    assert found.first_token_s == pytest.approx(first + last + 2 * max(first, last) + rates.way_s(chunk))


def test_a_stage_that_spans_nodes_exchanges_over_the_network() -> None:
    case = Case(64, 128, 128)
    near = found_for("qwen3-30b-a3b", Degrees(tensor=4), case)[1]
    far = found_for("qwen3-30b-a3b", Degrees(tensor=4), case, gpus_per_node=2)[1]
    assert far.slots[0].exchange > 2 * near.slots[0].exchange
    assert far.slots[0].experts == near.slots[0].experts


def test_groups_span_nodes_where_a_neighbour_is_on_another() -> None:
    machines = Machines(gpu=H200, gpus=16, gpus_per_node=8)
    assert [size for size in (1, 2, 4, 8, 16) if machines.spans_nodes(size, 16)] == [16]
    assert Machines(gpu=H200, gpus=12, gpus_per_node=6).spans_nodes(4, 12)


def test_a_ring_has_every_card_of_a_node_and_a_pair_has_one() -> None:
    machines = Machines(gpu=H200, gpus=16)
    far, near = wire(machines, 16, True), wire(machines, 8, False)
    assert far.bytes_s == 43e9
    assert far.ring_bytes_s == near.ring_bytes_s == pytest.approx(328.5e9)
    assert near.all_reduce_s(0) == 9.3e-6
    assert wire(machines, 1, False).all_reduce_s(1e9) == 0


SLOTS = st.lists(st.floats(1e-5, 1e-2), min_size=1, max_size=6)


@settings(deadline=None)
@given(SLOTS, st.integers(1, 6), st.floats(0, 1e-3))
def test_the_closed_form_of_a_round_is_what_the_simulator_does(
    slots_s: list[float], cohorts: int, way_s: float
) -> None:
    cohorts = min(cohorts, len(slots_s))
    simulated, closed = simulated_round(slots_s, cohorts, way_s), closed_round(slots_s, cohorts, way_s)
    assert simulated[0] == pytest.approx(closed[0], rel=1e-6)
    assert simulated[1] == pytest.approx(closed[1], abs=1e-6)


def planner(name: str, gpus: int, case: Case, max_context: int = 4096, gpu: str = "h200") -> Planner:
    limits = Limits(max_context=max_context, requests=case.requests)
    return Planner(census(name), Machines(gpu=GPUS[gpu], gpus=gpus), limits, case)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("latency", [False, True])
def test_the_first_of_a_ranking_is_the_best_of_all_that_fit(name: str, latency: bool) -> None:
    asked = planner(name, 16, Case(1 if latency else 512, 512, 128))
    plans = asked.rank({}, latency).plans
    degrees = [plan.degrees for plan in plans]
    assert len(set(degrees)) == len(degrees) and all(d.ranks == 16 for d in degrees)
    alone = [asked.plan(d).forecast for d in degrees]
    if latency:
        assert alone[0].total_s <= min(found.total_s for found in alone) * 1.001
    else:
        assert alone[0].output_tokens_s * 1.001 >= max(found.output_tokens_s for found in alone)


def test_a_ranking_keeps_the_degrees_that_were_given() -> None:
    plans = planner("qwen3-30b-a3b", 8, Case(64, 512, 128)).rank({"pipeline": 2, "expert": 2}, False).plans
    assert plans
    assert {(plan.degrees.pipeline, plan.degrees.expert) for plan in plans} == {(2, 2)}


def test_gpus_that_no_layout_fills_stay_unused() -> None:
    assert planner("qwen3-8b", 7, Case(64, 512, 128)).rank({"tensor": 2}, False).plans[0].degrees.ranks == 6


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (Degrees(tensor=3), "tensor=3 does not divide num_attention_heads=32"),
        (Degrees(pipeline=49), "49 ranks, and there are 16 GPUs"),
        (Degrees(tensor=2, expert=2), "expert=2"),
        (Degrees(replicas=8, tensor=4), "= 32 ranks, and there are 16 GPUs"),
    ],
    ids=str,
)
def test_a_layout_that_cannot_be_is_refused_with_what_can(degrees: Degrees, message: str) -> None:
    asked = planner("qwen3-8b", 16, Case(16, 128, 128))
    with pytest.raises(ConfigError) as caught:
        asked.plan(degrees)
    assert message in str(caught.value)
    assert "nearest that fit: --" in str(caught.value)
    for other in asked.nearest(degrees):
        assert asked.plan(other).degrees == other


def test_a_layout_that_memory_cannot_hold_is_refused_with_the_arithmetic() -> None:
    asked = planner("mixtral-8x7b", 8, Case(16, 128, 128), gpu="h100")
    with pytest.raises(ConfigError) as caught:
        asked.plan(Degrees(replicas=8))
    for part in ("80.0 GB * 0.9 - 93.4 GB of weights", "max-context 4096", "nearest that fit: --replicas 4"):
        assert part in str(caught.value)


def test_a_model_that_nothing_holds_is_refused_with_the_number_of_gpus() -> None:
    with pytest.raises(ConfigError, match=r"1 \* 80.0 GB \* 0.9 = 72.0 GB for 93.4 GB of weights.*; 2 such GPUs"):
        planner("mixtral-8x7b", 1, Case(16, 128, 128), gpu="h100").rank({}, False)


def test_a_context_that_nothing_holds_is_refused_with_one_that_fits() -> None:
    machines = Machines(gpu=replace(GPUS["h100"], memory_bytes=12e9), gpus=2)
    with pytest.raises(ConfigError) as caught:
        Planner(census("qwen3-8b"), machines, Limits(max_context=40960), Case(1, 64, 64)).plan(Degrees(tensor=2))
    found = re.search(r"--tensor 2 holds requests of --max-context (\d+) or less", str(caught.value))
    assert found, caught.value
    most = int(found[1])
    fitting = Planner(census("qwen3-8b"), machines, Limits(max_context=most), Case(1, 64, 64))
    assert fitting.plan(Degrees(tensor=2)).load.requests(most) == 1
    with pytest.raises(ConfigError):
        replace(fitting, limits=Limits(max_context=most + 1)).plan(Degrees(tensor=2))


def test_degrees_that_no_gpus_make_are_refused_as_such() -> None:
    with pytest.raises(ConfigError, match="no layout with --pipeline 2 --tensor 2 divides the model over 3 GPUs"):
        planner("qwen3-8b", 3, Case(1, 64, 64)).rank({"pipeline": 2, "tensor": 2}, False)


def test_requests_that_the_cache_cannot_hold_wait() -> None:
    asked = planner("qwen3-8b", 1, Case(2048, 1024, 256))
    found = asked.plan(Degrees()).forecast
    assert found.running == asked.plan(Degrees()).load.requests(1280) < 2048
    prefill_s = 2048 * 1024 / found.prefill_tokens_s
    assert found.total_s == pytest.approx(prefill_s + math.ceil(2048 / found.running) * 256 * found.round_s)


def test_shares_of_a_round_add_up_and_rivals_are_of_other_kinds() -> None:
    ranking = planner("qwen3-30b-a3b", 8, Case(512, 1024, 256)).rank({}, False)
    for plan in ranking.plans:
        shares = decode_shares(plan.forecast)
        parts = (shares.weights, shares.experts, shares.attention, shares.head, shares.exchange, shares.idle)
        assert sum(parts) == pytest.approx(1)
    kinds = [
        tuple(degree > 1 for degree in (d.replicas, d.pipeline, d.data, d.tensor))
        for d in (plan.degrees for plan in [ranking.plans[0], *rivals(ranking.plans)])
    ]
    assert all(one != other for one, other in itertools.combinations(kinds, 2))
    assert len(why(ranking, False)) == 1 + len(rivals(ranking.plans))


def test_a_gpu_is_known_by_its_memory() -> None:
    assert [nearest_gpu(memory).name for memory in (141e9, 80e9, 192e9)] == ["h200", "h100", "b200"]

"""A cluster whose matrices stay 8 bit floats answers as one that has dequantised them, and holds what was planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from echelon import SamplingParams
from echelon.testing import LocalCluster
from examples.quantize_fp8 import quantise_checkpoint
from tests.tiny import make_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.long]

ASKED = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True, logprobs=2)


def test_answers_stay_when_matrices_do(tmp_path: Path, ray_address: str) -> None:
    """Through a change of what serves, and of the layout; each tensor rank, and each with experts of its own."""
    source = make_checkpoint(tmp_path / "source", "deepseek-v3", moe_intermediate_size=32)
    quantise_checkpoint(source, tmp_path / "float8", (8, 8))
    prompt = "Geese fly so, cyclists ride so in a crosswind"
    with LocalCluster(tmp_path / "float8", dtype="float64", tensor=2, ray_address=ray_address) as cluster:
        expected = cluster.client().generate(prompt, sampling=ASKED)
        before = [rank.parameter_bytes for rank in cluster.status().ranks]
        for expert in (1, 2):
            now = cluster.reconfigure(float8="kept", expert=expert)
            assert all(rank.parameter_bytes == rank.planned_parameter_bytes for rank in now.ranks)
            if expert == 1:
                assert all(rank.parameter_bytes < was for rank, was in zip(now.ranks, before, strict=True))
            found = cluster.client().generate(prompt, sampling=ASKED)
            assert found.token_ids == expected.token_ids and len(found.token_ids) == 64
            assert [each.logprob for each in found.logprobs] == pytest.approx(
                [each.logprob for each in expected.logprobs], abs=1e-6
            )

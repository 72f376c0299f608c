"""A DeepSeek checkpoint of 8 bit floats over ranks, through the gRPC client: transformers on what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.degrees import Degrees
from tests.cluster.conftest import Case, Walker
from tests.cluster.layouts import DEEPSEEK_V3, Layout
from tests.cluster.reference import Reference
from tests.cluster.test_oracle import PROMPTS, assert_equals_transformers, greedy
from tests.quantised import make_quantised

pytestmark = [pytest.mark.cluster, pytest.mark.long]

BLOCK = (16, 11)  # whose edges are nobody's share


@pytest.mark.parametrize("degrees", [Degrees(tensor=2, expert=2), Degrees(pipeline=2, data=2)], ids=["expert", "data"])
def test_greedy_equals_transformers(
    degrees: Degrees, walker: Walker, tmp_path: Path, reference_of: Callable[[Path], Reference]
) -> None:
    float8, plain = make_quantised(tmp_path, "deepseek-v3", BLOCK, shards=2, **DEEPSEEK_V3)
    layout = Layout("deepseek-v3", degrees, DEEPSEEK_V3)
    case = Case("float8", walker.serve(float8, layout), reference_of(plain))
    for text in PROMPTS:
        assert_equals_transformers(case, text, greedy(case.cluster.client(), text))

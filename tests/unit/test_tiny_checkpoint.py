"""The tiny model that ships is what its card says: its size, its shape, its figures, and the same to everybody.

It is computed here on the beginning of one held-out document; `benchmarks/tiny_model.py` measures all of them.
"""

from __future__ import annotations

import json
import lzma
import math

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from echelon.cli.evaluate import read_texts
from examples.tiny.export import WEIGHTS, published
from examples.tiny.held_out import LICENCE, TEXT
from examples.tiny.model import TinyModel
from examples.tiny.shape import MOST_BYTES, Shape
from examples.tiny.texts import MODEL, held_out
from models.config import read_model_config
from models.files import check_model_directory
from models.registry import build_model
from parallel.context import solo_context
from tests.oracle.harness import BLOCK_TOKENS, NUM_BLOCKS, Driver, whole_steps
from worker.kv_cache import KVCache
from worker.loader import load_weights

DOCUMENT = "asyncio/subprocess.py"
TOKENS = BLOCK_TOKENS * NUM_BLOCKS - 6
REPORT = json.loads((MODEL / "report.json").read_text(encoding="utf-8"))
CARD = " ".join((MODEL / "README.md").read_text(encoding="utf-8").split())


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ids() -> list[int]:
    """Of held-out text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    found: list[int] = tokenizer(held_out()[DOCUMENT])["input_ids"][:TOKENS]
    assert len(found) == TOKENS
    return found


@pytest.fixture(scope="module")
def expected(ids: list[int]) -> Tensor:
    """transformers' log-probabilities, [tokens, vocabulary] float64."""
    theirs, loading = transformers.DeepseekV3ForCausalLM.from_pretrained(
        MODEL, dtype=torch.float64, experts_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    with torch.inference_mode():
        logits: Tensor = theirs(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def test_all_that_ships_fits() -> None:
    names = {path.name for path in MODEL.iterdir()}
    written = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}
    assert names == written | {"README.md", "report.json", "loss.png", TEXT, LICENCE}
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= MOST_BYTES
    assert sum((MODEL / name).stat().st_size for name in written) == REPORT["checkpoint_bytes"]


def test_it_has_the_shape_that_the_documentation_tells() -> None:
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config == Shape().config(config["bos_token_id"], config["eos_token_id"])
    check_model_directory(MODEL)
    expected = published(TinyModel(Shape()))
    with safe_open(MODEL / WEIGHTS, "pt") as file:
        names: list[str] = file.keys()
        found = {name: file.get_slice(name) for name in names}
        assert {name: tuple(part.get_shape()) for name, part in found.items()} == {
            name: tuple(tensor.shape) for name, tensor in expected.items()
        }
        wide = {name for name, part in found.items() if part.get_dtype() != "BF16"}
        assert all(torch.isfinite(file.get_tensor(name)).all() for name in found)
    assert wide == {name for name in expected if name.endswith("e_score_correction_bias")}


def test_the_tokenizer_tells_any_text() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    assert len(tokenizer) == Shape().vocab_size
    for text in (*held_out().values(), "Größe, размер, サイズ 📏\n\t\0"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_echelon_computes_what_transformers_computes(ids: list[int], expected: Tensor) -> None:
    context = solo_context(torch.device("cpu"), torch.float64)
    config = read_model_config(MODEL)
    built = build_model(config, context)
    load_weights(built, config, MODEL, context, lambda loaded_bytes, total_bytes: None)
    cache = KVCache(config, context, NUM_BLOCKS, BLOCK_TOKENS)
    with torch.inference_mode():
        (found,) = Driver(built, cache, context.tensor, [ids]).logprobs(whole_steps([TOKENS]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_it_foretells_held_out_text_better_than_xz_does(ids: list[int], expected: Tensor) -> None:
    """xz at its strongest, without its container; it has no more of the text than the model."""
    nats = -float(expected[:-1].gather(-1, torch.tensor(ids[1:])[:, None]).sum())
    text = transformers.AutoTokenizer.from_pretrained(MODEL).decode(ids[1:]).encode()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    packed = 8 * len(lzma.compress(text, lzma.FORMAT_RAW, filters=filters))
    assert nats / math.log(2) < packed / 2


def test_the_card_tells_the_report() -> None:
    told = (
        f"| perplexity per token | {REPORT['perplexity']:.3f} |",
        f"| bits per byte | {REPORT['bits_per_byte']:.3f} |",
        f"| busiest expert over the mean, worst layer | {REPORT['expert_max_over_mean']:.2f} |",
        f"{Shape().parameters / 1e6:.2f} million parameters",
        f"trained in {REPORT['minutes']:.1f} minutes on {REPORT['device']}",
    )
    assert [line for line in told if line not in CARD] == []
    assert REPORT["minutes"] < 20 and REPORT["bits_per_byte"] < REPORT["xz_bits_per_byte"] / 1.5
    assert not {"GPL", "MPL"} & set(CARD.replace("-", " ").split(" "))


def test_the_held_out_text_is_what_eval_reads() -> None:
    assert read_texts(MODEL / TEXT) == list(held_out().values())
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (MODEL / LICENCE).read_text(encoding="utf-8")

"""The tiny model's checkpoint is what transformers and Echelon load and compute, further tokens too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_layers import MtpModel

from examples.tiny.corpus import is_text
from examples.tiny.export import published, read_weights, round_weights, stored, write_model
from examples.tiny.model import TinyModel
from examples.tiny.shape import MOST_BYTES, Shape
from examples.tiny.sources import Document
from examples.tiny.tokens import learn_tokenizer
from examples.tiny.train import SHAPES
from models.config import read_model_config
from models.files import check_model_directory
from models.registry import build_model
from models.tables import parameter_bytes, parameter_table, stage_layers
from parallel.context import solo_context
from parallel.degrees import Degrees
from tests.oracle.harness import BLOCK_TOKENS, NUM_BLOCKS, Driver, whole_steps
from worker.kv_cache import KVCache
from worker.loader import load_weights

SHAPE = SHAPES["small"]
TOKENS = 70
NOISE = 2e-5  # of logits around 1 in float32


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> TinyModel:
    """Random, far enough from its start that every part tells."""
    made = TinyModel(SHAPE)
    made.initialise(1)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
        for mixture in made.mixtures:
            mixture.correction.copy_(0.1 * torch.randn(mixture.correction.shape, generator=random))
    round_weights(made)
    return made.eval()


@pytest.fixture(scope="module")
def directory(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("test_s*.py"))]
    tokenizer = learn_tokenizer([Document("here", "", text) for text in texts], SHAPE.vocab_size)
    write_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(2, SHAPE.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def logits(model: TinyModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        following, second = model.both_logits(tokens)
    return following[0], second[0]


def test_the_checkpoint_fits_the_repository() -> None:
    shape = Shape()
    made = TinyModel(shape)
    tensors = stored(published(made))
    assert sum(tensor.numel() for tensor in tensors.values()) == shape.parameters
    corrections = shape.routed_layers * shape.n_routed_experts
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert weights == 2 * (shape.parameters + corrections)
    assert weights + 400_000 < MOST_BYTES, "names in the file's header, and the tokenizer"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_shape_can_be_split_in_two_in_every_way(shape: Shape, tmp_path: Path) -> None:
    assert not shape.num_attention_heads % 2 and not shape.n_routed_experts % 2
    assert not shape.moe_intermediate_size % 16 and not shape.intermediate_size % 16
    transformers.DeepseekV3Config(**shape.config(0, 1)).save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    assert config.prediction_layers == 1
    assert stage_layers(config, 2) == ((range(4), range(4, 6)) if shape.layers == 6 else (range(2), range(2, 3)))
    for degrees in (Degrees(tensor=2, expert=2, pipeline=2), Degrees(data=2, expert=2)):
        held = [parameter_bytes(config, degrees.place(rank), 2) for rank in range(degrees.replica_ranks)]
        assert max(held) < 0.85 * parameter_bytes(config, Degrees().place(0), 2)


def test_transformers_computes_the_same(directory: Path, tokens: Tensor, logits: tuple[Tensor, Tensor]) -> None:
    theirs, loading = transformers.DeepseekV3ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert all(key.startswith(f"model.layers.{SHAPE.layers}.") for key in loading["unexpected_keys"])
    with torch.inference_mode():
        found = theirs(tokens).logits[0]
    assert logits[0].std() > 0.5
    torch.testing.assert_close(found, logits[0], rtol=0, atol=NOISE)


def test_transformers_predicts_the_same_further_tokens(
    directory: Path, tokens: Tensor, logits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for the number of DeepSeek-V3's own layer, and here is told ours."""
    kind = transformers.DeepseekV3ForCausalLM
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{SHAPE.layers}.*"])
    theirs = kind.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
    prediction = MtpModel.from_pretrained(theirs)
    with torch.inference_mode():
        hidden = theirs.model(tokens).last_hidden_state
        positions = torch.arange(1, TOKENS)[None]
        drafted = prediction.forward_layer(0, hidden[:, :-1], positions, None, input_ids=tokens[:, 1:])
        found = prediction._project_to_logits(drafted)[0]
    torch.testing.assert_close(found, logits[1], rtol=0, atol=NOISE)


def test_echelon_computes_the_same(directory: Path, tokens: Tensor, logits: tuple[Tensor, Tensor]) -> None:
    check_model_directory(directory)
    context = solo_context(torch.device("cpu"), torch.float32)
    config = read_model_config(directory)
    built = build_model(config, context)
    load_weights(built, config, directory, context, lambda loaded_bytes, total_bytes: None)
    cache = KVCache(config, context, NUM_BLOCKS, BLOCK_TOKENS)
    with torch.inference_mode():
        (found,) = Driver(built, cache, context.tensor, [tokens[0].tolist()]).logprobs(whole_steps([TOKENS]))
    torch.testing.assert_close(found, logits[0].double().log_softmax(-1), rtol=0, atol=NOISE)


def test_its_tensors_are_those_of_the_table_and_of_the_prediction(model: TinyModel, directory: Path) -> None:
    """The names that DeepSeek-V3 is published with, but for the two matrices that are the model's own."""
    table = {parameter.name for parameter in parameter_table(read_model_config(directory))}
    place = f"model.layers.{SHAPE.layers}."
    found = {name.removeprefix(place) for name in published(model) if name not in table}
    layer = {name.removeprefix("model.layers.1.") for name in table if name.startswith("model.layers.1.")}
    assert found == layer | {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    assert table <= published(model).keys()


def test_a_checkpoint_is_read_back_to_the_bit(model: TinyModel, directory: Path) -> None:
    again = TinyModel(SHAPE)
    read_weights(again, directory)
    for name, tensor in published(model).items():
        assert torch.equal(published(again)[name], tensor), name


def test_a_model_that_is_too_large_is_refused(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.tiny.export.MOST_BYTES", 100_000)
    tokenizer = learn_tokenizer([Document("here", "", Path(__file__).read_text())], 300)
    with pytest.raises(ValueError, match=re.compile("over 100000: a smaller shape")):
        write_model(model, tokenizer, tmp_path / "model")


def test_what_reads_as_text() -> None:
    line = "a line that is long enough to be one of text\n"
    assert is_text(10 * line)
    assert not is_text(line), "too short"
    assert not is_text(10 * line + "<|end_of_text|>")
    assert not is_text(10 * line + "x" * 500), "one long line"
    assert not is_text(100 * "0x7f, 0x80, 0x81, 0x82,\n"), "a table"

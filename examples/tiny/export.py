"""A tiny model as a checkpoint in Hugging Face's `deepseek_v3` format, and back.

Weights are rounded to bfloat16, but for the routers' corrections. The layer for multi-token prediction has the number
behind the last layer's, as DeepSeek publishes it; its embedding and head are the model's own and not written again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from examples.make_checkpoint import BEGIN, END, write_json
from examples.tiny.layers import Mixture
from examples.tiny.model import Layer, TinyModel
from examples.tiny.shape import MOST_BYTES
from examples.tiny.tokens import write_tokenizer

WEIGHTS = "model.safetensors"
PARTS = ("gate_proj", "up_proj", "down_proj")


def published(model: TinyModel) -> dict[str, Tensor]:
    """Every tensor by its published name; views of the model's own."""
    prediction, place = model.prediction, f"model.layers.{model.shape.layers}"
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        f"{place}.enorm.weight": prediction.enorm.weight,
        f"{place}.hnorm.weight": prediction.hnorm.weight,
        f"{place}.eh_proj.weight": prediction.eh_proj.weight,
        f"{place}.shared_head.norm.weight": prediction.norm.weight,
    }
    for number, layer in enumerate([*model.layers, prediction.layer]):
        assert isinstance(layer, Layer)
        tensors.update(_layer(f"model.layers.{number}", layer))
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _layer(place: str, layer: Layer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in layer.named_parameters():
        if not (isinstance(layer.mlp, Mixture) and name.startswith("mlp.")):
            yield f"{place}.{name}", parameter
    if isinstance(layer.mlp, Mixture):
        yield f"{place}.mlp.gate.weight", layer.mlp.gate
        yield f"{place}.mlp.gate.e_score_correction_bias", layer.mlp.correction
        yield from _experts(f"{place}.mlp", layer.mlp)


def _experts(place: str, mixture: Mixture) -> Iterator[tuple[str, Tensor]]:
    """Blocks of neurons by expert, the shared one's last."""
    experts = mixture.shape.n_routed_experts
    names = [*(f"{place}.experts.{expert}" for expert in range(experts)), f"{place}.shared_experts"]
    for part in PARTS:
        weight: Tensor = getattr(mixture.experts, part).weight
        blocks = weight.chunk(experts + 1, dim=1 if part == "down_proj" else 0)
        yield from ((f"{name}.{part}.weight", block) for name, block in zip(names, blocks, strict=True))


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As the file has them."""
    return {
        name: (tensor.float() if name.endswith("e_score_correction_bias") else tensor.bfloat16()).cpu().contiguous()
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def round_weights(model: TinyModel) -> None:
    """To what the checkpoint will hold, in place: what is measured then is what is shipped."""
    for name, tensor in published(model).items():
        if not name.endswith("e_score_correction_bias"):
            tensor.copy_(tensor.bfloat16())


@torch.no_grad()
def read_weights(model: TinyModel, directory: Path) -> None:
    """The weights of an exported checkpoint of the model's shape."""
    found = load_file(directory / WEIGHTS)
    for name, tensor in published(model).items():
        tensor.copy_(found[name])


def write_model(model: TinyModel, tokenizer: Tokenizer, directory: Path) -> int:
    """Config, tokenizer and weights; their bytes. Raises ValueError where they are more than the repository takes."""
    directory.mkdir(parents=True, exist_ok=True)
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    assert begin is not None and end is not None, "they are its special tokens"
    write_json(directory / "config.json", model.shape.config(begin, end))
    write_json(directory / "generation_config.json", {"bos_token_id": begin, "eos_token_id": end})
    write_tokenizer(tokenizer, directory, model.shape.context)
    save_file(stored(published(model)), directory / WEIGHTS, metadata={"format": "pt"})
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS)
    size = sum((directory / name).stat().st_size for name in names)
    if size > MOST_BYTES:
        raise ValueError(f"{directory}: {size} bytes, over {MOST_BYTES}: a smaller shape is needed")
    return size

"""Tiny DeepSeek-V3 checkpoints with a layer for multi-token prediction, as they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from models.config import read_model_config, with_prediction
from models.tables import parameter_table
from tests.tiny import YARN_ROPE, make_checkpoint

LAYER = "model.layers.3."  # that of prediction, behind three
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "routed_scaling_factor": 1.5,
    "rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.7},
}

Weights = dict[str, npt.NDArray[np.float32]]


def make_wild(directory: Path) -> Path:
    """One whose predictions are never right, and depend on all that came before."""
    return _save(directory, _random(directory))


def make_circle(directory: Path) -> Path:
    """One whose ids follow each other in a circle, mostly: the head's rows are the embedding's of the ids before, and
    layers change little. Its prediction passes the next id's embedding on, so that it mostly knows the circle too."""
    weights = _random(directory)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= np.float32(0.5)
    weights["lm_head.weight"] = np.roll(weights["model.embed_tokens.weight"], 1, axis=0)
    weights["model.embed_tokens.weight"] *= np.float32(8)
    project = weights[f"{LAYER}eh_proj.weight"]
    project[:, : len(project)] += np.eye(len(project), dtype=np.float32)
    return _save(directory, weights)


def _random(directory: Path) -> Weights:
    """Makes the checkpoint without the layer; returns all tensors, the layer's too."""
    make_checkpoint(directory, "deepseek-v3", **SHAPE)
    config, random = with_prediction(read_model_config(directory)), np.random.default_rng(7)
    weights: Weights = load_file(directory / "model.safetensors")
    for parameter in parameter_table(config):
        if parameter.name.startswith(LAYER):
            noise = random.standard_normal(parameter.shape, dtype=np.float32)
            norm = parameter.name.endswith("norm.weight")
            scale = np.float32(0.1 if norm else parameter.shape[-1] ** -0.5)
            weights[parameter.name] = np.float32(norm) + scale * noise
    return weights


def _save(directory: Path, weights: Weights) -> Path:
    """With the copies of embedding and head that the layer is published with."""
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    weights |= {LAYER + copy: weights[name] for copy, name in copies.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory

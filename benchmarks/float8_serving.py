"""A checkpoint of 8 bit floats, served with its matrices kept and dequantised: answers, tokens a second, bytes.

    python -m benchmarks.float8_serving [--config FILE] [--num-layers 3] [--cases 1x64x64,16x64x64,64x256x64]
    python -m benchmarks.float8_serving --device cpu --small        # that it runs at all

Writes random weights for the config (DeepSeek-V3's sizes with few layers, if none is given), quantises their matrices
in blocks of 128 x 128 and serves them, each way in its turn over the same processes. Answers are compared by ids before
the first difference and by log-probabilities; the cases are those of `echelon bench`, the best of two.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.layouts_figures import Answer, agreement
from benchmarks.layouts_session import ask
from echelon.bench.cases import Case
from echelon.bench.offline import run_case
from echelon.testing import LocalCluster
from examples.make_checkpoint import cut_config, small_config, write_checkpoint
from examples.quantize_fp8 import quantise_checkpoint
from models.config import read_model_config

WAYS = ("dequantised", "kept")
AT_ONCE = 16
# Of DeepSeek-V3's config.json, with an eighth of its experts, as a rank of eight has them.
LIKE_V3: Mapping[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "dtype": "bfloat16",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "vocab_size": 16384,
}


def measure(cluster: LocalCluster, cases: list[Case], vocabulary: int) -> tuple[list[Answer], dict[str, float], int]:
    """The answers, output tokens a second by case, and bytes of weights on a rank."""
    answers = asyncio.run(ask(cluster.target, vocabulary, AT_ONCE))
    rates = {}
    for case in cases:
        runs = [asyncio.run(run_case(cluster.target, case, vocabulary, seed)) for seed in range(3)][1:]
        rates[str(case)] = case.requests * case.output_tokens / min(run.total_s for run in runs)
    return answers, rates, cluster.status().ranks[0].parameter_bytes


def config_of(arguments: argparse.Namespace) -> dict[str, object]:
    if arguments.small:
        return {**small_config("deepseek-v3", hidden_size=256, num_layers=2, dtype="float32"), "vocab_size": 4096}
    found = json.loads(arguments.config.read_text()) if arguments.config else LIKE_V3
    return cut_config(found, arguments.num_layers)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="a config.json; default: like DeepSeek-V3's")
    parser.add_argument("--num-layers", type=int, help="the first ones alone; default: all")
    parser.add_argument("--small", action="store_true", help="a small model instead")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", default="1x64x64,16x64x64,64x256x64")
    parser.add_argument("--folder", type=Path, help="where it writes the checkpoints, 3 bytes a weight")
    parser.add_argument("--cuda-graphs", default="auto", choices=("auto", "off"))
    arguments = parser.parse_args()
    cases, config = [Case.parse(text) for text in arguments.cases.split(",")], config_of(arguments)
    vocabulary = int(str(config["vocab_size"]))
    with tempfile.TemporaryDirectory(prefix="float8-", dir=arguments.folder) as folder:
        plain, quantised = Path(folder, "plain"), Path(folder, "float8")
        write_checkpoint(plain, config, device=arguments.device)
        quantise_checkpoint(plain, quantised, (128, 128))
        found = {}
        flags = {"device": arguments.device, "dtype": read_model_config(plain).dtype, "max_context": 1024}
        flags["cuda_graphs"] = arguments.cuda_graphs
        with LocalCluster(quantised, float8=WAYS[0], start_timeout_s=300.0, **flags) as cluster:
            for way in WAYS:
                if way != WAYS[0]:
                    cluster.reconfigure(float8=way)
                found[way] = measure(cluster, cases, vocabulary)
                print(json.dumps({"float8": way, "tokens_per_s": found[way][1], "bytes": found[way][2]}), flush=True)
    report(found, cases)


def report(found: Mapping[str, tuple[list[Answer], dict[str, float], int]], cases: list[Case]) -> None:
    print(f"{'':14}{'GB':>8}" + "".join(f"{case!s:>14}" for case in cases))
    for way, (_, rates, held_bytes) in found.items():
        print(f"{way:14}{held_bytes / 1e9:8.2f}" + "".join(f"{rates[str(case)]:14.0f}" for case in cases))
    same = agreement(found["kept"][0], found["dequantised"][0])
    first = sum(a.ids[0] == b.ids[0] for a, b in zip(found["kept"][0], found["dequantised"][0], strict=True))
    print(
        f"{first} of {same.answers} first ids equal, {same.equal:.1%} of ids before a difference; log-probabilities "
        f"differ by {same.mean_difference:.4f} on average, {same.greatest_difference:.4f} at most"
    )


if __name__ == "__main__":
    main()

"""Compares the costs of matching and encoding at ViT-B/32: python -m benchmarks.matching --data DIR [--clips N]

The weights are random, and pictures and galleries come from a converted test split. Three compiled pieces are timed in
turn in float32, batch by batch: encoding; the self layer of an image; the keys and values of a clip and its scores
against its whole gallery. The report has the medians per clip and per image, and their sums over the whole list.
Decoding of pictures is not counted.
"""

import argparse
import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import default
from data_pipeline.format.reader import open_dataset
from data_pipeline.input.batches import clip_batches
from data_pipeline.system.command_line import parse_count
from data_pipeline.system.paths import parse_path
from rice_jax import errors
from rice_jax.config import Config
from rice_jax.models import arrays
from rice_jax.models.arrays import normalise
from rice_jax.models.rice import build_model
from rice_jax.retrieval import inference
from rice_jax.retrieval.galleries import AT_ONCE
from rice_jax.retrieval.model import frame_options
from rice_jax.training import step


def seconds(call: Callable[..., Any], *inputs: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call(*inputs))
    return time.perf_counter() - start


def gigamacs(config: Config, slots: int, gallery: float) -> dict[str, float]:
    """Returns thousands of millions of multiply-adds per clip and per image, by piece (docs/official.md 14).

    Keys and values count once per clip.
    """
    width, patch = config.model.width, config.model.patch_size
    patches = (config.data.image_size // patch) ** 2
    tokens, keys = patches + 1, slots * (patches + 1)
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    picture = 3 * patch**2 * patches * width + config.model.layers * block + width * config.model.embedding
    pair = 11 * width**2 + 2 * keys * width  # q, out_proj, MLP and pooler of one query, and its attention
    return {
        "encode_clip": slots * picture / 1e9,
        "encode_image": picture / 1e9,
        "self_layer_image": block / 1e9,
        "match_clip": (2 * keys * width**2 + gallery * pair) / 1e9,
    }


def main() -> None:
    """Prints the report and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=parse_path, required=True, help="a converted data set; its test split is used")
    parser.add_argument(
        "--clips", type=parse_count, default=48, help="number of clips to time, evenly spaced in the list"
    )
    parser.add_argument(
        "--batch_size", type=parse_count, default=8, help="clips at once, with ten times as many pictures"
    )
    parser.add_argument("--output", type=parse_path, default=Path("build/benchmarks/matching.json"))
    arguments = parser.parse_args()
    if arguments.clips < arguments.batch_size:
        parser.error(f"--clips: found {arguments.clips}, needs at least --batch_size {arguments.batch_size}")

    config, size = default.get_config(), arguments.batch_size
    split = open_dataset(arguments.data).split("test")
    slots = config.data.eval_num_frames
    galleries = [np.asarray(split.galleries[name]) for name in sorted(split.galleries)]
    number_of = {name: number for number, name in enumerate(sorted(split.galleries))}
    gallery_of = np.array([number_of[split.gallery_name(row)] for row in range(split.num_clips)])
    pairs = sum(len(galleries[gallery]) for gallery in gallery_of)
    images = len(np.unique(np.concatenate([galleries[gallery] for gallery in np.unique(gallery_of)])))

    net = build_model(config)
    params = jax.jit(lambda: step.init_params(net, config, step.random_key(0)))()
    at_once = AT_ONCE
    longest = -(-max(map(len, galleries)) // at_once) * at_once
    gallery_rows = np.full((len(galleries), longest), split.num_images, np.int32)  # padded
    for padded, gallery in zip(gallery_rows, galleries, strict=True):
        padded[: len(gallery)] = gallery
    class_tokens = jnp.zeros((split.num_images + 1, config.model.width))

    @jax.jit
    def encode(params: Any, pictures: jax.Array) -> Any:
        return arrays.apply(net.encoder, params["encoder"], normalise(pictures))

    @jax.jit
    def self_layer(params: Any, tokens: jax.Array) -> Any:
        return arrays.apply(net.decoder, params["decoder"], tokens, method="image_tokens")[:, 0]

    @jax.jit
    def match(params: Any, tokens: jax.Array, mask: jax.Array, gallery: jax.Array, count: jax.Array) -> Any:
        keys_values = arrays.apply(net.decoder, params["decoder"], tokens, method="keys_values")
        key_mask = jnp.repeat(mask > 0, tokens.shape[1] // slots, axis=1)
        return inference.gallery_scores(
            net, False, at_once, params, class_tokens, gallery, count, keys_values, key_mask
        )

    rows = np.linspace(0, split.num_clips - 1, arguments.clips).astype(int)
    rows = rows[: len(rows) // size * size]
    options = frame_options(config.data, train=False)
    timed: dict[str, list[float]] = {"encode_clip": [], "self_layer_image": [], "match_clip": []}
    with clip_batches(split, rows, options, size) as batches:
        for number, batch in enumerate(batches):
            pictures = jnp.asarray(batch["frames"].reshape(size * slots, *batch["frames"].shape[2:]))
            chosen = gallery_of[batch["row"]]
            count = np.int32(-(-max(len(galleries[gallery]) for gallery in chosen) // at_once))
            tokens = encode(params, pictures)[0]
            by_clip = tokens.reshape(size, -1, tokens.shape[-1])
            score = functools.partial(match, params, by_clip, jnp.asarray(batch["mask"]), gallery_rows[chosen], count)
            if number == 0:  # compiles
                jax.block_until_ready((score(), self_layer(params, tokens)))
            timed["encode_clip"].append(seconds(encode, params, pictures) / size)
            timed["self_layer_image"].append(seconds(self_layer, params, tokens) / len(pictures))
            timed["match_clip"].append(seconds(score) / size)

    each = {name: float(np.median(values)) for name, values in timed.items()}
    each["encode_image"] = each["encode_clip"] / slots
    work = gigamacs(config, slots, pairs / split.num_clips)
    cost = {
        unit: {
            "encoding": split.num_clips * of["encode_clip"] + images * of["encode_image"],
            "matching": split.num_clips * of["match_clip"] + images * of["self_layer_image"],
        }
        for unit, of in (("seconds", each), ("gigamacs", work))
    }
    report = {
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
        "model": "ViT-B/32, random weights",
        "dtype": "float32",
        "list": {"clips": split.num_clips, "slots": slots, "images": images, "pairs": pairs},
        "timed": {"clips": len(rows), "batch_size": size},
        "seconds_each": each,
        "gigamacs_each": work,
        "list_cost": cost,
        "matching_over_encoding": {unit: both["matching"] / both["encoding"] for unit, both in cost.items()},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    errors.run(lambda _: main(), None)

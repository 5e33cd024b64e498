"""Compares one picture in a loaded model with a model of batch size 1: taskset -c 0 python -m benchmarks.one_image

The weights are random. For each --config a model of its eval_batch_size and one of batch size 1 are called in turn: one
shop image through encode_images, one clip of eval_num_frames through encode_clips and, if the config has PMD, this clip
through match with --gallery shop images. The report has the medians and their ratios.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import turns
from data_pipeline.system.command_line import parse_count
from data_pipeline.system.paths import parse_path
from rice_jax.config import load_config
from rice_jax.errors import run
from rice_jax.models.rice import build_model
from rice_jax.parallel.mesh import make_mesh
from rice_jax.retrieval.model import Model
from rice_jax.training import step


def compare(name: str, gallery: int, repeats: int) -> dict[str, Any]:
    """Returns seconds of each call at both batch sizes, and the ratios of the first to those at batch size 1."""
    config = load_config(name)
    net, mesh = build_model(config), make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    params = step.init_state(net, config, step.abstract_state(net, config, mesh)).params
    whole = Model(config, net, params, mesh, batch_size=config.eval_batch_size)
    models = {f"batch_size {whole.batch_size}": whole, "batch_size 1": dataclasses.replace(whole, batch_size=1)}
    side, rng = config.data.image_size, np.random.default_rng(0)
    images = rng.integers(0, 256, (gallery, side, side, 3), np.uint8)
    frames = rng.integers(0, 256, (1, config.data.eval_num_frames, side, side, 3), np.uint8)
    inputs = {"encode_images": (images[:1],), "encode_clips": (frames,), "match": (frames, None, images)}
    report: dict[str, Any] = {}
    for call in [*inputs][: 3 if whole.can_match else 2]:
        candidates = {
            size: lambda model=model, call=call: getattr(model, call)(*inputs[call]) for size, model in models.items()
        }
        seconds = turns.in_turn(candidates, repeats)
        report[call] = {"seconds": seconds, "ratio": turns.ratio(*seconds.values())}
    return report


def main(arguments: argparse.Namespace) -> None:
    report = {name: compare(name, arguments.gallery, arguments.repeats) for name in arguments.config}
    turns.write_report(arguments.output, {"gallery": arguments.gallery, "models": report})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.one_image", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", nargs="+", default=["grocery", "pod:b32"], help="shipped configs or files")
    parser.add_argument("--gallery", type=parse_count, default=5, help="shop images of match (default: 5)")
    parser.add_argument("--repeats", type=parse_count, default=10)
    parser.add_argument("--output", type=parse_path, default=Path("build/benchmarks/one_image.json"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse())

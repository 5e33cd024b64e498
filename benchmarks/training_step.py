"""Compares our training step with the official one in PyTorch: python -m benchmarks.training_step [--size NAME ...]

Both first do three updates from the same random weights, and losses, gradient and parameters must agree. Then both are
timed in turn on the same cores (`taskset -c 0` leaves one). Neither has dropout, so both compute the same numbers. Ours
gets levels 0..255 and normalises them, and PyTorch gets normalised floats. Needs `pip install 'rice_jax[torch]'`.
"""

import os

# PyTorch's threads then sleep while they wait for one another. On a busy machine they would only spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from benchmarks import turns
from configs import default
from data_pipeline.system.command_line import parse_count
from data_pipeline.system.paths import parse_path
from rice_jax.config import Config
from rice_jax.errors import run
from rice_jax.models import arrays as arrays_module
from rice_jax.models.rice import build_model
from rice_jax.parallel.mesh import make_mesh, to_global
from rice_jax.training import step
from rice_jax.weights import naming

if TYPE_CHECKING:
    from benchmarks.official_step import OfficialStep

SIZES: dict[str, dict[str, int]] = {  # changes of the default config, which is official
    "tiny": {"batch_size": 4, "data.num_frames": 2, "data.image_size": 32, "model.patch_size": 16, "model.width": 32,
             "model.layers": 1, "model.heads": 2, "model.hidden": 64, "model.embedding": 16, "model.decoder_heads": 2},
    "small": {"batch_size": 64, "data.num_frames": 2, "data.image_size": 64, "model.patch_size": 16, "model.width": 192,
              "model.layers": 4, "model.heads": 3, "model.hidden": 768, "model.embedding": 128,
              "model.decoder_heads": 3},
    "vit_b_32": {"batch_size": 4, "data.num_frames": 2},
}  # fmt: skip
AGREEMENT = {"loss": 1e-4, "gradient": 1e-4, "parameters": 1e-2}  # limits of `differences`


def sized(size: str) -> Any:
    """Returns the config of a size. Its rates let two updates move the parameters far enough to compare them."""
    config = default.get_config()
    for field, value in SIZES[size].items():
        section, _, leaf = field.rpartition(".")
        (config[section] if section else config)[leaf] = value
    config.loss.cross_dropout = 0.0
    config.optimizer.learning_rate, config.optimizer.decoder_lr_multiplier = 1e-4, 10.0
    config.optimizer.warmup_updates, config.num_updates = 2, 1000
    return config


def draw(config: Config) -> dict[str, np.ndarray]:
    """Returns a batch of smooth pictures in different colours. The last clip has one frame, the others fill all slots.

    With noise as pictures all embeddings would be nearly equal, and rounding would decide which clips are hard.
    """
    rng = np.random.default_rng(0)
    count, slots, side = config.batch_size, config.data.num_frames, config.data.image_size
    coarse = rng.integers(0, 256, (count, slots + 1, 4, 4, 3), np.uint8)
    pictures = coarse.repeat(side // 4, axis=2).repeat(side // 4, axis=3)
    mask = np.ones((count, slots), np.int32)
    mask[-1, 1:] = 0
    order = np.arange(count, dtype=np.int32)
    return {"frames": pictures[:, 1:], "mask": mask, "image": pictures[:, 0], "product": order, "index": order}


class Ours:
    """Our jitted step with its state."""

    def __init__(self, config: Config, batch: Mapping[str, np.ndarray]) -> None:
        net, mesh = build_model(config), make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
        abstract = step.abstract_state(net, config, mesh)
        self.state = step.init_state(net, config, abstract)
        self.step = step.make_train_step(net, config, mesh, abstract)
        self.batch = to_global(batch, mesh)

    def update(self) -> dict[str, float]:
        self.state, metrics = self.step(self.state, self.batch)
        return {name: float(metrics[name]) for name in ("icl", "pmd", "pfr")}

    def parameters(self) -> dict[str, np.ndarray]:
        return by_official_name(self.state.params)

    def momentum(self) -> dict[str, np.ndarray]:
        return by_official_name(optax.tree.get(self.state.opt_state, "mu"))


def by_official_name(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in naming.invert(naming.flattened(jax.device_get(tree))).items()}


def torch_step(
    config: Config, tensors: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]
) -> tuple["OfficialStep", Any]:
    """Returns the step in PyTorch with these parameters, and the batch as tensors for it."""
    import torch

    from benchmarks.official_step import OfficialStep

    torch.set_num_threads(turns.cores())
    normalise = jax.jit(arrays_module.normalise)
    arrays = {
        "video": np.asarray(normalise(batch["frames"], batch["mask"])).transpose(0, 1, 4, 2, 3),
        "image": np.asarray(normalise(batch["image"])).transpose(0, 3, 1, 2),
        "mask": batch["mask"],
    }
    return OfficialStep(tensors, config), {name: torch.tensor(array.copy()) for name, array in arrays.items()}


def differences(ours: Ours, official: "OfficialStep", inputs: Any) -> dict[str, float]:
    """Returns the differences of the two over three updates; the first has rate 0 (docs/official.md 7.4).

    loss: the largest absolute difference of a loss. gradient: the largest difference in the first update over the
    largest entry of its tensor, or over 0.01 if that is larger (a bias before a softmax has only rounding as gradient).
    parameters: the norm of the difference over the norm of the movement, for all tensors together, because Adam turns
    the noise of a single entry into a whole step.
    """
    start, loss, gradient = ours.parameters(), 0.0, 0.0
    for number in range(3):
        a, b = ours.update(), official.update(inputs)
        loss = max(loss, *(abs(a[name] - b[name]) for name in a))
        if number == 0:
            for name, mine in ours.momentum().items():
                theirs = official.moments[name][0].numpy()  # the gradient times 1 - b1 = 0.1
                gradient = max(gradient, float(np.abs(mine - theirs).max() / max(1e-3, np.abs(theirs).max())))
    apart = moved = 0.0
    for name, mine in ours.parameters().items():
        apart += float(np.square(mine - official.parameters[name].detach().numpy(), dtype=np.float64).sum())
        moved += float(np.square(mine - start[name], dtype=np.float64).sum())
    return {"loss": loss, "gradient": gradient, "parameters": (apart / moved) ** 0.5}


def compare(size: str, repeats: int) -> dict[str, Any]:
    """Returns sizes, differences, seconds and their ratio. Raises ValueError if the differences exceed AGREEMENT."""
    config = sized(size)
    batch = draw(config)
    ours = Ours(config, batch)
    official, inputs = torch_step(config, ours.parameters(), batch)
    gaps = differences(ours, official, inputs)
    if not all(gaps[name] <= AGREEMENT[name] for name in gaps):
        raise ValueError(f"{size}: the two steps differ by {gaps}, needs at most {AGREEMENT}; correct one of them.")
    seconds = turns.in_turn({"torch": lambda: official.update(inputs), "ours": ours.update}, repeats)
    return {
        "sizes": SIZES[size],
        "differences": gaps,
        "seconds": seconds,
        "times_faster": turns.ratio(seconds["torch"], seconds["ours"]),
    }


def main(arguments: argparse.Namespace) -> None:
    import torch

    steps = {size: compare(size, arguments.repeats) for size in arguments.size}
    turns.write_report(
        arguments.output,
        {"torch": torch.__version__, "dtype": "float32", "repeats": arguments.repeats, "steps": steps},
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.training_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small", "vit_b_32"])
    parser.add_argument("--repeats", type=parse_count, default=5)
    parser.add_argument("--output", type=parse_path, default=Path("build/benchmarks/training_step.json"))
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("torch") is None:
        parser.exit(2, "error: torch is not installed; pip install 'rice_jax[torch]'\n")
    return arguments


if __name__ == "__main__":
    run(main, parse())

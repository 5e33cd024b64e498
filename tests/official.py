"""Golden files of the official code as our model, parameters and batch; nothing here knows their sizes or names."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import default
from rice_jax import losses, model, sharding, weights


def loss_options(**changes: Any) -> Any:
    """The config's loss section, without dropout, as the golden figures were made."""
    options = default.get_config().loss
    options.unlock()
    options.cross_dropout = 0.0
    options.update(changes)
    return options


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])


def mesh_of(data: int, fsdp: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])


@dataclasses.dataclass
class Golden:
    arrays: dict[str, np.ndarray]
    net: model.Rice
    params: Any
    batch: dict[str, jax.Array]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): array for name, array in self.arrays.items() if name.startswith(prefix)}

    def loss(self, mesh: jax.sharding.Mesh | None = None, **options: Any) -> Any:
        mesh = mesh or one_device()
        return losses.make_loss(self.net, loss_options(**options), mesh, sharding.parameter_specs(self.params, mesh))


def load(path: Path) -> Golden:
    """A golden file; sizes are read off its arrays (heads of the encoder: D/64, of the decoder: rec's inputs)."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    tensors = {name.removeprefix("param/"): array for name, array in arrays.items() if name.startswith("param/")}
    params = jax.tree.map(jnp.asarray, weights.convert(tensors))
    patch, _, _, width = params["encoder"]["conv1"]["kernel"].shape
    heads, hidden = params["reconstruction"]["conv1_kernel"].shape[0], params["decoder"]["cross_layer"]["mlp"]["c_fc"]
    images = arrays["in/image"].transpose(0, 2, 3, 1)
    encoder = model.VisionTransformer(
        image_size=images.shape[1],
        patch_size=patch,
        width=width,
        layers=params["encoder"]["resblocks"]["ln_1"]["scale"].shape[0],
        heads=width // 64,
        hidden=params["encoder"]["resblocks"]["mlp"]["c_fc"]["bias"].shape[1],
        embedding=params["encoder"]["proj"].shape[1],
    )
    decoder = model.MatchingDecoder(width=width, heads=heads, hidden=hidden["bias"].shape[0])
    net = model.Rice(encoder, decoder, model.PatchReconstruction(heads=heads, head_width=width // heads))
    batch = {
        "image": images,
        "frames": arrays["in/video"].transpose(0, 1, 3, 4, 2),
        "mask": arrays["in/video_temporal_mask"].astype(np.int32),
        "product": np.arange(len(images), dtype=np.int32),
        "index": np.arange(len(images), dtype=np.int32),
    }
    return Golden(arrays, net, params, jax.tree.map(jnp.asarray, batch))


def largest_gap(ours: Any, theirs: Any) -> dict[str, float]:
    """Per leaf: the largest difference over the largest entry (SPEC 13.3)."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)), ours, theirs)
    return {sharding.path_name(path): gap for path, gap in jax.tree_util.tree_leaves_with_path(gaps)}

"""From a model and a converted split to ranks: encode every picture once, rank each clip in its own gallery."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Shaped, UInt8

from data_pipeline.input.decode import centre_crop, load_picture
from data_pipeline.input.options import FrameOptions
from rice_jax.checkpoints.run_folder import read_config
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import EVALUATED, from_json, override
from rice_jax.models.rice import Rice, build_model
from rice_jax.parallel import hosts
from rice_jax.parallel.mesh import P, make_mesh, on_host, path_name, process_rows, to_global
from rice_jax.retrieval import inference
from rice_jax.retrieval.galleries import GalleryScorer
from rice_jax.training.step import abstract_state


def frame_options(data: Any, *, train: bool) -> FrameOptions:
    """The config's `data` section as the pipeline takes it; evaluation has its own number of frame slots."""
    names = {field.name for field in dataclasses.fields(FrameOptions)}
    options = {name: value for name, value in data.items() if name in names}
    return FrameOptions(**options | {"num_frames": data.num_frames if train else data.eval_num_frames})


def _prepared(picture: str | Path | bytes, place: int, options: FrameOptions) -> UInt8[np.ndarray, "px px 3"]:
    data, name = (picture, f"picture {place}") if isinstance(picture, bytes) else (Path(picture).read_bytes(), picture)
    try:
        return centre_crop(load_picture(data, options, train=False), options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from error


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _on_mesh(
    function: Callable[..., Any], mesh: Mesh, net: Rice, static: tuple[Any, ...], params: Any, *arrays: Array
) -> list[Array]:
    """What function(net, *static, params, *arrays) gives, on every device; parameters are gathered once, before it."""
    whole = NamedSharding(mesh, P())
    results = function(net, *static, jax.lax.with_sharding_constraint(params, whole), *arrays)
    return jax.tree.leaves(jax.lax.with_sharding_constraint(results, whole))


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model that turns NumPy pictures into unit vectors; the cosine of two says how well they match.

    Attributes:
      config: the run's config.
      net: the Flax modules.
      params: their parameters, on the devices of `mesh`.
      batch_size: clips encoded at once, over all devices; any number may be passed, the rest of a batch is padded.
      step: updates that the parameters have seen.
    """

    config: Any
    net: Rice
    params: Any
    mesh: Mesh
    batch_size: int
    step: int = 0

    def prepare(self, pictures: Iterable[str | Path | bytes]) -> UInt8[np.ndarray, "n px px 3"]:
        """Pictures as evaluation sees them: decoded, resized, the middle of px x px, px = config.data.image_size.

        Args:
          pictures: JPEG, PNG or WebP, each a path or the file's bytes.

        Raises:
          OSError, ValueError: no file, or no picture; names it by path or place.
        """
        if isinstance(pictures, str | Path | bytes):
            raise TypeError("prepare takes several pictures; give [picture].")
        options = frame_options(self.config.data, train=False)
        prepared = [_prepared(picture, place, options) for place, picture in enumerate(pictures)]
        return np.array(prepared, np.uint8).reshape(-1, options.image_size, options.image_size, 3)

    def encode_clips(
        self, frames: Shaped[np.ndarray, "n N px px 3"], mask: Shaped[np.ndarray, "n N"] | None = None
    ) -> Float[np.ndarray, "n E"]:
        """Embeddings of clips: float32, unit length.

        Args:
          frames: uint8, RGB levels, px = config.data.image_size, any number N of slots (another N compiles anew).
          mask: 1 for a frame, 0 for an empty slot, at least one frame a clip; None: every slot has a frame.

        Raises:
          ValueError: another picture size, or a clip without a frame.
        """
        frames, mask = self._check_clips(frames, mask)
        return self._batched(functools.partial(self.run, inference.encode_clips), frames, mask)[0]

    def encode_images(self, images: Shaped[np.ndarray, "n px px 3"]) -> Float[np.ndarray, "n E"]:
        """Embeddings of shop images: float32, unit length. Pictures as in encode_clips."""
        images = self._check(images, axes=4)
        return self._batched(functools.partial(self.run, inference.encode_images), images)[0]

    def match(
        self,
        frames: Shaped[np.ndarray, "n N px px 3"],
        mask: Shaped[np.ndarray, "n N"] | None,
        images: Shaped[np.ndarray, "m px px 3"],
        *,
        raw: bool = False,
    ) -> Float[np.ndarray, "n m"]:
        """How well each clip shows each shop image, by the matching decoder (SPEC 10.4): float32, -1 to 1.

        Every picture is encoded once a call; after that a pair is cheap, a warehouse of pairs is not.

        Args:
          frames, mask: clips as in encode_clips.
          images: pictures as in encode_images.
          raw: h . w in place of its cosine, of any size.

        Raises:
          ValueError: as in encode_clips, or a model without a decoder.
        """
        check_decoder(self)
        frames, mask = self._check_clips(frames, mask)
        images = self._check(images, axes=4)
        class_tokens = self._batched(functools.partial(self.run, inference.image_queries), images)[1]
        shelves = GalleryScorer(self.run, self.mesh, class_tokens, [np.arange(len(images))], raw=raw)
        everyone = np.zeros(self.batch_size, np.int64)
        return self._batched(functools.partial(shelves.score, everyone), frames, mask)[1][:, : len(images)]

    def run(self, function: Callable[..., Any], *arrays: Any, more: tuple[Any, ...] = ()) -> list[Array]:
        """Applies a function of rice_jax.retrieval.inference, compiled, to arrays on devices; `more`: its options."""
        return _on_mesh(function, self.mesh, self.net, (self.config.eval_flip, *more), self.params, *arrays)

    @property
    def can_match(self) -> bool:
        """Whether PMD trained its decoder: PFR alone leaves the matching head as it was born."""
        return self.net.decoder is not None and bool(self.config.loss.pmd)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the parameters: equal models have equal ones, whatever folder they come from."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(f"{path_name(path)} {leaf.dtype} {leaf.shape} ".encode())
            digest.update(np.ascontiguousarray(on_host(leaf)).tobytes())
        return digest.hexdigest()[:16]

    def _check(self, pictures: np.ndarray, *, axes: int) -> np.ndarray:
        pictures, size = np.asarray(pictures), self.config.data.image_size
        if pictures.ndim != axes or pictures.shape[-3:] != (size, size, 3):
            raise ValueError(f"pictures of shape {pictures.shape}: need {axes} axes ending in ({size}, {size}, 3).")
        if pictures.dtype != np.uint8:
            raise ValueError(f"pictures of {pictures.dtype}: need uint8, RGB levels 0 to 255.")
        return pictures

    def _check_clips(self, frames: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        frames = self._check(frames, axes=5)
        mask = np.ones(frames.shape[:2], np.int32) if mask is None else np.asarray(mask)
        if mask.shape != frames.shape[:2] or not np.isin(mask, (0, 1)).all() or not mask.any(axis=1).all():
            raise ValueError(
                f"mask {mask.shape}: needs a row of 0 and 1, with at least one 1, for each of frames {frames.shape}."
            )
        return frames, mask.astype(np.int32)

    def _batched(self, call: Callable[..., list[Array]], *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """call(*rows on the devices) for all rows, batch_size at a time; of no rows the results' shapes alone."""
        own = process_rows(self.batch_size, self.mesh)
        out = []
        for start in range(0, max(1, len(arrays[0])), self.batch_size):
            part = [a[start : start + self.batch_size] for a in arrays]
            missing = self.batch_size - len(part[0])
            fill = [a[:1] if len(a) else np.ones((1, *a.shape[1:]), a.dtype) for a in part]
            padded = [np.concatenate([a, np.repeat(f, missing, axis=0)]) for a, f in zip(part, fill, strict=True)]
            results = call(*to_global([a[own] for a in padded], self.mesh))
            out.append([np.asarray(result)[: len(part[0])] for result in results])
        return tuple(np.concatenate(parts) for parts in zip(*out, strict=True))


def check_decoder(m: Model) -> None:
    """ValueError for a model that never learned to match: only an encoder, or a decoder without its matching head."""
    if not m.can_match:
        found = "no decoder (loss.pmd and loss.pfr are 0" if m.net.decoder is None else "not learned it (loss.pmd is 0"
        raise ValueError(
            f"matching: this model has {found} in its config); train one with a PMD loss, or rank by --score embedding."
        )


def load(
    run: str | Path, *, step: int | None = None, mesh: Mesh | None = None, overrides: Mapping[str, str] | None = None
) -> Model:
    """The model of a training run: `model = rice_jax.load("runs/grocery")`.

    Args:
      run: the training's workdir.
      step: a checkpoint's number of updates; the newest that is whole unless given.
      mesh: where the parameters go; all devices unless given.
      overrides: fields of the config that do not touch the weights, such as {"eval_flip": "true"}.

    Raises:
      FileNotFoundError: no run, no checkpoint, or none of that step.
      ValueError: a damaged checkpoint or config, or an override of a field that the model was trained with.
    """
    text = read_config(Path(run))
    checkpoints = Checkpoints(run) if text is not None and (Path(run) / "checkpoints").is_dir() else None
    steps = hosts.ask_first(checkpoints.steps) if checkpoints is not None else []
    if text is None or checkpoints is None or not steps:
        raise FileNotFoundError(
            f"{run}: no checkpoint of a training run here; train one with rice_jax.train --workdir {run}."
        )
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{run}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
    config = from_json(text)
    for name, value in (overrides or {}).items():
        if not any(name == free or name.startswith(free + ".") for free in EVALUATED):
            raise ValueError(f"--config.{name}: the model was trained with it, so it cannot be changed now.")
        override(config, name, value)
    mesh = make_mesh(data=-1, fsdp=1) if mesh is None else mesh
    net = build_model(config)
    abstract = abstract_state(net, config, mesh)
    if step is None:
        step, params = checkpoints.newest_params(abstract)
    else:
        params = checkpoints.restore_params(step, abstract)
    batch_size = -(-config.eval_batch_size // mesh.size) * mesh.size  # the run may have had another mesh
    return Model(config, net, params, mesh, batch_size=batch_size, step=step)

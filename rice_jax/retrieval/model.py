"""Trained models in Python: `load` opens a run, and `Model` turns pictures into embeddings and matching scores."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Shaped, UInt8

from configs.default import FIELDS
from data_pipeline.input.options import FrameOptions
from data_pipeline.system.paths import local_path
from rice_jax.checkpoints.run_folder import is_run
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import EVALUATED, Config, DataConfig, check_field, flatten, from_json, override
from rice_jax.models.rice import Rice, build_model, matmul_precision
from rice_jax.parallel import hosts
from rice_jax.parallel.devices import find_devices
from rice_jax.parallel.mesh import P, make_mesh, on_host, path_name, process_rows, to_global
from rice_jax.retrieval import inference
from rice_jax.retrieval.galleries import GalleryScorer, power_of_two
from rice_jax.retrieval.pictures import Pictures, prepare
from rice_jax.training.step import abstract_state, own_switches


def frame_options(data: DataConfig, *, train: bool) -> FrameOptions:
    """Returns `data` as FrameOptions, of eval_num_frames slots unless `train`. Raises ValueError for bad values."""
    names = {field.name for field in dataclasses.fields(FrameOptions)}
    options = {name: value for name, value in data.items() if name in names}
    return FrameOptions(**options | {"num_frames": data.num_frames if train else data.eval_num_frames})


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _on_mesh(
    function: Callable[..., Any], mesh: Mesh, net: Rice, options: tuple[Any, ...], params: Any, *arrays: Array
) -> list[Array]:
    replicated = NamedSharding(mesh, P())
    with matmul_precision(net):
        results = function(net, *options, jax.lax.with_sharding_constraint(params, replicated), *arrays)
    return jax.tree.leaves(jax.lax.with_sharding_constraint(results, replicated))


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained model. It turns NumPy pictures into unit vectors whose cosine is high if they show the same product.

    Attributes:
      config: the run's config.
      net: the Flax modules.
      params: their parameters, on the devices of `mesh`.
      batch_size: the number of clips encoded at once, at most, over all devices, a multiple of their number; of shop
        images it is image_batch_size. Methods take any number. They encode fewer in a batch of the next power of two
        for each device, and each such size is compiled once.
      step: the number of updates after which the parameters were saved.
      meta: what the run saved with that step, such as the content hash of its data set as "data"; empty if not loaded.
      before_batch: called before each batch, in all processes alike; it may raise an error to stop.

    Example:
      model = rice_jax.load("runs/smoke")
      images = model.prepare(["shop/cola.jpg", "shop/tea.jpg"])          # uint8 [2, px, px, 3]
      frames = model.prepare(["clip/0.jpg", "clip/1.jpg"])[None]         # one clip of two frames
      cosine = model.encode_clips(frames) @ model.encode_images(images).T  # float32 [1, 2]
      score = model.match(frames, None, images)                          # by the matching decoder: float32 [1, 2]
    """

    config: Config
    net: Rice
    params: Any
    mesh: Mesh
    batch_size: int
    step: int = 0
    before_batch: Callable[[], None] | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def prepare(self, pictures: Pictures) -> UInt8[np.ndarray, "n px px 3"]:
        """Returns pictures, in order, as evaluation sees them: decoded, resized and cropped to px = data.image_size.

        Each of `pictures` is JPEG, PNG or WebP, as a path, bytes or a file opened with "rb" (read from its start); or a
        picture of Pillow; or an array of uint8 levels: [height, width] of grey, [height, width, 3] of RGB or
        [height, width, 4] of RGBA. An array [n, height, width, 3] is n pictures.

        Raises:
          OSError: a file cannot be read.
          ValueError: a file is no picture; the message has its path, or its ordinal if it was not given as a path.
          TypeError: `pictures` is a single one, or one of them is nothing of the above, such as an array of floats or
            of other axes; the message says what was found.
        """
        return prepare(pictures, frame_options(self.config.data, train=False))

    @own_switches()
    def encode_clips(
        self, frames: Shaped[np.ndarray, "n N px px 3"], mask: Shaped[np.ndarray, "n N"] | None = None
    ) -> Float[np.ndarray, "n E"]:
        """Returns the embeddings of clips: float32, unit length.

        Args:
          frames: uint8, RGB levels, px = config.data.image_size, any number N of slots (each N is compiled by itself).
          mask: 1 for a frame, 0 for an empty slot, at least one frame a clip; None: every slot has a frame.

        Raises:
          ValueError: frames of another shape or dtype, or a mask that is not as above.
        """
        frames, mask = self._check_clips(frames, mask)
        encode = functools.partial(self.run, inference.encode_clips)
        return self._in_batches(encode, frames, mask, limit=self.batch_size)[0]

    @own_switches()
    def encode_images(self, images: Shaped[np.ndarray, "n px px 3"]) -> Float[np.ndarray, "n E"]:
        """Returns the embeddings of shop images: float32, unit length.

        Raises:
          ValueError: `images` have another shape or dtype than pictures in encode_clips.
        """
        images = self._check(images, axes=4)
        encode = functools.partial(self.run, inference.encode_images)
        return self._in_batches(encode, images, limit=self.image_batch_size)[0]

    @own_switches()
    def match(
        self,
        frames: Shaped[np.ndarray, "n N px px 3"],
        mask: Shaped[np.ndarray, "n N"] | None,
        images: Shaped[np.ndarray, "m px px 3"],
        *,
        raw: bool = False,
    ) -> Float[np.ndarray, "n m"]:
        """Returns the matching decoder's score of each clip with each shop image (docs/official.md 10.4).

        Each picture is encoded once a call, but the decoder runs for each of the n * m pairs. `frames`, `mask` and
        `images` are as in encode_clips and encode_images. Scores are cosines, from -1 to 1, or h . w, of any size, if
        `raw`; both are float32.

        Raises:
          ValueError: frames, mask or images of a wrong shape, dtype or value, or a model not trained to match.
        """
        check_decoder(self)
        frames, mask = self._check_clips(frames, mask)
        images = self._check(images, axes=4)
        encode = functools.partial(self.run, inference.encode_images_to_match)
        class_tokens = self._in_batches(encode, images, limit=self.image_batch_size)[1]
        scorer = GalleryScorer(self.run, self.mesh, class_tokens, [np.arange(len(images))], raw=raw)
        score = lambda frames, mask: scorer.score(np.zeros(len(mask), np.int64), frames, mask)
        return self._in_batches(score, frames, mask, limit=self.batch_size)[1][:, : len(images)]

    def run(self, function: Callable[..., Any], *arrays: Any, options: tuple[Any, ...] = ()) -> list[Array]:
        """Returns the list of arrays of function(net, eval_flip, *options, params, *arrays), compiled and replicated.

        `function` is one of rice_jax.retrieval.inference, and `arrays` are on the devices.
        """
        if self.before_batch is not None:
            self.before_batch()
        return _on_mesh(function, self.mesh, self.net, (self.config.eval_flip, *options), self.params, *arrays)

    @property
    def image_batch_size(self) -> int:
        """The most shop images to encode at once: as many pictures as a batch of clips has in evaluation."""
        return self.batch_size * self.config.data.eval_num_frames

    @property
    def can_match(self) -> bool:
        """True if there is a decoder trained by PMD. With PFR alone its matching head keeps its initial values."""
        return self.net.decoder is not None and bool(self.config.loss.pmd)

    @property
    def fingerprint(self) -> str:
        """A digest of the parameters' paths, dtypes, shapes and values, 16 hex digits. All processes must read it."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(f"{path_name(path)} {leaf.dtype} {leaf.shape} ".encode())
            digest.update(np.ascontiguousarray(on_host(leaf)).tobytes())
        return digest.hexdigest()[:16]

    def _check(self, pictures: np.ndarray, *, axes: int) -> np.ndarray:
        pictures, size = np.asarray(pictures), self.config.data.image_size
        if pictures.ndim != axes or pictures.shape[-3:] != (size, size, 3):
            how = "model.prepare makes such pictures."
            if axes == 5:
                how = "model.prepare(files)[None] is one clip of these frames."
            raise ValueError(
                f"pictures of shape {pictures.shape}: need {axes} axes ending in ({size}, {size}, 3); {how}"
            )
        if pictures.dtype != np.uint8:
            raise ValueError(
                f"pictures of {pictures.dtype}: need uint8, RGB levels 0 to 255; model.prepare makes such pictures."
            )
        return pictures

    def _check_clips(self, frames: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        frames = self._check(frames, axes=5)
        mask = np.ones(frames.shape[:2], np.int32) if mask is None else np.asarray(mask)
        if mask.shape != frames.shape[:2] or not np.isin(mask, (0, 1)).all() or not mask.any(axis=1).all():
            raise ValueError(
                f"mask {mask.shape}: needs a row of 0 and 1, with at least one 1, for each of frames {frames.shape}."
            )
        return frames, mask.astype(np.int32)

    def _in_batches(
        self, encode: Callable[..., list[Array]], *arrays: np.ndarray, limit: int
    ) -> tuple[np.ndarray, ...]:
        """Returns the results of `encode` for all rows, `limit` at a time; for zero rows, empty arrays of their shape.

        `encode` takes a global batch of each array on the devices.
        """
        out = []
        for start in range(0, max(1, len(arrays[0])), limit):
            batch = [array[start : start + limit] for array in arrays]
            count = len(batch[0])
            size = min(limit, power_of_two(-(-count // self.mesh.size)) * self.mesh.size)
            positions, padded = process_rows(size, self.mesh), []
            for array in batch:
                filling = array[:1] if count else np.ones((1, *array.shape[1:]), array.dtype)
                padded.append(np.concatenate([array, np.repeat(filling, size - count, axis=0)]))
            results = encode(*to_global([array[positions] for array in padded], self.mesh))
            out.append([np.asarray(result)[:count] for result in results])
        return tuple(np.concatenate(parts) for parts in zip(*out, strict=True))


def check_decoder(model: Model) -> None:
    """Raises ValueError if the model has no decoder, or one that was not trained to match."""
    if not model.can_match:
        has_decoder = model.net.decoder is not None
        found = "not learned it (loss.pmd is 0" if has_decoder else "no decoder (loss.pmd and loss.pfr are 0"
        raise ValueError(
            f"matching: this model has {found} in its config); train one with a PMD loss, or rank by "
            "embeddings alone (evaluate --score embedding; in Python encode_clips and encode_images)."
        )


@own_switches()
def load(
    run: str | Path,
    *,
    step: int | None = None,
    mesh: Mesh | None = None,
    overrides: Mapping[str, str] | None = None,
    batch_size: int | None = None,
) -> Model:
    """Returns the model of a training run. With several processes all of them must call it.

    Args:
      run: the run's workdir.
      step: a checkpoint's number of updates; the newest undamaged one unless given.
      mesh: the devices for the parameters; all devices unless given.
      overrides: values, as text, of config fields that do not concern the weights, such as {"eval_flip": "true"}.
      batch_size: the most clips to encode at once; config.eval_batch_size unless given. It is rounded up to a multiple
        of the number of devices.

    Raises:
      FileNotFoundError: the folder has no run, no checkpoint, or none of that step.
      OSError: a file of the checkpoint could not be read in three attempts.
      MemoryError: there is too little memory for the parameters.
      ValueError: the checkpoint or the config is damaged or of another version, no checkpoint is undamaged, or an
        override is of no field, of one that training depended on, or of a value that the field cannot have; or
        batch_size is less than 1, or JAX_PLATFORMS asks for devices that are not there.

    Example:
      model = rice_jax.load("runs/smoke", overrides={"eval_flip": "true"})
      print(model.step, model.config.data.image_size)
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, needs at least 1.")
    find_devices()  # first, because what follows would fail without a clear error
    folder = local_path(run)
    checkpoints = Checkpoints(folder) if is_run(folder) else None
    steps = hosts.ask_first(checkpoints.steps) if checkpoints is not None else []
    if checkpoints is None or not steps:
        raise FileNotFoundError(
            f"{run}: found no checkpoint, needs the folder of a training run that has saved one, or of imported "
            "weights; train with rice_jax.train, or import weights of other programs with rice_jax.weights import."
        )
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{run}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
    text = hosts.ask_first(lambda: checkpoints.config(step if step is not None else steps[-1]))
    if text is None:
        raise FileNotFoundError(
            f"{run}: found no config.json, nor a config in the checkpoint; copy the run's config.json here."
        )
    config = from_json(text)
    for name, value in (overrides or {}).items():
        check_field(name)
        if name not in EVALUATED:
            raise ValueError(
                f"--config.{name}: the model was trained with it, so it cannot be changed now; leave it out."
            )
        override(config, name, value)
        if not FIELDS[name].allows(flatten(config)[name]):
            raise ValueError(f"--config.{name}={value}: needs {FIELDS[name].values}.")
    mesh = make_mesh(data=-1, fsdp=1) if mesh is None else mesh
    net = build_model(config)
    abstract = abstract_state(net, config, mesh)
    try:
        step, params = checkpoints.restore_params(abstract, step)
    except MemoryError as error:
        advice = "end other programs that hold memory of these devices, or take larger ones or JAX_PLATFORMS=cpu."
        raise MemoryError(f"{error}; {advice}") from error
    # The run may have had another mesh.
    batch_size = -(-(batch_size or config.eval_batch_size) // mesh.size) * mesh.size
    return Model(config, net, params, mesh, batch_size=batch_size, step=step, meta=checkpoints.meta(step))

"""From a model and a converted split to ranks: encode every picture once, rank each clip in its own gallery."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Shaped
from tqdm import tqdm

from data_pipeline.batches import clip_batches, image_batches
from data_pipeline.frames import FrameOptions
from data_pipeline.records import Split
from rice_jax import metrics, model, sharding
from rice_jax.checkpoints import Checkpoints, read_config
from rice_jax.config import FREE, from_json, override
from rice_jax.step import abstract_state

KS = (1, 3, 5, 10)


def frame_options(data: Any, *, train: bool) -> FrameOptions:
    """The config's `data` section as the pipeline takes it; evaluation has its own number of frame slots."""
    names = {field.name for field in dataclasses.fields(FrameOptions)}
    options = {name: value for name, value in data.items() if name in names}
    return FrameOptions(**options | {"num_frames": data.num_frames if train else data.eval_num_frames})


def _pooled(net: model.Rice, params: Any, pictures: Array, flip: bool) -> Array:
    """Pooled vectors [n, E] of normalised pictures; with `flip` the sum of theirs and their mirror images'."""
    pooled = model.call(net.encoder, params["encoder"], pictures)[1]
    if flip:
        pooled = pooled + model.call(net.encoder, params["encoder"], pictures[:, :, ::-1])[1]
    return pooled


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode_images(net: model.Rice, mesh: Mesh, flip: bool, params: Any, images: Array) -> Array:
    embedding = model.unit(_pooled(net, params, model.normalise(images), flip))
    return jax.lax.with_sharding_constraint(embedding, NamedSharding(mesh, sharding.P()))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode_clips(net: model.Rice, mesh: Mesh, flip: bool, params: Any, frames: Array, mask: Array) -> Array:
    n, slots = mask.shape
    pictures = model.normalise(frames, mask).reshape(n * slots, *frames.shape[2:])
    pooled = _pooled(net, params, pictures, flip).reshape(n, slots, -1)
    return jax.lax.with_sharding_constraint(model.clip_embedding(pooled, mask), NamedSharding(mesh, sharding.P()))


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
    net: model.Rice
    params: Any
    mesh: Mesh
    batch_size: int
    step: int = 0

    def encode_clips(
        self, frames: Shaped[np.ndarray, "n N px px 3"], mask: Shaped[np.ndarray, "n N"]
    ) -> Float[np.ndarray, "n E"]:
        """Embeddings of clips: float32, unit length.

        Args:
          frames: uint8, RGB levels, px = config.data.image_size, any number N of slots (another N compiles anew).
          mask: 1 for a frame, 0 for an empty slot, at least one frame a clip.

        Raises:
          ValueError: another picture size, or a clip without a frame.
        """
        frames, mask = np.asarray(frames), np.asarray(mask)
        self._check(frames, axes=5)
        if mask.shape != frames.shape[:2] or not np.isin(mask, (0, 1)).all() or not mask.any(axis=1).all():
            raise ValueError(
                f"mask {mask.shape}: needs a row of 0 and 1, with at least one 1, for each of frames {frames.shape}."
            )
        return self._encode(_encode_clips, frames, mask.astype(np.int32))

    def encode_images(self, images: Shaped[np.ndarray, "n px px 3"]) -> Float[np.ndarray, "n E"]:
        """Embeddings of shop images: float32, unit length. Pictures as in encode_clips."""
        images = np.asarray(images)
        self._check(images, axes=4)
        return self._encode(_encode_images, images)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the parameters: equal models have equal ones, whatever folder they come from."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(f"{sharding.path_name(path)} {leaf.dtype} {leaf.shape} ".encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()[:16]

    def _check(self, pictures: np.ndarray, *, axes: int) -> None:
        size = self.config.data.image_size
        if pictures.ndim != axes or pictures.shape[-3:] != (size, size, 3):
            raise ValueError(f"pictures of shape {pictures.shape}: need {axes} axes ending in ({size}, {size}, 3).")
        if pictures.dtype != np.uint8:
            raise ValueError(f"pictures of {pictures.dtype}: need uint8, RGB levels 0 to 255.")

    def _encode(self, encode: Callable[..., Array], *arrays: np.ndarray) -> np.ndarray:
        out = []
        for start in range(0, len(arrays[0]), self.batch_size):
            part = [a[start : start + self.batch_size] for a in arrays]
            missing = self.batch_size - len(part[0])
            padded = [np.concatenate([a, np.repeat(a[:1], missing, axis=0)]) if missing else a for a in part]
            on_devices = sharding.to_global(padded, self.mesh)
            out.append(
                np.asarray(encode(self.net, self.mesh, self.config.eval_flip, self.params, *on_devices))[: len(part[0])]
            )
        return np.concatenate(out) if out else np.zeros((0, self.config.model.embedding), np.float32)


def load(
    run: str | Path, *, step: int | None = None, mesh: Mesh | None = None, overrides: Mapping[str, str] | None = None
) -> Model:
    """The model of a training run: `model = rice_jax.load("runs/grocery")`.

    Args:
      run: the training's workdir.
      step: a checkpoint's number of updates; the newest unless given.
      mesh: where the parameters go; all devices of this process unless given.
      overrides: fields of the config that training may change too, such as {"eval_flip": "true"}.

    Raises:
      FileNotFoundError: no run, no checkpoint, or none of that step.
      ValueError: a damaged checkpoint or config, or an override of a field that the model was trained with.
    """
    text = read_config(Path(run))
    checkpoints = Checkpoints(run) if text is not None and (Path(run) / "checkpoints").is_dir() else None
    steps = checkpoints.steps() if checkpoints is not None else []
    if text is None or checkpoints is None or not steps:
        raise FileNotFoundError(
            f"{run}: no checkpoint of a training run here; train one with rice_jax.train --workdir {run}."
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"{run}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
    config = from_json(text)
    for name, value in (overrides or {}).items():
        if not any(name == free or name.startswith(free + ".") for free in FREE):
            raise ValueError(f"--config.{name}: the model was trained with it, so it cannot be changed now.")
        override(config, name, value)
    mesh = sharding.make_mesh(data=-1, fsdp=1) if mesh is None else mesh
    net = model.build(config)
    params = checkpoints.restore_params(step, abstract_state(net, config, mesh))
    batch_size = -(-config.eval_batch_size // mesh.size) * mesh.size  # the run may have had another mesh
    return Model(config, net, params, mesh, batch_size=batch_size, step=step)


class EmbeddingStore:
    """Embeddings of rows in blocks on disk, so that an interrupted evaluation goes on where it stopped."""

    BLOCK = 4096  # rows

    def __init__(self, folder: Path | None) -> None:
        """`folder` must be named after all that decides the embeddings; None keeps nothing."""
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def blocks(self, kind: str, rows: np.ndarray, encode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """encode(rows) [n, E], a block at a time; blocks that are there are read."""
        out = []
        for start in range(0, len(rows), self.BLOCK):
            path = self._folder / f"{kind}-{start:09d}.npy" if self._folder is not None else None
            if path is not None and path.exists():
                out.append(np.load(path, allow_pickle=False))
                continue
            out.append(encode(rows[start : start + self.BLOCK]))
            if path is not None:
                temporary = path.with_suffix(".tmp")
                with temporary.open("wb") as file:
                    np.save(file, out[-1])
                temporary.rename(path)
        return np.concatenate(out) if out else encode(rows)


def embed(
    m: Model, split: Split, clip_rows: np.ndarray, image_rows: np.ndarray, *, store: EmbeddingStore, show_progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of clips and of shop images of a split, each once, in the order of the rows: [Q,E], [I,E]."""
    options = frame_options(m.config.data, train=False)
    own = sharding.process_rows(m.batch_size, m.mesh)  # of each batch, what this process reads and decodes
    read = {"threads": m.config.data.threads, "workers": m.config.data.workers}
    bar = tqdm(total=len(clip_rows) + len(image_rows), unit=" encoded", disable=not show_progress)

    def encoded(
        batches: Iterator[Mapping[str, np.ndarray]], call: Callable[..., Array], *names: str
    ) -> Iterator[np.ndarray]:
        for batch in batches:
            on_devices = sharding.to_global([batch[name] for name in names], m.mesh)
            yield np.asarray(call(m.net, m.mesh, m.config.eval_flip, m.params, *on_devices))

    def run(
        make: Callable[..., Any], call: Callable[..., Array], rows: np.ndarray, names: tuple[str, ...], **more: Any
    ) -> np.ndarray:
        padded = np.concatenate([rows, np.full(-len(rows) % m.batch_size, -1)])
        mine = padded.reshape(-1, m.batch_size)[:, own].reshape(-1)
        out = []
        with make(split, mine, options, len(own), **read, **more) as batches:
            for part in encoded(batches, call, *names):
                out.append(part)
                bar.update(min(m.batch_size, len(rows) - (len(out) - 1) * m.batch_size))
        return np.concatenate([np.zeros((0, m.config.model.embedding), np.float32), *out])[: len(rows)]

    with bar:
        clips = store.blocks(
            "clips",
            clip_rows,
            lambda rows: run(clip_batches, _encode_clips, rows, ("frames", "mask"), seed=m.config.seed),
        )
        images = store.blocks("images", image_rows, lambda rows: run(image_batches, _encode_images, rows, ("image",)))
    return clips, images


@dataclasses.dataclass(frozen=True)
class Result:
    """One evaluation: figures, and per query what stands behind them."""

    figures: dict[str, int | float]
    clip_rows: np.ndarray  # of the split, one a query
    ranking: metrics.Ranking  # its top_images are rows of the split


def evaluate(
    m: Model,
    split: Split,
    *,
    subset: Sequence[str] | None = None,
    store: EmbeddingStore | None = None,
    show_progress: bool = False,
) -> Result:
    """Recall@k of a split by the official definition (SPEC 10), over all of its truth list or the clip ids in `subset`.

    Figures: recall@k and strict_recall@k (ties and NaN count against the model), chance_recall@k in percent, queries
    (the denominator: entries of the truth list, whether there are frames for them or not) and mean_gallery_size.

    Raises:
      ValueError: the split has no truth, or `subset` holds an id that the truth list does not.
    """
    if not split.galleries:
        raise ValueError(f"split {split.name} has no galleries to rank in; evaluate val or test.")
    truth = split.truth_by_clip
    if subset is not None:
        unknown = [clip for clip in subset if clip not in truth]
        if unknown:
            raise ValueError(
                f"subset: {len(unknown)} clip id(s) are not in split {split.name}'s truth, e.g. {unknown[0]}."
            )
        truth = {clip: truth[clip] for clip in dict.fromkeys(subset)}
    clip_rows = np.array([row for row, clip in enumerate(split.clip_ids) if clip in truth], np.int64)
    names = [split.gallery_name(row) for row in clip_rows.tolist()]
    shown = sorted(set(names))
    image_rows = np.unique(np.concatenate([np.zeros(0, np.int64), *(split.galleries[name] for name in shown)]))
    place = np.full(split.num_images, -1)
    place[image_rows] = np.arange(len(image_rows))

    clips, images = embed(
        m, split, clip_rows, image_rows, store=store or EmbeddingStore(None), show_progress=show_progress
    )
    index = {name: i for i, name in enumerate(shown)}
    ranking = metrics.rank_queries(
        clips,
        images,
        galleries=[place[split.galleries[name]] for name in shown],
        gallery_of=np.array([index[name] for name in names], np.int64),
        image_ids=[split.image_ids[row] for row in image_rows.tolist()],
        truth=[truth[split.clip_ids[row]] for row in clip_rows.tolist()],
        top_k=max(KS),
    )
    top = np.where(ranking.top_images >= 0, image_rows[ranking.top_images], -1).astype(np.int32)
    ranking = dataclasses.replace(ranking, top_images=top)

    count = len(truth)
    figures: dict[str, int | float] = {"queries": count}
    for name, values in (
        ("recall", metrics.recall_at(ranking.rank, KS, denominator=count)),
        ("strict_recall", metrics.recall_at(ranking.strict_rank, KS, denominator=count)),
        ("chance_recall", metrics.chance_recall(ranking.true_entries, ranking.gallery_size, KS, denominator=count)),
    ):
        figures |= {f"{name}@{k}": value for k, value in values.items()}
    figures["mean_gallery_size"] = metrics.mean_gallery_size(ranking.gallery_size)
    return Result(figures, clip_rows, ranking)


def rankings(result: Result, split: Split) -> Iterator[dict[str, Any]]:
    """A line a query: its clip, its rank (null: no true image in the gallery) and the shop images ranked first."""
    ranking = result.ranking
    for i, row in enumerate(result.clip_rows.tolist()):
        top = [
            (split.image_ids[image], round(float(score), 6))
            for image, score in zip(ranking.top_images[i], ranking.top_scores[i], strict=True)
            if image >= 0
        ]
        rank = int(ranking.rank[i])
        yield {"clip": split.clip_ids[row], "rank": None if rank == metrics.NEVER else rank, "top": top}


def one_line(figures: Mapping[str, int | float]) -> str:
    recall = "  ".join(f"R@{k} {figures[f'recall@{k}']:.2f}" for k in KS)
    return f"{recall}  (chance {figures['chance_recall@1']:.2f}, {figures['queries']:.0f} queries)"


def table(figures: Mapping[str, int | float]) -> str:
    """The figures as evaluate prints them: percent, two decimals, as the official script."""
    low, high = metrics.wilson_interval(figures["recall@1"], int(figures["queries"]))
    rows = [f"{'':>22}" + "".join(f"{f'R@{k}':>9}" for k in KS)]
    for name, title in (("recall", "recall"), ("strict_recall", "ties against"), ("chance_recall", "chance")):
        rows.append(f"{title:>22}" + "".join(f"{figures[f'{name}@{k}']:>9.2f}" for k in KS))
    rows.append(
        f"{figures['queries']:.0f} queries, {figures['mean_gallery_size']:.1f} shop images a gallery on average; "
        f"95 % interval of R@1: {low:.1f} to {high:.1f} (taking the queries as independent)"
    )
    return "\n".join(rows)

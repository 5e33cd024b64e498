"""From a model and a converted split to ranks: encode every picture once, rank each clip in its own gallery."""

import dataclasses
import functools
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Shaped, UInt8
from tqdm import tqdm

from data_pipeline.format.reader import Split
from data_pipeline.format.tfrecord import write_file
from data_pipeline.input.batches import clip_batches, image_batches
from data_pipeline.input.decode import FrameOptions, centre_crop
from data_pipeline.input.decode import load as load_picture
from rice_jax.checkpoints.store import Checkpoints, read_config
from rice_jax.config import EVALUATED, from_json, override
from rice_jax.models import vit as model
from rice_jax.parallel import hosts
from rice_jax.parallel import mesh as sharding
from rice_jax.retrieval import inference
from rice_jax.retrieval import ranking as metrics
from rice_jax.training.step import abstract_state

KS = (1, 3, 5, 10)
SCORES = ("embedding", "matching", "raw-matching")  # what evaluate may rank by; the last two beside the first
AT_ONCE = 32  # shop images that a clip meets at once in matching: more takes memory, fewer makes narrow products


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
    function: Callable[..., Any], mesh: Mesh, net: model.Rice, static: tuple[Any, ...], params: Any, *arrays: Array
) -> list[Array]:
    """What function(net, *static, params, *arrays) gives, on every device; parameters are gathered once, before it."""
    whole = NamedSharding(mesh, sharding.P())
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
    net: model.Rice
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
        shelves = _Shelves(self, class_tokens, [np.arange(len(images))], raw=raw)
        everyone = np.zeros(self.batch_size, np.int64)
        return self._batched(functools.partial(shelves.match, everyone), frames, mask)[1][:, : len(images)]

    def run(self, function: Callable[..., Any], *arrays: Any, more: tuple[Any, ...] = ()) -> list[Array]:
        """A function of rice_jax.inference, compiled, on arrays that lie on the devices; `more`: its options."""
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
            digest.update(f"{sharding.path_name(path)} {leaf.dtype} {leaf.shape} ".encode())
            digest.update(np.ascontiguousarray(sharding.on_host(leaf)).tobytes())
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
        own = sharding.process_rows(self.batch_size, self.mesh)
        out = []
        for start in range(0, max(1, len(arrays[0])), self.batch_size):
            part = [a[start : start + self.batch_size] for a in arrays]
            missing = self.batch_size - len(part[0])
            fill = [a[:1] if len(a) else np.ones((1, *a.shape[1:]), a.dtype) for a in part]
            padded = [np.concatenate([a, np.repeat(f, missing, axis=0)]) for a, f in zip(part, fill, strict=True)]
            results = call(*sharding.to_global([a[own] for a in padded], self.mesh))
            out.append([np.asarray(result)[: len(part[0])] for result in results])
        return tuple(np.concatenate(parts) for parts in zip(*out, strict=True))


class _Shelves:
    """Class tokens of shop images on the devices, each once, and the galleries to be matched as rows of them."""

    def __init__(self, m: Model, class_tokens: np.ndarray, galleries: Sequence[np.ndarray], *, raw: bool) -> None:
        self._m, self._raw = m, raw
        self._sizes = np.array([*map(len, galleries), 0])  # the last is that of no clip, which fills a batch up
        self.width = max(1, -(-int(self._sizes.max()) // AT_ONCE)) * AT_ONCE
        self._rows = np.full((len(self._sizes), self.width), len(class_tokens), np.int32)
        for row, gallery in zip(self._rows, galleries, strict=False):
            row[: len(gallery)] = gallery
        nobody = np.zeros((1, class_tokens.shape[1]), np.float32)
        self._class_tokens = jax.make_array_from_process_local_data(
            NamedSharding(m.mesh, sharding.P()), np.concatenate([class_tokens, nobody])
        )

    def match(self, gallery_of: np.ndarray, frames: Array, mask: Array) -> list[Array]:
        """Embeddings [n, E] of a global batch of clips and their scores [n, width]; gallery -1: none, all -inf."""
        own = sharding.process_rows(len(gallery_of), self._m.mesh)
        shelf = sharding.to_global(self._rows[gallery_of[own]], self._m.mesh)
        count = np.int32(-(-int(self._sizes[gallery_of].max()) // AT_ONCE))
        clips = (frames, mask, shelf, self._class_tokens, count)
        return self._m.run(inference.match_clips, *clips, more=(self._raw, AT_ONCE))


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
    mesh = sharding.make_mesh(data=-1, fsdp=1) if mesh is None else mesh
    net = model.build(config)
    abstract = abstract_state(net, config, mesh)
    if step is None:
        step, params = checkpoints.newest_params(abstract)
    else:
        params = checkpoints.restore_params(step, abstract)
    batch_size = -(-config.eval_batch_size // mesh.size) * mesh.size  # the run may have had another mesh
    return Model(config, net, params, mesh, batch_size=batch_size, step=step)


class EmbeddingStore:
    """Embeddings of rows in blocks on disk, so that an interrupted evaluation goes on where it stopped.

    Of several processes the first writes, and says which blocks are there; all read.
    """

    BLOCK = 4096  # rows

    def __init__(self, folder: Path | None) -> None:
        """`folder` must be named after all that decides the embeddings; None keeps nothing."""
        self._folder = folder
        if folder is not None and hosts.is_first():
            folder.mkdir(parents=True, exist_ok=True)

    def blocks(
        self, kinds: Mapping[str, int], rows: np.ndarray, encode: Callable[[np.ndarray], Sequence[np.ndarray]]
    ) -> tuple[np.ndarray, ...]:
        """encode(rows), an array [n, width] for each of `kinds` (name: width); blocks that are all there are read."""
        out = [[np.zeros((0, width), np.float32) for width in kinds.values()]]
        for start in range(0, len(rows), self.BLOCK):
            paths = [self._folder / f"{kind}-{start:09d}.npy" for kind in kinds] if self._folder is not None else []
            if paths and hosts.ask_first(functools.partial(_all_exist, paths)):
                out.append([np.load(path, allow_pickle=False) for path in paths])
                continue
            out.append(list(encode(rows[start : start + self.BLOCK])))
            if hosts.is_first():
                for path, array in zip(paths, out[-1], strict=False):
                    _write_array(path, array)
        return tuple(np.concatenate(parts) for parts in zip(*out, strict=True))


def _all_exist(paths: Sequence[Path]) -> bool:
    return all(path.exists() for path in paths)


def _write_array(path: Path, array: np.ndarray) -> None:
    data = io.BytesIO()
    np.save(data, array)
    write_file(path, data.getvalue())


class _Pass:
    """Every picture of a split through the model once, with one progress bar."""

    def __init__(self, m: Model, split: Split, *, total: int, show_progress: bool) -> None:
        self._m, self._split = m, split
        self._options = frame_options(m.config.data, train=False)
        self._bar = tqdm(total=total, unit=" encoded", disable=not (show_progress and hosts.is_first()))

    def __enter__(self) -> "_Pass":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def clips(self, rows: np.ndarray, call: Callable[..., list[Array]]) -> tuple[np.ndarray, ...]:
        """call(rows of the batch with -1 where it is filled up, frames, mask) for all of `rows`."""
        make = functools.partial(clip_batches, seed=self._m.config.seed)
        return self._over(make, ("frames", "mask"), rows, call)

    def images(self, rows: np.ndarray, call: Callable[..., list[Array]]) -> tuple[np.ndarray, ...]:
        """call(rows of the batch, images) for all of `rows`."""
        return self._over(image_batches, ("image",), rows, call)

    def _over(
        self,
        make: Callable[..., Any],
        names: tuple[str, ...],
        rows: np.ndarray,
        call: Callable[..., list[Array]],
    ) -> tuple[np.ndarray, ...]:
        m = self._m
        own = sharding.process_rows(m.batch_size, m.mesh)  # of each batch, what this process reads and decodes
        padded = np.concatenate([rows, np.full(-len(rows) % m.batch_size, -1)]).reshape(-1, m.batch_size)
        data = m.config.data
        out = []
        with make(
            self._split, padded[:, own].reshape(-1), self._options, len(own), threads=data.threads, workers=data.workers
        ) as batches:
            for batch_rows, batch in zip(padded, batches, strict=True):
                results = call(batch_rows, *sharding.to_global([batch[name] for name in names], m.mesh))
                out.append([np.asarray(result) for result in results])
                self._bar.update(int(np.count_nonzero(batch_rows >= 0)))
        return tuple(np.concatenate(parts)[: len(rows)] for parts in zip(*out, strict=True))


def embed(
    m: Model, split: Split, clip_rows: np.ndarray, image_rows: np.ndarray, *, store: EmbeddingStore, show_progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of clips and of shop images of a split, each once, in the order of the rows: [Q,E], [I,E]."""
    width = m.config.model.embedding
    with _Pass(m, split, total=len(clip_rows) + len(image_rows), show_progress=show_progress) as over:
        (clips,) = store.blocks(
            {"clips": width}, clip_rows, lambda rows: over.clips(rows, lambda _, *x: m.run(inference.encode_clips, *x))
        )
        (images,) = store.blocks(
            {"images": width},
            image_rows,
            lambda rows: over.images(rows, lambda _, *x: m.run(inference.encode_images, *x)),
        )
    return clips, images


def match(
    m: Model,
    split: Split,
    clip_rows: np.ndarray,
    image_rows: np.ndarray,
    *,
    galleries: Sequence[np.ndarray],
    gallery_of: np.ndarray,
    raw: bool,
    store: EmbeddingStore,
    show_progress: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings as `embed` gives them, and each clip's matching scores [Q,L] in its gallery, -inf beyond its end.

    Args:
      galleries: places in `image_rows`; gallery_of [Q]: whose a clip is.
      raw: h . w in place of its cosine.
    """
    check_decoder(m)
    width = m.config.model.embedding
    place = np.full(split.num_clips + 1, -1)  # the last one is row -1's
    place[clip_rows] = gallery_of
    with _Pass(m, split, total=len(clip_rows) + len(image_rows), show_progress=show_progress) as over:
        images, class_tokens = store.blocks(
            {"images": width, "class-tokens": m.config.model.width},
            image_rows,
            lambda rows: over.images(rows, lambda _, *x: m.run(inference.image_queries, *x)),
        )
        shelves = _Shelves(m, class_tokens, galleries, raw=raw)
        clips, scores = store.blocks(
            {"clips": width, "raw-matches" if raw else "matches": shelves.width},
            clip_rows,
            lambda rows: over.clips(rows, lambda batch, *x: shelves.match(place[batch], *x)),
        )
    return clips, images, scores


@dataclasses.dataclass(frozen=True)
class Result:
    """One evaluation: figures, and per query what stands behind them."""

    figures: dict[str, int | float]
    clip_rows: np.ndarray  # of the split, one a query
    ranking: metrics.Ranking  # by the embedding; its top_images are rows of the split
    others: dict[str, metrics.Ranking]  # by "matching" and by the "sum" of both, where they were asked for


def evaluate(
    m: Model,
    split: Split,
    *,
    subset: Sequence[str] | None = None,
    score: str = "embedding",
    store: EmbeddingStore | None = None,
    show_progress: bool = False,
) -> Result:
    """Recall@k of a split by the official definition (SPEC 10), over all of its truth list or the clip ids in `subset`.

    Figures: recall@k and strict_recall@k (ties and NaN count against the model), chance_recall@k in percent, queries
    (the denominator: entries of the truth list, whether there are frames for them or not) and mean_gallery_size.

    Args:
      score: "embedding": the cosine of two embeddings. "matching": beside it the cosine of the matching decoder, every
        clip against its whole gallery, and the sum of both cosines; figures matching_recall@k, sum_recall@k, strict
        ones of both, and the 95 % interval of each recall@1 as NAME_low and NAME_high. "raw-matching": the same with
        h . w for the decoder's cosine, and the sum is the embedding's cosine and that.

    Raises:
      ValueError: the split has no truth, `subset` holds an id that the truth list does not, or matching without a
        decoder.
    """
    if score not in SCORES:
        raise ValueError(f"score: found {score!r}, needs one of {', '.join(SCORES)}.")
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
    index = {name: i for i, name in enumerate(shown)}
    galleries = [place[split.galleries[name]] for name in shown]
    gallery_of = np.array([index[name] for name in names], np.int64)
    where: dict[str, Any] = {
        "galleries": galleries,
        "gallery_of": gallery_of,
        "image_ids": [split.image_ids[row] for row in image_rows.tolist()],
        "truth": [truth[split.clip_ids[row]] for row in clip_rows.tolist()],
        "top_k": max(KS),
    }

    how: dict[str, Any] = {"store": store or EmbeddingStore(None), "show_progress": show_progress}
    others = {}
    if score == "embedding":
        clips, images = embed(m, split, clip_rows, image_rows, **how)
    else:
        how |= {"galleries": galleries, "gallery_of": gallery_of, "raw": score == "raw-matching"}
        clips, images, matches = match(m, split, clip_rows, image_rows, **how)
        cosines = gallery_cosines(clips, images, galleries, gallery_of, width=matches.shape[1])
        others = {
            name: metrics.rank_matrix(x, **where) for name, x in (("matching", matches), ("sum", matches + cosines))
        }
    ranking = metrics.rank_queries(clips, images, **where)

    def of_split(ranking: metrics.Ranking) -> metrics.Ranking:
        top = np.where(ranking.top_images >= 0, image_rows[ranking.top_images], -1).astype(np.int32)
        return dataclasses.replace(ranking, top_images=top)

    count = len(truth)
    figures: dict[str, int | float] = {"queries": count} | recalls(ranking, "", count)
    chance = metrics.chance_recall(ranking.true_entries, ranking.gallery_size, KS, denominator=count)
    figures |= {f"chance_recall@{k}": value for k, value in chance.items()}
    figures["mean_gallery_size"] = metrics.mean_gallery_size(ranking.gallery_size)
    for name, other in others.items():
        figures |= recalls(other, f"{name}_", count)
    for name in [f"{prefix}recall@1" for prefix in ("", "matching_", "sum_") if others]:
        figures[f"{name}_low"], figures[f"{name}_high"] = metrics.wilson_interval(figures[name], count)
    return Result(figures, clip_rows, of_split(ranking), {name: of_split(other) for name, other in others.items()})


def gallery_cosines(
    clips: np.ndarray, images: np.ndarray, galleries: Sequence[np.ndarray], gallery_of: np.ndarray, *, width: int
) -> np.ndarray:
    """Each clip's cosines with its gallery's entries: float32 [Q, width], -inf beyond its end."""
    out = np.full((len(clips), width), -np.inf, np.float32)
    for gallery, rows in enumerate(galleries):
        queries = np.flatnonzero(gallery_of == gallery)
        out[queries, : len(rows)] = clips[queries] @ images[rows].T
    return out


def recalls(ranking: metrics.Ranking, prefix: str, count: int) -> dict[str, float]:
    """recall@k and strict_recall@k, their names behind `prefix`."""
    return {
        f"{prefix}{name}@{k}": value
        for name, rank in (("recall", ranking.rank), ("strict_recall", ranking.strict_rank))
        for k, value in metrics.recall_at(rank, KS, denominator=count).items()
    }


def rankings(result: Result, split: Split) -> Iterator[dict[str, Any]]:
    """A line a query: its clip, its rank (null: no true image in the gallery) and the shop images ranked first.

    Where there are others: their ranks and images too, as NAME_rank and NAME_top.
    """
    for i, row in enumerate(result.clip_rows.tolist()):
        line: dict[str, Any] = {"clip": split.clip_ids[row]}
        for prefix, ranking in {"": result.ranking, **{f"{name}_": r for name, r in result.others.items()}}.items():
            rank = int(ranking.rank[i])
            line[f"{prefix}rank"] = None if rank == metrics.NEVER else rank
            line[f"{prefix}top"] = [
                (split.image_ids[image], round(float(score), 6))
                for image, score in zip(ranking.top_images[i], ranking.top_scores[i], strict=True)
                if image >= 0
            ]
        yield line


def one_line(figures: Mapping[str, int | float]) -> str:
    recall = "  ".join(f"R@{k} {figures[f'recall@{k}']:.2f}" for k in KS)
    return f"{recall}  (chance {figures['chance_recall@1']:.2f}, {figures['queries']:.0f} queries)"


def table(figures: Mapping[str, int | float]) -> str:
    """The figures as evaluate prints them: percent, two decimals, as the official script.

    Ties against the model get a row for the embedding always, for the others where they change a figure.
    """
    prefixes = {"": "recall"}
    if "matching_recall@1" in figures:
        prefixes = {"": "embedding", "matching_": "matching", "sum_": "their sum"}
    rows = [f"{'':>22}" + "".join(f"{f'R@{k}':>9}" for k in KS) + f"{'95 % of R@1':>16}"]

    def row(name: str, title: str) -> str:
        return f"{title:>22}" + "".join(f"{figures[f'{name}@{k}']:>9.2f}" for k in KS)

    for prefix, title in prefixes.items():
        low, high = metrics.wilson_interval(figures[f"{prefix}recall@1"], int(figures["queries"]))
        rows.append(row(f"{prefix}recall", title) + f"{f'{low:.1f} to {high:.1f}':>16}")
        strict = f"{prefix}strict_recall"
        if not prefix or any(figures[f"{strict}@{k}"] != figures[f"{prefix}recall@{k}"] for k in KS):
            rows.append(row(strict, "ties against"))
    rows.append(row("chance_recall", "chance"))
    rows.append(
        f"{figures['queries']:.0f} queries, {figures['mean_gallery_size']:.1f} shop images a gallery on average; the "
        "interval takes the queries as independent"
    )
    return "\n".join(rows)

"""Recall@k of a model on a converted split: encodes each picture once and ranks each clip in its own gallery."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from data_pipeline.format.reader import Split
from data_pipeline.input.clips import Kind
from data_pipeline.input.random_words import GALLERY_STREAM, random_words
from data_pipeline.input.stored_frames import missing_frames
from rice_jax.config import Config
from rice_jax.errors import warn
from rice_jax.parallel import hosts
from rice_jax.retrieval.embeddings import EmbeddingStore, Faults, embed
from rice_jax.retrieval.matching import score_galleries
from rice_jax.retrieval.model import Model, frame_options
from rice_jax.retrieval.ranking import NEVER, Ranking, rank_matrix, rank_queries
from rice_jax.retrieval.recall import chance_recall, mean_gallery_size, recall_at, wilson_interval
from rice_jax.training.step import own_switches

KS = (1, 3, 5, 10)
SCORES = ("embedding", "matching", "raw-matching")  # evaluate ranks by the first, and by the others beside it
OnError = Literal["fail", "miss"]  # what to do about a clip or shop image that cannot be read
SHOWN = 20  # unreadable clips and images in a warning


@dataclasses.dataclass(frozen=True)
class Result:
    """One evaluation: its figures, and the rankings that they are computed from."""

    figures: dict[str, int | float]
    clip_rows: np.ndarray  # row of the split for each query that could be read
    ranking: Ranking  # by the embedding; its top_images are rows of the split
    others: dict[str, Ranking]  # by "matching" and by the "sum" of both; empty for score "embedding"
    faults: Faults  # clips and shop images that could not be read, by row, and why


@own_switches()
def evaluate_split(
    model: Model,
    split: Split,
    *,
    subset: Sequence[str] | None = None,
    score: str = "embedding",
    gallery: int = 0,
    on_error: OnError = "fail",
    store: EmbeddingStore | None = None,
    show_progress: bool = False,
) -> Result:
    """Returns figures and rankings of a split by the official definition of Recall@k (docs/official.md 10).

    Figures: recall@k, strict_recall@k (ties and NaN count against the model) and chance_recall@k in percent; queries,
    the entries of the truth list (only those in `subset` if given), with or without frames; and mean_gallery_size.

    Score "embedding" ranks by the cosine of two embeddings; "matching" ranks also by the matching decoder's cosine, and
    by the sum of both. Its further figures are matching_recall@k, sum_recall@k, strict ones of both, and the 95 %
    interval of each recall@1 as NAME_low and NAME_high. "raw-matching" has h . w in place of the decoder's cosine, in
    the sum too.

    gallery: 0 ranks in whole galleries. Otherwise they keep the true images of all queries and so many others, drawn by
    the model's seed, the same every time; if this leaves any out, the figures have "gallery", the number of shop images
    kept, and "whole_gallery", the number of all.

    on_error: "fail" raises ValueError for a clip or shop image that cannot be read. "miss" counts such a clip as a miss
    and leaves such an image out of its galleries; then the figures have unreadable_clips and unreadable_images.

    Embeddings are kept in `store` if it is given. Raises ValueError for an unknown score, a split without galleries, an
    id in `subset` that the truth list lacks, clips whose stored frames lack some of the evenly spaced ones, no query or
    none that can be read, and matching by a model that was not trained to match.
    """
    if score not in SCORES:
        raise ValueError(f"score: found {score!r}, needs one of {', '.join(SCORES)}.")
    truth, clip_rows = find_queries(model.config, split, subset)
    names = [split.gallery_name(row) for row in clip_rows.tolist()]
    used = sorted(set(names))
    all_rows = np.unique(np.concatenate([np.zeros(0, np.int64), *(split.galleries[name] for name in used)]))
    image_rows = _sample(split, all_rows, truth, gallery, seed=model.config.seed) if gallery else all_rows
    position = np.full(split.num_images, -1)
    position[image_rows] = np.arange(len(image_rows))
    galleries = [position[split.galleries[name]] for name in used]
    galleries = [rows[rows >= 0] for rows in galleries]
    number = {name: gallery for gallery, name in enumerate(used)}
    gallery_of = np.array([number[name] for name in names], np.int64)

    faults: Faults = {"clip": {}, "image": {}}
    options: dict[str, Any] = {"store": store or EmbeddingStore(None), "show_progress": show_progress}
    options["faults"] = faults if on_error == "miss" else None
    scores = {}
    if score == "embedding":
        clips, images = embed(model, split, clip_rows, image_rows, **options)
    else:
        options |= {"galleries": galleries, "gallery_of": gallery_of, "raw": score == "raw-matching"}
        clips, images, matches = score_galleries(model, split, clip_rows, image_rows, **options)
        cosines = _gallery_cosines(clips, images, galleries, gallery_of, width=matches.shape[1])
        scores = {"matching": matches, "sum": matches + cosines}
    if any(faults.values()):
        clip_is_read, image_is_read = (_are_read(faults, *of) for of in (("clip", clip_rows), ("image", image_rows)))
        if faults["clip"] and not clip_is_read.any():
            raise ValueError(f"no clip of split {split.name} can be read; {next(iter(faults['clip'].values()))}")
        kept = [image_is_read[rows] for rows in galleries]
        scores = {name: _without(x, kept, gallery_of)[clip_is_read] for name, x in scores.items()}
        galleries = [rows[is_kept] for rows, is_kept in zip(galleries, kept, strict=True)]
        clips, clip_rows, gallery_of = clips[clip_is_read], clip_rows[clip_is_read], gallery_of[clip_is_read]
    task: dict[str, Any] = {
        "galleries": galleries,
        "gallery_of": gallery_of,
        "image_ids": [split.image_ids[row] for row in image_rows.tolist()],
        "truth": [truth[split.clip_ids[row]] for row in clip_rows.tolist()],
        "top_k": max(KS),
    }
    others = {name: rank_matrix(each, **task) for name, each in scores.items()}
    ranking = rank_queries(clips, images, **task)
    figures = _figures(ranking, others, len(truth))
    if len(image_rows) < len(all_rows):
        figures |= {"gallery": len(image_rows), "whole_gallery": len(all_rows)}
    if any(faults.values()):
        figures |= {f"unreadable_{kind}s": len(rows) for kind, rows in faults.items()}

    def with_rows(ranking: Ranking) -> Ranking:
        rows = np.where(ranking.top_images >= 0, image_rows[ranking.top_images], -1).astype(np.int32)
        return dataclasses.replace(ranking, top_images=rows)

    others = {name: with_rows(other) for name, other in others.items()}
    return Result(figures, clip_rows, with_rows(ranking), others, faults)


def find_queries(
    config: Config, split: Split, subset: Sequence[str] | None = None
) -> tuple[dict[str, Any], np.ndarray]:
    """Returns an evaluation's truth, {clip id: ids of shop images}, and the rows of its clips in the split, int64.

    Raises ValueError if the split has no galleries, lacks an id of `subset`, or lacks frames that config.data asks for.
    """
    truth = _truth(split, subset)
    rows = np.array([row for row, clip in enumerate(split.clip_ids) if clip in truth], np.int64)
    options = frame_options(config.data, train=False)
    if missing := missing_frames(split, rows, options, train=False, prefix="data.eval_"):
        raise ValueError("; ".join(missing) + ".")
    return truth, rows


def _sample(
    split: Split, image_rows: np.ndarray, truth: Mapping[str, Sequence[str]], others: int, *, seed: int
) -> np.ndarray:
    """Returns those of `image_rows` whose ids are in `truth`, and `others` more, drawn by the seed; ascending."""
    ids = {image for images in truth.values() for image in images}
    is_true = np.array([split.image_ids[row] in ids for row in image_rows.tolist()], bool)
    rest = image_rows[~is_true]
    drawn = np.argsort(random_words(seed, GALLERY_STREAM, len(rest), epoch=0), kind="stable")[:others]
    return np.sort(np.concatenate([image_rows[is_true], rest[drawn]]))


def _are_read(faults: Faults, kind: Kind, rows: np.ndarray) -> np.ndarray:
    return ~np.isin(rows, list(faults[kind]))


def _without(scores: np.ndarray, kept: Sequence[np.ndarray], gallery_of: np.ndarray) -> np.ndarray:
    """Returns scores [Q, L] of galleries of which only the `kept` entries are left, a bool [n] for each gallery."""
    out = np.full_like(scores, -np.inf)
    for gallery, is_kept in enumerate(kept):
        queries, entries = np.flatnonzero(gallery_of == gallery), np.flatnonzero(is_kept)
        out[queries, : len(entries)] = scores[np.ix_(queries, entries)]
    return out


def warn_of_unreadable(split: Split, faults: Faults) -> None:
    """Prints a warning, in process 0, that names unreadable clips and images, SHOWN of them; nothing without any."""
    clips, images = (len(faults[kind]) for kind in ("clip", "image"))
    counted = ["1 clip cannot be read and counts as a miss"] if clips == 1 else []
    counted += [f"{clips} clips cannot be read and count as misses"] if clips > 1 else []
    counted += ["1 shop image cannot be read and is left out of its galleries"] if images == 1 else []
    counted += [f"{images} shop images cannot be read and are left out of their galleries"] if images > 1 else []
    if hosts.is_first() and (texts := [text for rows in faults.values() for text in rows.values()]):
        more = f"\n  and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
        warn(f"split {split.name}: {'; '.join(counted)}:\n  " + "\n  ".join(texts[:SHOWN]) + more)


def _truth(split: Split, subset: Sequence[str] | None) -> dict[str, Any]:
    if not split.galleries:
        raise ValueError(f"split {split.name} has no galleries to rank in; evaluate val or test, if the set has one.")
    truth = split.truth_by_clip
    if not truth:
        raise ValueError(f"split {split.name} has no query; evaluate another split.")
    if subset is None:
        return dict(truth)
    if not subset:
        raise ValueError("subset: found no clip id, needs at least one; give some, or no subset.")
    unknown = [clip for clip in subset if clip not in truth]
    if unknown:
        raise ValueError(
            f"subset: found {len(unknown)} of {len(subset)} clip ids that split {split.name}'s truth lacks, such as "
            f"{unknown[0]}; list clips of that split, such as {next(iter(truth))}, or evaluate the split they are in."
        )
    return {clip: truth[clip] for clip in subset}


def _gallery_cosines(
    clips: np.ndarray, images: np.ndarray, galleries: Sequence[np.ndarray], gallery_of: np.ndarray, *, width: int
) -> np.ndarray:
    """Returns each clip's cosines with its gallery: float32 [Q, width], -inf beyond the gallery's end."""
    out = np.full((len(clips), width), -np.inf, np.float32)
    for gallery, rows in enumerate(galleries):
        queries = np.flatnonzero(gallery_of == gallery)
        out[queries, : len(rows)] = clips[queries] @ images[rows].T
    return out


def _figures(ranking: Ranking, others: Mapping[str, Ranking], queries: int) -> dict[str, int | float]:
    figures: dict[str, int | float] = {"queries": queries} | _recalls(ranking, "", queries)
    chance = chance_recall(ranking.true_entries, ranking.gallery_size, KS, denominator=queries)
    figures |= {f"chance_recall@{k}": value for k, value in chance.items()}
    figures["mean_gallery_size"] = mean_gallery_size(ranking.gallery_size)
    for name, other in others.items():
        figures |= _recalls(other, f"{name}_", queries)
    for name in [f"{prefix}recall@1" for prefix in ("", "matching_", "sum_") if others]:
        figures[f"{name}_low"], figures[f"{name}_high"] = wilson_interval(figures[name], queries)
    return figures


def _recalls(ranking: Ranking, prefix: str, queries: int) -> dict[str, float]:
    recall, strict = (recall_at(rank, KS, denominator=queries) for rank in (ranking.rank, ranking.strict_rank))
    figures = {f"{prefix}recall@{k}": recall[k] for k in KS}
    return figures | {f"{prefix}strict_recall@{k}": strict[k] for k in KS}


def rankings(result: Result, split: Split) -> Iterator[dict[str, Any]]:
    """Yields a dict for each query with a clip: "clip", "rank", and "top", up to 10 pairs (shop image id, score).

    The best is first; scores have six decimals. A rank counts from 1, None without a true image in the gallery. For the
    rankings in result.others there are NAME_rank and NAME_top too.
    """
    for i, row in enumerate(result.clip_rows.tolist()):
        line: dict[str, Any] = {"clip": split.clip_ids[row]}
        for prefix, ranking in {"": result.ranking, **{f"{name}_": r for name, r in result.others.items()}}.items():
            rank = int(ranking.rank[i])
            line[f"{prefix}rank"] = None if rank == NEVER else rank
            line[f"{prefix}top"] = [
                (split.image_ids[image], round(float(score), 6))
                for image, score in zip(ranking.top_images[i], ranking.top_scores[i], strict=True)
                if image >= 0
            ]
        yield line


def one_line(figures: Mapping[str, int | float]) -> str:
    """Returns recall@1, 3, 5 and 10, chance of recall@1, in percent, and the number of queries as one line of text.

    A sampled gallery has its size in the line.
    """
    recall = "  ".join(f"R@{k} {figures[f'recall@{k}']:.2f}" for k in KS)
    among = f", {figures['gallery']} of {figures['whole_gallery']} shop images" if "gallery" in figures else ""
    return f"{recall}  (chance {figures['chance_recall@1']:.2f}, {figures['queries']:.0f} queries{among})"


def table(figures: Mapping[str, int | float]) -> str:
    """Returns the figures as a table of text, in percent with two decimals as the official script prints them.

    Strict recall always has a row for the embedding, else if a figure differs. Raises ValueError for 0 queries.
    """
    matching = {"": "embedding", "matching_": "matching", "sum_": "their sum"}
    prefixes = matching if "matching_recall@1" in figures else {"": "recall"}
    rows = [f"{'':>22}" + "".join(f"{f'R@{k}':>9}" for k in KS) + f"{'95 % of R@1':>16}"]

    def row(name: str, title: str) -> str:
        return f"{title:>22}" + "".join(f"{figures[f'{name}@{k}']:>9.2f}" for k in KS)

    for prefix, title in prefixes.items():
        low, high = wilson_interval(figures[f"{prefix}recall@1"], int(figures["queries"]))
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

"""From a model and a converted split to Recall@k: encode every picture once, rank each clip in its own gallery."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipeline.format.reader import Split
from rice_jax.retrieval.embeddings import EmbeddingStore, embed
from rice_jax.retrieval.matching import score_galleries
from rice_jax.retrieval.model import Model
from rice_jax.retrieval.ranking import NEVER, Ranking, rank_matrix, rank_queries
from rice_jax.retrieval.recall import chance_recall, mean_gallery_size, recall_at, wilson_interval

KS = (1, 3, 5, 10)


SCORES = ("embedding", "matching", "raw-matching")  # what evaluate may rank by; the last two beside the first


@dataclasses.dataclass(frozen=True)
class Result:
    """One evaluation: figures, and per query what stands behind them."""

    figures: dict[str, int | float]
    clip_rows: np.ndarray  # of the split, one a query
    ranking: Ranking  # by the embedding; its top_images are rows of the split
    others: dict[str, Ranking]  # by "matching" and by the "sum" of both, where they were asked for


def evaluate_split(
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
        clips, images, matches = score_galleries(m, split, clip_rows, image_rows, **how)
        cosines = gallery_cosines(clips, images, galleries, gallery_of, width=matches.shape[1])
        others = {name: rank_matrix(x, **where) for name, x in (("matching", matches), ("sum", matches + cosines))}
    ranking = rank_queries(clips, images, **where)

    def of_split(ranking: Ranking) -> Ranking:
        top = np.where(ranking.top_images >= 0, image_rows[ranking.top_images], -1).astype(np.int32)
        return dataclasses.replace(ranking, top_images=top)

    count = len(truth)
    figures: dict[str, int | float] = {"queries": count} | recalls(ranking, "", count)
    chance = chance_recall(ranking.true_entries, ranking.gallery_size, KS, denominator=count)
    figures |= {f"chance_recall@{k}": value for k, value in chance.items()}
    figures["mean_gallery_size"] = mean_gallery_size(ranking.gallery_size)
    for name, other in others.items():
        figures |= recalls(other, f"{name}_", count)
    for name in [f"{prefix}recall@1" for prefix in ("", "matching_", "sum_") if others]:
        figures[f"{name}_low"], figures[f"{name}_high"] = wilson_interval(figures[name], count)
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


def recalls(ranking: Ranking, prefix: str, count: int) -> dict[str, float]:
    """recall@k and strict_recall@k, their names behind `prefix`."""
    return {
        f"{prefix}{name}@{k}": value
        for name, rank in (("recall", ranking.rank), ("strict_recall", ranking.strict_rank))
        for k, value in recall_at(rank, KS, denominator=count).items()
    }


def rankings(result: Result, split: Split) -> Iterator[dict[str, Any]]:
    """A line a query: its clip, its rank (null: no true image in the gallery) and the shop images ranked first.

    Where there are others: their ranks and images too, as NAME_rank and NAME_top.
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

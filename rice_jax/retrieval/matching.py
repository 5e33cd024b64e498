"""Scores of every clip against its whole gallery by the matching decoder."""

from collections.abc import Sequence

import numpy as np

from data_pipeline.format.reader import Split
from rice_jax.retrieval import inference
from rice_jax.retrieval.embeddings import EmbeddingStore, EvaluationPass
from rice_jax.retrieval.galleries import GalleryScorer
from rice_jax.retrieval.model import Model, check_decoder


def score_galleries(
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
    with EvaluationPass(m, split, total=len(clip_rows) + len(image_rows), show_progress=show_progress) as over:
        images, class_tokens = store.blocks(
            {"images": width, "class-tokens": m.config.model.width},
            image_rows,
            lambda rows: over.images(rows, lambda _, *x: m.run(inference.image_queries, *x)),
        )
        shelves = GalleryScorer(m.run, m.mesh, class_tokens, galleries, raw=raw)
        clips, scores = store.blocks(
            {"clips": width, "raw-matches" if raw else "matches": shelves.width},
            clip_rows,
            lambda rows: over.clips(rows, lambda batch, *x: shelves.score(place[batch], *x)),
        )
    return clips, images, scores

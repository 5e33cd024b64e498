"""Scores of all clips of a split with their galleries by the matching decoder."""

from collections.abc import Sequence

import numpy as np

from data_pipeline.format.reader import Split
from rice_jax.retrieval import inference
from rice_jax.retrieval.embeddings import EmbeddingStore, EvaluationPass, Faults
from rice_jax.retrieval.galleries import GalleryScorer
from rice_jax.retrieval.model import Model, check_decoder


def score_galleries(
    model: Model,
    split: Split,
    clip_rows: np.ndarray,
    image_rows: np.ndarray,
    *,
    galleries: Sequence[np.ndarray],
    gallery_of: np.ndarray,
    raw: bool,
    store: EmbeddingStore,
    show_progress: bool,
    faults: Faults | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns clip embeddings [Q, E], image embeddings [I, E], and each clip's scores with its gallery, [Q, L].

    All float32. Scores beyond a gallery's end are -inf; L is the largest gallery's size, rounded up to a power of two.
    Each of `galleries` has positions in `image_rows`, `gallery_of` is each clip's gallery, int [Q], and scores are
    cosines, or h . w if `raw`. Rows that cannot be read are added to `faults`; without it they raise ValueError. Raises
    ValueError also if the model was not trained to match.
    """
    check_decoder(model)
    width = model.config.model.embedding
    gallery_of_row = np.full(split.num_clips + 1, -1)  # the last one is for row -1, which fills up batches
    gallery_of_row[clip_rows] = gallery_of
    numbers = {"num_clips": len(clip_rows), "num_images": len(image_rows)}
    with EvaluationPass(model, split, **numbers, faults=faults, show_progress=show_progress) as encode:
        images_of = lambda rows: encode.images(rows, lambda _, *x: model.run(inference.encode_images_to_match, *x))
        kinds = {"images": width, "class-tokens": model.config.model.width}
        images, class_tokens = store.blocks(kinds, image_rows, images_of, encode.faults["image"])
        scorer = GalleryScorer(model.run, model.mesh, class_tokens, galleries, raw=raw)
        clips_of = lambda rows: encode.clips(rows, lambda batch, *x: scorer.score(gallery_of_row[batch], *x))
        kinds = {"clips": width, "raw-matches" if raw else "matches": scorer.width}
        clips, scores = store.blocks(kinds, clip_rows, clips_of, encode.faults["clip"])
    return clips, images, scores

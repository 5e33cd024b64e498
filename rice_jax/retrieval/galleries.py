"""Galleries on the devices, scored by the matching decoder for a batch of clips."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from rice_jax.parallel.mesh import P, process_rows, to_global
from rice_jax.retrieval import inference

AT_ONCE = 32  # shop images that a clip meets at once in matching: more takes memory, fewer makes narrow products


class GalleryScorer:
    """Class tokens of shop images on the devices, each once, and the galleries to be matched as rows of them."""

    def __init__(
        self,
        run: Callable[..., list[Array]],
        mesh: Mesh,
        class_tokens: np.ndarray,
        galleries: Sequence[np.ndarray],
        *,
        raw: bool,
    ) -> None:
        self._run, self._mesh, self._raw = run, mesh, raw
        self._sizes = np.array([*map(len, galleries), 0])  # the last is that of no clip, which fills a batch up
        self.width = max(1, -(-int(self._sizes.max()) // AT_ONCE)) * AT_ONCE
        self._rows = np.full((len(self._sizes), self.width), len(class_tokens), np.int32)
        for row, gallery in zip(self._rows, galleries, strict=False):
            row[: len(gallery)] = gallery
        nobody = np.zeros((1, class_tokens.shape[1]), np.float32)
        self._class_tokens = jax.make_array_from_process_local_data(
            NamedSharding(mesh, P()), np.concatenate([class_tokens, nobody])
        )

    def score(self, gallery_of: np.ndarray, frames: Array, mask: Array) -> list[Array]:
        """Embeddings [n, E] of a global batch of clips and their scores [n, width]; gallery -1: none, all -inf."""
        own = process_rows(len(gallery_of), self._mesh)
        shelf = to_global(self._rows[gallery_of[own]], self._mesh)
        count = np.int32(-(-int(self._sizes[gallery_of].max()) // AT_ONCE))
        clips = (frames, mask, shelf, self._class_tokens, count)
        return self._run(inference.match_clips, *clips, more=(self._raw, AT_ONCE))

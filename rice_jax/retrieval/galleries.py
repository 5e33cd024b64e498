"""Scores of clips with their galleries by the matching decoder, one batch of clips at a time."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from rice_jax.parallel.mesh import P, process_rows, to_global
from rice_jax.retrieval import inference

# Shop images scored at once for each clip, at most; a power of two. More take more memory, fewer make narrow products.
AT_ONCE = 32


def power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`; 1 for a count below 1."""
    return 1 << max(0, count - 1).bit_length()


class GalleryScorer:
    """Scores batches of clips; it keeps the class token of each shop image on the devices, once for all galleries.

    width: the number of scores a clip, the size of the largest gallery rounded up to a power of two. So galleries of
    many sizes share few compiled programs, and a small gallery costs little.
    """

    def __init__(
        self,
        run: Callable[..., list[Array]],
        mesh: Mesh,
        class_tokens: np.ndarray,
        galleries: Sequence[np.ndarray],
        *,
        raw: bool,
    ) -> None:
        """`run` and `raw` are as in Model; class_tokens float32 [I, D]; each gallery is its rows of `class_tokens`."""
        self._run, self._mesh, self._raw = run, mesh, raw
        self._sizes = np.array([*map(len, galleries), 0])  # the last one, -1, is for rows that fill up a batch
        self.width = power_of_two(int(self._sizes.max()))
        self._at_once = min(AT_ONCE, self.width)
        padding = max(len(class_tokens), self.width)  # the row of the class token that fills up galleries, the last
        self._rows = np.full((len(self._sizes), self.width), padding, np.int32)
        for row, gallery in zip(self._rows, galleries, strict=False):
            row[: len(gallery)] = gallery
        padded = np.pad(class_tokens, ((0, padding + 1 - len(class_tokens)), (0, 0)))
        self._class_tokens = jax.make_array_from_process_local_data(NamedSharding(mesh, P()), padded)

    def score(self, gallery_of: np.ndarray, frames: Array, mask: Array) -> list[Array]:
        """Returns embeddings [n, E] and scores [n, width], float32, of a global batch, -inf beyond a gallery's end.

        gallery_of: int [n], each clip's gallery; -1 for none, with all scores -inf. frames, mask: of encode_clips.
        """
        positions = process_rows(len(gallery_of), self._mesh)
        gallery = to_global(self._rows[gallery_of[positions]], self._mesh)
        steps = np.int32(-(-int(self._sizes[gallery_of].max()) // self._at_once))
        arrays = (frames, mask, self._class_tokens, gallery, steps)
        return self._run(inference.encode_and_score_clips, *arrays, options=(self._raw, self._at_once))

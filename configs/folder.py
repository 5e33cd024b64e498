"""Clips and shop images of one's own, converted with --layout folder: the simplest door (docs/own_clips.md).

The recipe of grocery.py, which starts from random weights; ARG names the losses as there. What fits to the set is left
to it: the batch, and whether there are clips for validation.
"""

from configs import grocery
from configs.default import Config


def get_config(arg: str = "icl_pmd_pfr") -> Config:
    c = grocery.get_config(arg)
    c.unlock()
    c.batch_size = 0
    c.data.eval_split = "auto"
    c.data.apply_exif = True  # a phone held upright writes the picture lying, and says so
    c.data.shrink_to = 2 * c.data.image_size  # phone pictures are large: 65 kB each in the cache in place of 36 MB
    return c.lock()

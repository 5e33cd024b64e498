"""Your own clips and shop images, converted with --layout folder: the simplest start (docs/own_clips.md).

The recipe of grocery.py, which starts from random weights; ARG names the losses as there. The batch size, and whether
there is a validation, follow from the data set.
"""

from configs import grocery
from configs.default import Config


def get_config(arg: str = "icl_pmd_pfr") -> Config:
    c = grocery.get_config(arg)
    c.unlock()
    c.batch_size = 0
    c.data.eval_split = "auto"
    c.data.apply_exif = True  # upright phones store pictures turned, with a note in EXIF
    c.data.shrink_to = 2 * c.data.image_size  # a phone's picture takes 65 kB of the cache, not 36 MB
    return c.lock()

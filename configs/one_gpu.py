"""A recipe for LPR750K in the memory of one GPU: --config one_gpu:RECIPE[:STAGE], RECIPE rice (default) or lpr750k.

The stages are those of lpr750k.py. Only the arithmetic and the order of the computation differ from RECIPE: the batch
is the same, and the losses are those of the whole batch. docs/scaling.md has the memory that a step needs.
"""

from configs import lpr750k, rice
from configs.default import Config

RECIPES = {"lpr750k": lpr750k, "rice": rice}


def get_config(arg: str = "rice") -> Config:
    recipe, _, stage = arg.partition(":")
    if recipe not in RECIPES:
        raise ValueError(f"{recipe!r}: no such recipe; recipes are {', '.join(RECIPES)}.")
    c = RECIPES[recipe].get_config(stage or "icl_pmd_pfr")
    c.unlock()
    c.model.dtype = "bfloat16"  # the fastest type; the official code trains in 16 bits, too
    c.model.remat = "dots"  # costs little time and saves most of the encoder's memory
    c.loss.micro_batch = 128  # pictures encoded at once: enough to keep a GPU busy
    c.loss.pair_chunk = 16
    return c.lock()

"""RICE at scale: --config pod:SIZE with SIZE b32, b16 or l14, as CLIP's ViTs. Needs data.path and init_from.

What fits where, and what a step needs at least: docs/scaling.md, by `python -m rice_jax.preflight`. The rates are the
defaults', made for batches of 96: nobody has tuned them for batches of this size.
"""

from configs import default

SIZES = {
    "b32": {},
    "b16": {"patch_size": 16},
    "l14": {"patch_size": 14, "width": 1024, "layers": 24, "heads": 16, "hidden": 4096, "embedding": 768},
}


def get_config(arg: str = "b32") -> default.Config:
    if arg not in SIZES:
        raise ValueError(f"--config pod:{arg}: no such size; sizes are {', '.join(SIZES)}.")
    c = default.get_config()
    c.unlock()
    c.batch_size = 32768
    c.eval_batch_size = 2048  # divides by the devices of any slice
    c.model.update(SIZES[arg])
    c.model.dtype = "bfloat16"  # what the chips multiply fastest
    c.model.remat = "dots"  # hardly any time for most of the encoder's memory
    # Pictures at once: enough to keep a chip busy, and a larger batch takes no more memory for its pictures.
    c.loss.micro_batch = 32 if arg == "l14" else 128
    c.loss.pair_chunk = 16
    c.loss.icl_chunk = 128  # rows of the [rows, G] similarities, which else grow with the square of the batch
    c.loss.icl_same_product = "masked"  # of 32,768 pairs of LPR4M some 1,600 share a product with another [9]
    c.loss.exclude_same_product = True  # and the same product once more is what mining would find first [7]
    return c.lock()

"""RICE at scale: --config pod:SIZE with SIZE b32, b16 or l14, as CLIP's ViTs. Needs data.path and init_from.

docs/scaling.md says which batch fits on which chips and how long a step takes at least, by `python -m
rice_jax.preflight`. The learning rates are the defaults, made for batches of 96; nobody has tuned them for this size.
Numbers in brackets are rows of the table in docs/official.md 11.
"""

from configs import default

SIZES = {
    "b32": {},
    "b16": {"patch_size": 16},
    "l14": {"patch_size": 14, "width": 1024, "layers": 24, "heads": 16, "hidden": 4096, "embedding": 768},
}


def get_config(arg: str = "b32") -> default.Config:
    if arg not in SIZES:
        raise ValueError(f"{arg!r}: no such size; sizes are {', '.join(SIZES)}.")
    c = default.get_config()
    c.unlock()
    c.batch_size = 32768
    c.eval_batch_size = 2048  # a multiple of the devices of any slice
    c.data.eval_gallery = 10_000  # LPR4M's validation has 332,438 images: all, every 500 updates, are half the input
    c.model.update(SIZES[arg])
    c.model.dtype = "bfloat16"  # the chips' fastest type
    c.model.remat = "dots"  # costs little time and saves most of the encoder's memory
    # Enough pictures to keep a chip busy; their memory does not grow with the batch.
    c.loss.micro_batch = 32 if arg == "l14" else 128
    c.loss.pair_chunk = 16
    c.loss.icl_chunk = 128  # else the similarities grow with the square of the batch
    c.loss.icl_same_product = "masked"  # about 1,600 of 32,768 pairs of LPR4M share a product with another [9]
    c.loss.exclude_same_product = True  # else mining finds the same product first [7]
    return c.lock()

"""A small ViT from random weights on a few hundred clips of a few dozen products, on the CPU of a laptop.

ARG names the losses: icl, icl_pmd, or icl_pmd_pfr (default). benchmarks/RESULTS.md has the figures, says how the recipe
was chosen, and which choices made no clear difference. Without CLIP's weights the danger is overfitting to 387 clips;
the departures from the official recipe reduce it.
"""

from configs import default


def get_config(arg: str = "icl_pmd_pfr") -> default.Config:
    c = default.get_config()
    c.unlock()
    c.batch_size = 64
    c.num_updates = 1300

    # Random frames, crops, colours and holes, so that pictures hardly repeat; 64 px, to be fast on a CPU.
    c.data.num_frames, c.data.frame_sampling, c.data.tail_cut = 2, "random_of_stored", False
    c.data.min_scale, c.data.max_aspect = 0.35, 1.2
    c.data.colour_jitter, c.data.white_balance, c.data.erase = 0.2, 0.08, 0.5
    # Evaluation crops the middle, because training's crops show products 1.2 times as large as whole pictures do.
    c.data.image_size, c.data.resize = 64, 76
    c.data.spread_products = True  # a batch has nearly as many products as clips
    c.data.cache_bytes = 2**30  # the whole set, decoded

    # Most of the encoder is convolutions: a patch embedding needs far more pictures to learn edges.
    c.model.patch_size, c.model.stem_channels, c.model.stem_blocks = 16, (32, 64, 128, 192), (1, 1, 1, 1)
    c.model.width, c.model.layers, c.model.heads, c.model.hidden, c.model.embedding = 192, 1, 3, 768, 128
    c.model.pool = "mean"
    c.model.decoder_heads = 3  # 64 channels a head, as in the encoder

    pmd, pfr = default.stage(arg)
    c.loss.pmd, c.loss.pfr = 0.5 * pmd, 0.1 * pfr  # PFR's tokens are large: 0.1 makes its loss comparable
    c.loss.icl_same_product, c.loss.exclude_same_product = "positive", True  # every batch repeats products
    c.loss.frame_icl = 0.5  # two frames of a clip show the same product
    c.loss.unit_slots, c.loss.unit_chunk = 4, 16

    c.optimizer.learning_rate, c.optimizer.decoder_lr_multiplier = 2e-3, 1.0  # nothing pretrained to preserve
    c.optimizer.warmup_updates = 50
    c.optimizer.b2, c.optimizer.eps, c.optimizer.eps_placing = 0.99, 1e-8, "corrected"
    c.optimizer.weight_decay, c.optimizer.decay_rule = 0.05, "no_1d"
    c.optimizer.clip_norm, c.optimizer.ema_decay = 1.0, 0.99

    c.log_every, c.eval_every, c.checkpoint_every = 50, 500, 250
    c.eval_flip = True
    return c.lock()

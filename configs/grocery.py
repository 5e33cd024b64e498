"""A small ViT from random weights on a few hundred clips, on a laptop's CPU: the sizes of the set in ../shared/data.

ARG names the losses: icl, icl_pmd, or icl_pmd_pfr (default).
"""

import ml_collections

from configs import default


def get_config(arg: str = "icl_pmd_pfr") -> ml_collections.ConfigDict:
    c = default.get_config()
    c.unlock()
    c.batch_size = 64
    c.num_updates = 1500
    c.data.num_frames, c.data.frame_sampling, c.data.tail_cut = 2, "random", False
    c.data.image_size = c.data.resize = 64
    c.data.min_scale, c.data.max_aspect, c.data.colour_jitter = 0.6, 1.15, 0.2
    c.data.cache_bytes = 2**30
    c.model.patch_size, c.model.stem_channels, c.model.stem_blocks = 16, (32, 64, 128, 192), (0, 0, 0, 0)
    c.model.width, c.model.layers, c.model.heads, c.model.hidden, c.model.embedding = 192, 3, 3, 768, 128
    c.model.decoder_heads = 3
    c.loss.pmd, c.loss.pfr = float("pmd" in arg), 0.1 * ("pfr" in arg)
    c.loss.icl_same_product, c.loss.exclude_same_product = "positive", True
    c.optimizer.learning_rate, c.optimizer.decoder_lr_multiplier = 1e-3, 1.0
    c.optimizer.warmup_updates = 50
    c.optimizer.b2, c.optimizer.eps, c.optimizer.eps_placing = 0.99, 1e-8, "corrected"
    c.optimizer.weight_decay, c.optimizer.decay_rule = 0.05, "no_1d"
    c.optimizer.clip_norm, c.optimizer.ema_decay = 1.0, 0.99
    c.log_every, c.eval_every, c.checkpoint_every = 50, 500, 500
    return c.lock()

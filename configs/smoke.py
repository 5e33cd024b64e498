"""The smallest RICE that has every part, for tests and a first try on any machine. Set data.path."""

from configs import default


def get_config() -> default.Config:
    c = default.get_config()
    c.unlock()
    c.batch_size = 8
    c.num_updates = 6
    c.data.num_frames = c.data.eval_num_frames = 4  # evenly spaced ones of a clip are among the ten that are stored
    c.data.image_size, c.data.resize = 32, 36
    c.model.patch_size = 16
    c.model.width, c.model.layers, c.model.heads, c.model.hidden, c.model.embedding = 32, 2, 2, 64, 16
    c.model.decoder_heads = 4
    c.optimizer.learning_rate, c.optimizer.decoder_lr_multiplier = 1e-3, 1.0  # no pretrained weights to preserve
    c.optimizer.warmup_updates = 2
    c.log_every, c.eval_every, c.checkpoint_every = 2, 0, 3
    c.eval_batch_size = 16
    return c.lock()

"""Computes the cost of a training example: multiply-adds (MACs) of the model's products (docs/official.md 14).

A compiler counts the body of a loop once, and so a stack of layers as one layer. Hence formulas. FLOP = 2 MACs.
Letters: T tokens of a picture, D width, N frame slots, S = N*T decoder keys, G global batch.
"""

from typing import NamedTuple

from rice_jax.config import Config
from rice_jax.losses.pairs import NUM_HARD


class Cost(NamedTuple):
    """FLOP of one example, in the forward and the backward pass."""

    needed: float  # each product once
    repeated: float  # forward products that the backward pass computes again, to save memory

    @property
    def total(self) -> float:
        return self.needed + self.repeated


def tokens(config: Config) -> int:
    """Returns T, the tokens of a picture in training: the class token and the patches that patch_drop keeps."""
    patches = (config.data.image_size // config.model.patch_size) ** 2
    if config.loss.patch_drop:
        patches = max(1, round(patches * (1 - config.loss.patch_drop)))
    return 1 + patches


def embedding_macs(config: Config) -> int:
    """Returns the MACs from a picture's pixels to its patch embeddings, before patches are dropped."""
    c, side = config.model, config.data.image_size
    patches = (side // c.patch_size) ** 2
    if not c.stem_channels:
        return 3 * c.patch_size**2 * patches * c.width
    macs, before = 0, 3
    for channels, blocks in zip(c.stem_channels, c.stem_blocks, strict=True):
        side = -(-side // 2)
        macs += 9 * side**2 * channels * (before + 2 * blocks * channels)
        before = channels
    return macs + patches * before * c.width


def block_macs(config: Config, rows: int) -> int:
    """Returns the MACs of a transformer block in which `rows` tokens attend to one another."""
    d = config.model.width
    return rows * (4 * d**2 + 2 * d * config.model.hidden) + 2 * rows**2 * d


def encoder_macs(config: Config) -> int:
    """Returns the MACs of the encoder's forward pass for one picture."""
    c, t = config.model, tokens(config)
    return embedding_macs(config) + c.layers * block_macs(config, t) + c.width * c.embedding


def mining_directions(config: Config) -> int:
    return 2 if config.loss.mining_direction == "both" else 1


def logit_macs(config: Config) -> int:
    """Returns the MACs of one matching logit, from an image's query and a clip's keys and values on."""
    # Only the image's class token is read (docs/official.md 5.4 to 5.6).
    c, d = config.model, config.model.width
    keys = config.data.num_frames * tokens(config)
    return keys * d + d**2 + 2 * d * c.hidden + d**2  # values, out_proj, MLP, pooler


def positive_macs(config: Config) -> int:
    """Returns the MACs of an example's positive pair in the decoder and in PFR, forward."""
    c, d, t = config.model, config.model.width, tokens(config)
    keys = config.data.num_frames * t
    scores = t * d**2 + t * keys * d
    macs = block_macs(config, t) + 2 * keys * d**2 + scores + logit_macs(config)
    if config.loss.pfr:
        mixed = max(1, c.decoder_heads // 2)
        macs += t * keys * (d + c.decoder_heads * mixed + mixed)
    return macs


def hard_macs(config: Config) -> int:
    """Returns the MACs of an example's hard pairs, forward, without the keys and values that its positive pair has."""
    keys, d = config.data.num_frames * tokens(config), config.model.width
    return mining_directions(config) * NUM_HARD * (d**2 + keys * d + logit_macs(config))


def example_cost(config: Config, *, devices: int) -> Cost:
    """Returns the cost, FLOP, of one example in a training step with a global batch that `devices` devices share."""
    # A backward pass costs two forward ones (docs/official.md 14).
    options, total = config.loss, config.batch_size
    rows, pictures = total // devices, 1 + config.data.num_frames
    encoder = pictures * encoder_macs(config)
    icl = total * config.model.embedding * (1 if options.icl_form == "sigmoid" else 2) * (2 if options.frame_icl else 1)
    forward, mining, again = encoder + icl, 0, 0
    if 0 < options.micro_batch < rows * pictures:
        again += encoder
    if config.model.remat != "none":
        t, layers, d = tokens(config), config.model.layers, config.model.width
        # "dots" keeps the products with parameters and computes those of tokens with one another again.
        once_more = 2 * t**2 * d if config.model.remat == "dots" else block_macs(config, t)
        again += pictures * layers * once_more
    if 0 < options.icl_chunk < rows:
        again += icl
    if options.pmd or options.pfr:
        forward += positive_macs(config)
        again += positive_macs(config) if 0 < options.pair_chunk < rows else 0
    if options.pmd:
        forward += hard_macs(config)
        again += hard_macs(config)  # losses/pairs.py always computes them again
        mining = mining_directions(config) * total * config.model.embedding
    return Cost(needed=2.0 * (3 * forward + mining), repeated=2.0 * again)

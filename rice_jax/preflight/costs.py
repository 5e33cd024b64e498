"""The cost of a training example: multiply-adds of the model's products by formula (docs/official.md 14).

A compiler's own count meets the body of a loop once, hence a stack of layers as one layer.
Letters: T tokens a picture, D width, N frame slots, S = N*T decoder keys, G global batch. FLOP = 2 multiply-adds.
"""

from typing import Any, NamedTuple

from rice_jax.losses.pairs import NUM_HARD


class Cost(NamedTuple):
    """FLOP of one example, forward and backward."""

    needed: float  # each product once
    repeated: float  # forward products made again in the backward pass, to save memory

    @property
    def total(self) -> float:
        return self.needed + self.repeated


def tokens(config: Any) -> int:
    """T of a training step: those that patch_drop leaves."""
    patches = (config.data.image_size // config.model.patch_size) ** 2
    if config.loss.patch_drop:
        patches = max(1, round(patches * (1 - config.loss.patch_drop)))
    return 1 + patches


def embedding_macs(config: Any) -> int:
    """A picture's pixels to its patches, none of them dropped yet."""
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


def block_macs(config: Any, rows: int) -> int:
    """A transformer block on `rows` tokens that see one another."""
    d = config.model.width
    return rows * (4 * d**2 + 2 * d * config.model.hidden) + 2 * rows**2 * d


def encoder_macs(config: Any) -> int:
    """A picture through the encoder, forward."""
    c, t = config.model, tokens(config)
    return embedding_macs(config) + c.layers * block_macs(config, t) + c.width * c.embedding


def directions(config: Any) -> int:
    return 2 if config.loss.mining_direction == "both" else 1


def logit_macs(config: Any) -> int:
    """One image's class token, queries made, against a clip's keys and values: docs/official.md 5.4 to 5.6."""
    c, d = config.model, config.model.width
    keys = config.data.num_frames * tokens(config)
    return keys * d + d**2 + 2 * d * c.hidden + d**2  # values, out_proj, MLP, pooler


def positive_macs(config: Any) -> int:
    """What an example's own pair asks of the decoder and of the reconstruction, forward."""
    c, d, t = config.model, config.model.width, tokens(config)
    keys = config.data.num_frames * t
    scores = t * d**2 + t * keys * d
    macs = block_macs(config, t) + 2 * keys * d**2 + scores + logit_macs(config)
    if config.loss.pfr:
        mixed = max(1, c.decoder_heads // 2)
        macs += t * keys * (d + c.decoder_heads * mixed + mixed)
    return macs


def hard_macs(config: Any) -> int:
    """The hard pairs of an example, forward; a clip's keys and values are there already."""
    keys, d = config.data.num_frames * tokens(config), config.model.width
    return directions(config) * NUM_HARD * (d**2 + keys * d + logit_macs(config))


def example_cost(config: Any, *, devices: int) -> Cost:
    """Of a training step over `devices` devices; the backward pass is twice the forward one (docs/official.md 14)."""
    options, total = config.loss, config.batch_size
    rows, pictures = total // devices, 1 + config.data.num_frames
    encoder = pictures * encoder_macs(config)
    icl = total * config.model.embedding * (1 if options.icl_form == "sigmoid" else 2) * (2 if options.frame_icl else 1)
    forward, mining, again = encoder + icl, 0, 0
    if 0 < options.micro_batch < rows * pictures:
        again += encoder
    if config.model.remat != "none":
        t, layers, d = tokens(config), config.model.layers, config.model.width
        # "dots" keeps the products with parameters; those of tokens with one another are made again.
        once_more = 2 * t**2 * d if config.model.remat == "dots" else block_macs(config, t)
        again += pictures * layers * once_more
    if 0 < options.icl_chunk < rows:
        again += icl
    if options.pmd or options.pfr:
        forward += positive_macs(config)
        again += positive_macs(config) if 0 < options.pair_chunk < rows else 0
    if options.pmd:
        forward += hard_macs(config)
        again += hard_macs(config)  # always: pairs.decode_units
        mining = directions(config) * total * config.model.embedding
    return Cost(needed=2.0 * (3 * forward + mining), repeated=2.0 * again)

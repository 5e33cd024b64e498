"""The table of all config fields: name, type with allowed values, default, meaning, unit, and when it may change.

The other configs change only what differs. `python -m configs.default > docs/config.md` prints the table for readers.
The defaults are the official code's. A number in brackets, as [15], is a row of the table in docs/official.md 11.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, TypeVar, get_args, get_origin

import ml_collections

T = TypeVar("T")
# Where a value may differ from the one that the run began with. "on resume" includes evaluation, "per host" both.
Change = Literal["no", "in evaluation", "on resume", "per host"]


class Limit(NamedTuple):
    """A bound of a number, as text and as a test."""

    text: str
    allows: Callable[[float], bool]


Count = Annotated[int, Limit("at least 1", lambda x: x >= 1)]
Natural = Annotated[int, Limit("at least 0", lambda x: x >= 0)]
Devices = Annotated[int, Limit("at least 1, or -1", lambda x: x >= 1 or x == -1)]
Finite = Annotated[float, Limit("", math.isfinite)]
NotNegative = Annotated[float, Limit("at least 0", lambda x: 0 <= x < math.inf)]
Share = Annotated[float, Limit("at least 0 and at most 1", lambda x: 0 <= x <= 1)]
Rate = Annotated[float, Limit("at least 0 and less than 1", lambda x: 0 <= x < 1)]
AreaShare = Annotated[float, Limit("more than 0 and at most 1", lambda x: 0 < x <= 1)]
Factor = Annotated[float, Limit("at least 1", lambda x: 1 <= x < math.inf)]


def field(default: T, meaning: str, unit: str = "", *, change: Change = "no") -> T:
    """Returns (default, meaning, unit, change), a field's declaration. To mypy it is the default; `rows` reads it."""
    row: Any = (default, meaning, unit, change)
    return row


class Section:
    """The type of a ConfigDict for mypy: no code makes instances of it or of the classes below."""

    if TYPE_CHECKING:  # the methods of ConfigDict that this project uses; ml_collections has no types

        def lock(self) -> Self: ...
        def unlock(self) -> Self: ...
        def unlocked(self) -> AbstractContextManager[Self]: ...
        def update(self, changes: Mapping[str, Any]) -> None: ...
        def keys(self) -> list[str]: ...
        def items(self) -> list[tuple[str, Any]]: ...
        def __getitem__(self, name: str) -> Any: ...
        def __setitem__(self, name: str, value: Any) -> None: ...


class DataConfig(Section):
    """The choice of clips and pictures, and how pictures become arrays."""

    path: str = field("", "folder made by data_pipeline.convert", change="per host")
    train_split: str = field("train", "split to train on")
    eval_split: str = field("val", 'split to evaluate; "": none; "auto": val if the set has it', change="on resume")
    eval_gallery: Natural = field(
        0, "in training's evaluations: shop images drawn by seed beside the queries' own; 0: all", change="on resume"
    )
    skip_clips: tuple[str, ...] = field((), "ids of training clips to leave out; part of the plan's fingerprint")
    spread_products: bool = field(False, "spread each product's clips evenly over an epoch, so that batches repeat few")
    num_frames: Count = field(10, "N: frame slots of a clip in training", "frames")
    eval_num_frames: Count = field(10, "frame slots of a clip in evaluation", "frames", change="on resume")
    image_size: Count = field(224, "side of the pictures that the encoder reads", "px")
    resize: Count = field(256, "side before the crop; with min_scale or max_aspect in evaluation only", "px")
    resize_mode: Literal["stretch", "keep_ratio"] = field(
        "stretch", "stretch to a square (bilinear), or resize the shorter side (bicubic), as CLIP [17]"
    )
    frame_sampling: Literal["uniform", "random", "random_of_stored"] = field(
        "uniform",
        "evenly spaced frames of a clip; in training also a sorted random subset: of the clip's (needs --frames all), "
        "or of those stored",
    )
    tail_cut: bool = field(True, "in training, half of the full clips lose a random tail (docs/official.md 9.2)")
    test_tail_cut: bool = field(False, "in evaluation too, as official: Recall gets random [15]", change="on resume")
    flip: bool = field(True, "mirror pictures with probability 0.5, in training")
    consistent_augment: bool = field(False, "one crop and flip for a whole clip instead of one a frame [16]")
    min_scale: AreaShare = field(1.0, "below 1: training crops at random at least this share of the area, then resizes")
    max_aspect: Factor = field(1.0, "above 1: width : height of that crop is off by up to this factor, either way")
    shrink_to: Natural = field(0, "shorter side to which pictures shrink before it, to save memory; 0: do not", "px")
    colour_jitter: Share = field(0.0, "strength of changes of brightness, contrast and saturation, in training")
    white_balance: Share = field(0.0, "w: red, green and blue are each multiplied by 1 - w to 1 + w, in training")
    erase: Share = field(0.0, "probability of painting over a square of 0.2 to 0.5 of the side, in training")
    apply_exif: bool = field(False, "turn pictures as their EXIF orientation says", change="in evaluation")
    to_srgb: bool = field(
        False, "convert colours of other ICC profiles, as phones write, to sRGB", change="in evaluation"
    )
    cache_bytes: Natural = field(0, "memory for decoded and resized training pictures", "bytes", change="per host")
    threads: Natural = field(4, "threads of each process that read, decode and resize", change="per host")
    workers: Natural = field(0, "extra processes that read, decode and resize; 0: the main one does", change="per host")


class ModelConfig(Section):
    """The encoder and the matching decoder."""

    patch_size: Count = field(32, "side of a patch", "px")
    stem_channels: tuple[Count, ...] = field((), "channels of stride-2 convolutions that replace the patch embedding")
    stem_blocks: tuple[Natural, ...] = field((), "residual blocks, of two convolutions each, after each of them")
    pool: Literal["class_token", "mean"] = field("class_token", "token to embed, or the mean of all tokens")
    width: Count = field(768, "D: channels of a token")
    layers: Count = field(12, "L: blocks of the encoder")
    heads: Count = field(12, "heads of the encoder; CLIP has D/64")
    hidden: Count = field(3072, "hidden channels of the MLPs")
    embedding: Count = field(512, "E: channels of an embedding")
    activation: Literal["quick_gelu", "gelu"] = field(
        "quick_gelu", "activation of the MLPs; must be that of the pretrained weights. A stem has ReLU"
    )
    decoder_heads: Count = field(8, "H: heads of the decoder; CLIP's blocks were trained with D/64 [3]")
    decoder_self_eps: NotNegative = field(1e-12, "LayerNorm epsilon of the decoder's self layer; elsewhere 1e-5 [6]")
    cross_kv_norm: bool = field(False, "LayerNorm before the decoder's keys and values [4]")
    logit_scale_init: Finite = field(4.0, "s at the start: logits are s^2 cos [10]")
    logit_bias_init: Finite = field(-10.0, 'b at the start: with icl_form "sigmoid" logits are s^2 cos + b')
    dtype: Literal["float32", "bfloat16"] = field(
        "float32", "type of matrix products; parameters, softmax and losses stay float32 [35, 36]"
    )
    matmul_precision: Literal["highest", "default"] = field(
        "highest",
        "with dtype float32: products in float32 on every device; or in what jax chooses, TF32 on GPUs and bfloat16 on "
        "TPUs. CPUs know no difference",
    )
    remat: Literal["none", "dots", "full"] = field(
        "none", "what the backward pass recomputes to save memory: nothing, all but matrix products, or all"
    )


class LossConfig(Section):
    """The losses, and how much of them is computed at once."""

    icl: NotNegative = field(1.0, "weight of ICL in the sum")
    icl_form: Literal["softmax", "sigmoid"] = field(
        "softmax", "softmax over the global batch, as RICE; or a sigmoid of each pair, as SigLIP"
    )
    icl_chunk: Natural = field(0, "rows at once of the [rows, G] similarities in ICL and mining; 0: all")
    frame_icl: NotNegative = field(0.0, "weight of ICL between a clip's even and odd frames; not in RICE")
    patch_drop: Rate = field(0.0, "share of each picture's patches that training does not encode")
    pmd: NotNegative = field(1.0, "weight of PMD; if pmd and pfr are 0, the model has no decoder")
    pfr: NotNegative = field(1.0, "weight of PFR")
    icl_same_product: Literal["negative", "masked", "positive"] = field(
        "negative", "how ICL treats other pairs of the same product [9]"
    )
    exclude_same_product: bool = field(False, "mining skips pairs that show the anchor's product [7]")
    mining_direction: Literal["image_to_clip", "clip_to_image", "both"] = field(
        "image_to_clip", "images mine hard clips, clips mine hard images, or the mean of both losses [8]"
    )
    cross_dropout: Rate = field(0.1, "dropout on the attention weights of matched pairs, in training [34]")
    pfr_attention: Literal["prob_scaled", "prob", "score"] = field(
        "prob_scaled", "PFR's input: attention weights times sqrt(D/H), attention weights, or scores [2]"
    )
    pfr_mask_padding: bool = field(False, "keep padding out of PFR's softmax [1]")
    pfr_with_class_token: bool = field(True, "class tokens are among PFR's rows, sources and targets [29]")
    micro_batch: Natural = field(0, "pictures encoded at once, and again in the backward pass; 0: all, only once")
    pair_chunk: Natural = field(0, "positive pairs decoded at once; 0: all")
    unit_slots: Count = field(8, "hard pairs of a clip for which its keys and values are read once: a unit")
    unit_chunk: Count = field(8, "units decoded at once")


class OptimizerConfig(Section):
    """AdamW and the learning rate."""

    learning_rate: NotNegative = field(1e-6, "peak rate of the encoder")
    decoder_lr_multiplier: NotNegative = field(100.0, "for decoder, pooler and heads (docs/official.md 7.1)")
    logit_scale_lr_multiplier: NotNegative = field(1.0, "for s and b; 100 in the official LPR model of ICL alone [10]")
    warmup_updates: Natural = field(500, "linear rise of the rate from 0; then a cosine to 0 at num_updates", "updates")
    b1: Rate = field(0.9, "decay of Adam's first moment")
    b2: Rate = field(0.999, "decay of Adam's second moment")
    eps: NotNegative = field(1e-6, "epsilon in Adam's denominator")
    eps_placing: Literal["uncorrected", "corrected"] = field(
        "uncorrected", "add eps to sqrt(v) without bias correction, as the official AdamW; or with it, as usual [12]"
    )
    weight_decay: NotNegative = field(0.2, "multiplied by the learning rate and applied after the step")
    decay_rule: Literal["official", "no_1d"] = field("official", "all but biases decay; or matrices only [11]")
    clip_norm: NotNegative = field(0.0, "largest norm of the gradient; 0: no limit")
    ema_decay: Rate = field(0.0, "decay of an average of the weights, which evaluation uses instead; 0: no average")


class MeshConfig(Section):
    """The mesh of all hosts' devices. One of the two may be -1: all devices that the other leaves."""

    data: Devices = field(-1, "devices along the batch", change="on resume")
    fsdp: Devices = field(1, "devices that share the parameters' memory", change="on resume")


class Config(Section):
    """The run: batches, length, logs, evaluations, checkpoints and limits."""

    seed: Natural = field(42, "seed of initialisation, order of data, augmentation and dropout")
    batch_size: Natural = field(
        96, "G: pairs (clip, shop image) on all devices; 0: fits the set (docs/training.md)", "pairs"
    )
    init_from: str = field("", 'weights to start from: a file or a run (docs/weights.md); "": random')
    num_updates: Count = field(5000, "optimiser steps; an incomplete batch at an epoch's end is dropped", "updates")

    data: DataConfig
    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig

    max_nonfinite_updates: Natural = field(
        10, "most to skip in a row when loss or gradient is not finite; one more ends", "updates", change="on resume"
    )
    stall_seconds: NotNegative = field(
        600.0, "report a longer wait for a batch or step, with all stacks; 0: never", "seconds", change="on resume"
    )
    stall_ends: Literal["auto", "true", "false"] = field(
        "auto", "after as long again, end with status 1, to be restarted; auto: if there are several processes",
        change="on resume",
    )  # fmt: skip
    log_every: Count = field(50, "between lines of metrics.jsonl and TensorBoard", "updates", change="on resume")
    eval_every: Natural = field(500, "between evaluations; 0: only at the end", "updates", change="on resume")
    eval_flip: bool = field(False, "evaluation adds the pooled vector of each mirror image", change="on resume")
    eval_batch_size: Count = field(64, "encoded at once, over all devices", "clips", change="on resume")
    checkpoint_every: Count = field(500, "between checkpoints; one more at the end", "updates", change="on resume")
    checkpoints_kept: Count = field(3, "newest checkpoints to keep", change="on resume")
    checkpoints_kept_every: Natural = field(0, "also keep multiples of this; 0: none", "updates", change="on resume")
    checkpoints_kept_best: bool = field(True, "also keep the evaluated one with best recall@1", change="on resume")


class Field(NamedTuple):
    """One row of the table."""

    item: type  # of the value, or of a tuple's items: bool, int, float or str
    limit: Limit
    choices: tuple[str, ...]  # empty: any
    default: Any
    meaning: str
    unit: str
    change: Change

    def has_type(self, value: Any) -> bool:
        """Returns whether the value has the field's type; a whole number is a number too, infinity is none."""
        if isinstance(value, tuple) != isinstance(self.default, tuple):
            return False
        kinds = (int, float) if self.item is float else self.item
        items = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(item, kinds) and isinstance(item, bool) == (self.item is bool) for item in items):
            return False
        return self.item is not float or all(abs(item) <= sys.float_info.max for item in items)  # no 10**400

    def allows(self, value: Any) -> bool:
        """Returns whether the value, which must have the field's type, is within the limit and among the choices."""
        items = value if isinstance(value, tuple) else (value,)
        return all(self.limit.allows(item) and (not self.choices or item in self.choices) for item in items)

    @property
    def values(self) -> str:
        """The allowed values in words, never empty: "one of stretch, keep_ratio", "a whole number of at least 1"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        one = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}[self.item]
        one = f"{one} of {self.limit.text}" if self.limit.text else one
        return f"values separated by commas, each {one}" if isinstance(self.default, tuple) else one


def rows(section: Any, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Yields (dotted name, field) of a section and of the sections in it, in the order of declaration."""
    for name, kind in section.__annotations__.items():
        if not hasattr(section, name):
            yield from rows(kind, f"{prefix}{name}.")
            continue
        limit, choices = Limit("", lambda _: True), ()
        if get_origin(kind) is tuple:
            kind = get_args(kind)[0]
        if get_origin(kind) is Annotated:
            kind, limit = get_args(kind)
        if get_origin(kind) is Literal:
            kind, choices = str, get_args(kind)
        yield prefix + name, Field(kind, limit, choices, *getattr(section, name))


FIELDS = dict(rows(Config))  # by dotted name, as data.path


def get_config() -> Config:
    """Returns the defaults as a locked ConfigDict: RICE with ViT-B/32 as the official code trains it, without data."""
    nested: dict[str, Any] = {}
    for dotted, each in FIELDS.items():
        section, _, name = dotted.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = each.default
    return ml_collections.ConfigDict(nested).lock()


STAGES = ("icl", "icl_pmd", "icl_pmd_pfr")


def stage(name: str) -> tuple[float, float]:
    """Returns whether a stage has PMD and PFR, each as 0.0 or 1.0. Raises ValueError for an unknown stage."""
    if name not in STAGES:
        raise ValueError(f"{name!r}: no such stage; stages are {', '.join(STAGES)}.")
    return float("pmd" in name), float("pfr" in name)


HEADER = """# Config fields

This file is generated: `python -m configs.default > docs/config.md`. The table is `configs/default.py`; a field is set
by `--config.FIELD=VALUE` or in a config file of your own (`c.FIELD = VALUE`). Defaults are written as in `config.json`.

The last column says when a value may differ from the one that the run began with: **no**: never; **in evaluation**:
`python -m rice_jax.evaluate` may set it; **on resume**: a run that goes on may set it too; **per host**: each host of a
run may have its own value too. A number in brackets, as [15], is a row of the table in section 11 of `official.md`.
"""


def document() -> str:
    """Returns the text of docs/config.md, Markdown: a table for the run's own fields, then one for each section."""
    sections = {name: kind for name, kind in Config.__annotations__.items() if not hasattr(Config, name)}
    text = HEADER
    for section, kind in {"": Config, **sections}.items():
        text += f"\n## {section or 'run'}\n\n{kind.__doc__}\n\n"
        text += "| field | default | values | meaning | unit | may change |\n|---|---|---|---|---|---|\n"
        for name, each in FIELDS.items():
            if name.rpartition(".")[0] == section:
                default = f"`{json.dumps(each.default)}`"
                cells = (f"`{name}`", default, each.values, each.meaning, each.unit, each.change)
                text += f"| {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    print(document(), end="")

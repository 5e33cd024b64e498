"""Reading a config: a file or the name of a shipped one, then overrides; and comparing two.

Written as ml_collections' own flags are (`--config FILE[:ARG] --config.field=value`), but with argparse: those flags
report a mistyped field as its bare name, and a file that is not there at the first use of the config.
"""

import argparse
import copy
import difflib
import importlib.util
import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from configs import default

SHIPPED = Path(default.__file__).parent


def shipped_path(name: str) -> str:
    """'grocery', 'grocery.py', 'configs/grocery.py' or any path, with or without ':ARG', as a file that exists.

    Raises:
      FileNotFoundError: neither a file nor a shipped config; names those shipped.
    """
    file, colon, argument = name.partition(":")
    candidates = [Path(file), SHIPPED / Path(file).with_suffix(".py").name]
    if file and "/" in file and Path(file).parts[0] != "configs":
        candidates = candidates[:1]  # a path of the user's own is never replaced by a shipped file of the same name
    for path in candidates:
        if path.is_file():
            return f"{path}{colon}{argument}"
    names = sorted(p.stem for p in SHIPPED.glob("*.py") if p.stem != "__init__")
    raise FileNotFoundError(
        f"--config {file}: no such file, and no shipped config of that name; shipped are {', '.join(names)}."
    )


def check_field(config: ml_collections.ConfigDict, dotted: str) -> None:
    """Raises ValueError, naming the nearest field, when `dotted` is no field of the config."""
    known = flat(config)
    sections = {name.rpartition(".")[0] for name in known}
    if dotted in known or dotted in sections:
        return
    leaf = dotted.rpartition(".")[2]
    if "accum" in leaf:
        raise ValueError(
            f"--config.{dotted}: gradients are not accumulated, because a contrastive loss over parts of a batch is "
            "another loss; for a large batch on few devices set loss.micro_batch, and model.remat to dots or full: the "
            "same loss and gradients in less memory."
        )
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(dotted, known, n=1, cutoff=0.7)
    near = near or [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    initials = [name for short, name in by_leaf.items() if "".join(word[0] for word in short.split("_")) == leaf]
    near = near or initials[:1]  # lr
    hint = f"the nearest is --config.{near[0]}" if near else f"fields are {', '.join(known)}"
    raise ValueError(f"--config.{dotted}: the config has no such field; {hint}.")


def load(name: str) -> ml_collections.ConfigDict:
    """The config of FILE[:ARG], FILE a path or the name of a shipped one."""
    path, colon, argument = shipped_path(name).partition(":")
    spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config {path}: is no Python file; give one with a function get_config().")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config {path}: has no function get_config(); see configs/default.py.")
    if colon and not inspect.signature(module.get_config).parameters:
        raise ValueError(f"--config {name}: that config takes no argument after the colon.")
    return module.get_config(argument) if colon else module.get_config()


def override(config: ml_collections.ConfigDict, dotted: str, text: str) -> None:
    """Sets a field from text, which must read as the field's own type; tuples are words separated by commas."""
    check_field(config, dotted)
    *parents, leaf = dotted.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    kind = type(section[leaf])
    try:
        if kind is bool:
            value: Any = {"true": True, "false": False}[text.lower()]
        elif kind is tuple:
            words = [word for word in text.split(",") if word]
            value = tuple(int(word) for word in words) if dotted.startswith("model.") else tuple(words)
        elif kind in (int, float, str):
            value = kind(text)
        else:
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(
            f"--config.{dotted}={text}: needs a value of type {kind.__name__}, such as {section[leaf]!r}."
        ) from None
    section[leaf] = value


def split_override(word: str) -> tuple[str, str]:
    """'--config.a.b=c' as ('a.b', 'c'); ValueError for anything else."""
    name, equals, text = word.removeprefix("--config.").partition("=")
    if not word.startswith("--config."):
        raise ValueError(f"{word}: there is no such option; --help lists them.")
    if not equals:
        raise ValueError(f"{word}: not understood; fields of the config are set as --config.field=value.")
    return name, text


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command that takes --config and --config.field=value; `config` is then the config, locked.

    Wrong use is one line on stderr and exit status 2.
    """
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="a path or the name of a shipped config; --config.field=value sets a field",
    )
    arguments, rest = parser.parse_known_args(argv)
    try:
        arguments.config = load(arguments.config)
        for word in rest:
            override(arguments.config, *split_override(word))
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    arguments.config.lock()
    return arguments


# What a run may change when it goes on: none of it moves a batch or a loss.
FREE = (
    "mesh", "log_every", "eval_every", "checkpoint_every", "checkpoints_kept",
    "checkpoints_kept_every", "checkpoints_kept_best", "max_nonfinite_updates", "stall_seconds", "stall_ends",
    "data.path",
    "data.threads", "data.workers", "data.cache_bytes", "data.eval_split", "data.eval_num_frames",
    "data.test_tail_cut", "eval_batch_size", "eval_flip",
)  # fmt: skip


EVALUATED = (*FREE, "data.apply_exif")  # what an evaluation may set


FITTED_BATCH = 64  # pairs, at most, of a batch that fits to the set


CHOICES = {
    "data.resize_mode": ("stretch", "keep_ratio"),
    "data.frame_sampling": ("uniform", "random"),
    "model.activation": ("quick_gelu", "gelu"),
    "model.pool": ("class_token", "mean"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "loss.icl_form": ("softmax", "sigmoid"),
    "loss.icl_same_product": ("negative", "masked", "positive"),
    "loss.mining_direction": ("image_to_clip", "clip_to_image", "both"),
    "loss.pfr_attention": ("prob_scaled", "prob", "score"),
    "optimizer.eps_placing": ("uncorrected", "corrected"),
    "optimizer.decay_rule": ("official", "no_1d"),
}


COUNTS = (  # at least 1
    "num_updates", "log_every", "checkpoint_every", "eval_batch_size", "checkpoints_kept",
    "data.num_frames", "data.eval_num_frames", "data.image_size", "model.patch_size", "model.width", "model.layers",
    "model.heads", "model.hidden", "model.embedding", "model.decoder_heads", "loss.unit_slots", "loss.unit_chunk",
)  # fmt: skip


NOT_NEGATIVE = (
    "seed", "batch_size", "eval_every", "checkpoints_kept_every", "max_nonfinite_updates", "stall_seconds",
    "data.threads", "data.workers", "data.cache_bytes",
    "loss.icl", "loss.pmd", "loss.pfr", "loss.frame_icl", "loss.icl_chunk", "loss.micro_batch",
    "loss.pair_chunk",
    "model.decoder_self_eps", "optimizer.learning_rate", "optimizer.decoder_lr_multiplier",
    "optimizer.logit_scale_lr_multiplier", "optimizer.warmup_updates", "optimizer.eps", "optimizer.weight_decay",
    "optimizer.clip_norm",
)  # fmt: skip


SHARES = (  # 0 to 1, without 1
    "loss.cross_dropout", "loss.patch_drop", "optimizer.b1", "optimizer.b2", "optimizer.ema_decay",
)  # fmt: skip


def validate(config: Any) -> None:
    """Raises ValueError with every value of the config that cannot be meant (data_pipeline checks the frames')."""
    f, faults = flat(config), []
    for name, choices in CHOICES.items():
        if f[name] not in choices:
            faults.append(f"{name} is {f[name]!r}, needs one of {', '.join(choices)}")
    for names, low, high in ((COUNTS, 1, math.inf), (NOT_NEGATIVE, 0, math.inf), (SHARES, 0, 1)):
        for name in names:
            if not low <= f[name] < high:
                faults.append(
                    f"{name} is {f[name]}, needs at least {low}" + (f" and less than {high}" if high == 1 else "")
                )
    if faults:
        raise ValueError("config: " + "; ".join(faults) + ".")
    for whole, part in (
        ("data.image_size", "model.patch_size"),
        ("model.width", "model.heads"),
        ("model.width", "model.decoder_heads"),
    ):
        if f[whole] % f[part]:
            faults.append(f"{whole} {f[whole]} does not divide by {part} {f[part]}")
    stem, blocks = f["model.stem_channels"], f["model.stem_blocks"]
    if stem and 2 ** len(stem) != f["model.patch_size"]:
        faults.append(
            f"model.stem_channels {stem} has {len(stem)} numbers, which make patches of {2 ** len(stem)} px, a halving "
            f"each; model.patch_size {f['model.patch_size']} needs {f['model.patch_size'].bit_length() - 1}"
        )
    if len(blocks) != len(stem) or any(channels < 1 for channels in stem) or any(count < 0 for count in blocks):
        faults.append(
            f"model.stem_channels {stem} needs positive numbers, and model.stem_blocks {blocks} as many, 0 or more"
        )
    if f["optimizer.warmup_updates"] >= f["num_updates"]:
        faults.append(
            f"optimizer.warmup_updates {f['optimizer.warmup_updates']} must lie below num_updates {f['num_updates']}"
        )
    if not f["data.path"]:
        faults.append("data.path is not set; give --config.data.path=FOLDER, as data_pipeline.convert made it")
    if faults:
        raise ValueError("config: " + "; ".join(faults) + ".")


def fitted(config: Any, *, clips: int, splits: Sequence[str], devices: int) -> Any:
    """The config with what it leaves to the data set filled in: batch_size 0, data.eval_split "auto".

    clips: to train on. The batch is that of equal batches of at most FITTED_BATCH, so that an epoch leaves few clips
    out, and divides by the devices.
    """
    config = copy.deepcopy(config)
    if not config.batch_size:
        if clips < devices:
            raise ValueError(f"{clips} training clips: need one for each of {devices} devices; take fewer devices.")
        size = clips // -(-clips // FITTED_BATCH)
        config.batch_size = max(1, size // devices) * devices
    if config.data.eval_split == "auto":
        config.data.eval_split = "val" if "val" in splits else ""
    return config


def flat(config: Any) -> dict[str, Any]:
    """{'data.path': ..., ...} of a ConfigDict or of nested dicts."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, (ml_collections.ConfigDict, dict)):
            out.update({f"{name}.{inner}": leaf for inner, leaf in flat(value).items()})
        else:
            out[name] = value
    return out


def to_json(config: Any) -> str:
    """The config as text, the same for equal configs: what a workdir keeps and hosts compare."""
    nested = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    return json.dumps(nested, indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """The config of a text. A field that came after it was written has its default.

    Raises:
      ValueError: no JSON, or fields that the defaults do not have.
    """

    def tuples(node: Any) -> Any:  # JSON has lists only
        if isinstance(node, dict):
            return {name: tuples(value) for name, value in node.items()}
        return tuple(node) if isinstance(node, list) else node

    config = default.get_config()
    try:
        saved = tuples(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"the run's config is no JSON ({error}); restore config.json or train anew.") from error
    unknown = sorted(flat(saved).keys() - flat(config).keys())
    if unknown:
        raise ValueError(f"the run's config has fields of another version: {', '.join(unknown)}; use that version.")
    config.update(saved)
    return config


def differences(old: Any, new: Any, *, free: tuple[str, ...] = ()) -> list[str]:
    """Fields whose values differ, as 'field: old -> new'; those under a name in `free` may."""
    a, b = (flat(json.loads(to_json(c))) for c in (old, new))  # tuples as lists on both sides
    return [
        f"{name}: {a.get(name)!r} -> {b.get(name)!r}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and not any(name == f or name.startswith(f + ".") for f in free)
    ]

"""Reads configs (a file or the name of a shipped one, then overrides), checks and compares them.

A command takes `--config FILE[:ARG] --config.field=value`, as with ml_collections' flags but by argparse: those flags
report a mistyped field by its bare name, and a missing file only when the config is first used.
"""

import argparse
import copy
import difflib
import importlib.util
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections

from configs import default
from configs.default import FIELDS

if TYPE_CHECKING:
    from configs.default import Config, DataConfig, LossConfig, MeshConfig, ModelConfig, OptimizerConfig, Section
else:  # when the code runs, a config is a ConfigDict; tests check annotations then
    Config = DataConfig = LossConfig = MeshConfig = ModelConfig = OptimizerConfig = Section = ml_collections.ConfigDict

SHIPPED = Path(default.__file__).parent
FITTED_BATCH = 64  # pairs: the largest batch that batch_size 0 stands for
# Fields whose value may differ: when the run goes on, in an evaluation of it, and between its hosts.
FREE = tuple(name for name, field in FIELDS.items() if field.change in ("on resume", "per host"))
EVALUATED = tuple(name for name, field in FIELDS.items() if field.change != "no")
PER_HOST = tuple(name for name, field in FIELDS.items() if field.change == "per host")
# Values that give the same run wherever both are allowed, so that a run may go on with the other.
ALIKE = {"data.frame_sampling": {"random", "random_of_stored"}}


def shipped_path(name: str) -> str:
    """Returns FILE[:ARG] with FILE, a path or a shipped name, as a path. Raises FileNotFoundError if it is neither."""
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


def check_field(config: Config, dotted: str) -> None:
    """Raises ValueError, naming the nearest field or the known ones, if `dotted` is no field, or is a section."""
    known = flatten(config)
    if dotted in known:
        return
    if inside := [name for name in known if name.startswith(f"{dotted}.")]:
        raise ValueError(f"--config.{dotted}: is a section; its fields are {', '.join(inside)}.")
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


def load_config(name: str) -> Config:
    """Returns get_config(ARG) of FILE[:ARG], a path or a shipped name; what that file raises passes.

    Raises FileNotFoundError without the file, ValueError if it is no Python file, has no get_config or takes no ARG.
    """
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


def override(config: Config, dotted: str, text: str) -> None:
    """Sets a field to `text`, read as its type, tuples with commas. Raises ValueError for no such field or value."""
    check_field(config, dotted)
    old = flatten(config)[dotted]
    # A user's own config may have fields that the table lacks: they keep their type, and their tuples hold words.
    item = FIELDS[dotted].item if dotted in FIELDS else str if isinstance(old, tuple) else type(old)
    try:
        if isinstance(old, tuple):
            value: Any = tuple(item(word) for word in text.split(",") if word)
        elif item is bool:
            value = {"true": True, "false": False}[text.lower()]
        else:
            value = {int: int, float: float, str: str}[item](text)
    except (ValueError, KeyError):
        needed = FIELDS[dotted].values if dotted in FIELDS else f"a value of type {item.__name__}"
        raise ValueError(f"--config.{dotted}={text}: needs {needed}.") from None
    set_field(config, dotted, value)


def set_field(config: Config, dotted: str, value: Any) -> None:
    """Sets the field `dotted` in place. Raises TypeError for another type, KeyError if a locked config lacks it."""
    section, _, name = dotted.rpartition(".")
    (config[section] if section else config)[name] = value


def split_override(word: str) -> tuple[str, str]:
    """Returns '--config.a.b=c' as ('a.b', 'c'). Raises ValueError for a word without '--config.' or '='."""
    name, equals, text = word.removeprefix("--config.").partition("=")
    if not word.startswith("--config."):
        raise ValueError(f"{word}: there is no such option; --help lists them.")
    if not equals:
        raise ValueError(f"{word}: not understood; fields of the config are set as --config.field=value.")
    return name, text


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments, --config and --config.field=value as locked `config`. Raises SystemExit(2) if wrong."""
    about = "a path or the name of a shipped config; --config.field=value sets a field"
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help=about)
    arguments, rest = parser.parse_known_args(argv)
    try:
        arguments.config = load_config(arguments.config)
        for word in rest:
            override(arguments.config, *split_override(word))
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    arguments.config.lock()
    return arguments


def validate(config: Config) -> None:
    """Raises ValueError, one message with all values that FIELDS does not allow, or else all that misfit each other."""
    f = flatten(config)
    faults = [f"{name} is {f[name]!r}, needs {x.values}" for name, x in FIELDS.items() if not x.allows(f[name])]
    if faults := faults or _misfits(config):
        raise ValueError("config: " + "; ".join(faults) + ".")


def _misfits(config: Config) -> list[str]:
    faults, f, model, optimizer = [], flatten(config), config.model, config.optimizer
    parts = {"model.patch_size": "data.image_size", "model.heads": "model.width", "model.decoder_heads": "model.width"}
    for part, whole in parts.items():
        if f[whole] % f[part]:
            faults.append(f"{whole} {f[whole]} does not divide by {part} {f[part]}")
    stem, blocks, size = model.stem_channels, model.stem_blocks, model.patch_size
    if stem and 2 ** len(stem) != size:
        faults.append(
            f"model.stem_channels {stem} has {len(stem)} numbers, which make patches of {2 ** len(stem)} px, a halving "
            f"each; model.patch_size {size} needs {size.bit_length() - 1}"
        )
    if len(blocks) != len(stem):
        faults.append(f"model.stem_blocks {blocks} needs as many numbers as model.stem_channels {stem}")
    if optimizer.warmup_updates >= config.num_updates:
        faults.append(
            f"optimizer.warmup_updates {optimizer.warmup_updates} must lie below num_updates {config.num_updates}"
        )
    if not config.data.path:
        faults.append("data.path is not set; give --config.data.path=FOLDER, as data_pipeline.convert made it")
    return faults


def fit_to_data(config: Config, *, clips: int, splits: Sequence[str], devices: int) -> Config:
    """Returns a copy in which batch_size 0 and data.eval_split "auto" are replaced by values that fit the data set.

    `clips`, the training clips, make as few equal batches of at most FITTED_BATCH as possible, so that few are left
    out; the size is then rounded down to a multiple of `devices`, at least one. "auto" becomes "val", or "" if there is
    none. Raises ValueError if batch_size is 0 and there are fewer clips than devices.
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


def flatten(config: Section | dict[str, Any]) -> dict[str, Any]:
    """Returns {'data.path': value, ...}, in their order, for a config or nested dicts; the values are not copied."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, (ml_collections.ConfigDict, dict)):
            out.update({f"{name}.{inner}": leaf for inner, leaf in flatten(value).items()})
        else:
            out[name] = value
    return out


def to_json(config: Config | dict[str, Any]) -> str:
    """Returns the config as JSON, names sorted. Equal configs have equal texts: a workdir keeps, hosts compare them."""
    nested = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    return json.dumps(nested, indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> Config:
    """Returns the locked config of a to_json text, with defaults for new fields; lists become tuples.

    Raises ValueError if it is no JSON or has unknown fields, TypeError for a value of another type.
    """

    def tuples(section: dict[str, Any]) -> dict[str, Any]:  # JSON has lists only
        return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}

    config = default.get_config()
    try:
        saved = json.loads(text, object_hook=tuples)
    except json.JSONDecodeError as error:
        raise ValueError(f"the run's config is no JSON ({error}); restore config.json or train anew.") from error
    unknown = sorted(flatten(saved).keys() - flatten(config).keys())
    if unknown:
        raise ValueError(f"the run's config has fields of another version: {', '.join(unknown)}; use that version.")
    config.update(saved)
    return config


def differences(old: Config, new: Config, *, free: tuple[str, ...] = ()) -> list[str]:
    """Returns the fields that differ, sorted, as 'field: old -> new' (reprs), but those `free` or ALIKE; [] if none."""
    a, b = (flatten(json.loads(to_json(c))) for c in (old, new))  # tuples as lists on both sides
    alike = {name for name, values in ALIKE.items() if {a[name], b[name]} <= values}
    return [
        f"{name}: {a.get(name)!r} -> {b.get(name)!r}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and name not in free and name not in alike
    ]

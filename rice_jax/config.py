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
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections

from configs import default
from configs.default import FIELDS, Field
from data_pipeline.system.paths import expand
from rice_jax.version import __version__

if TYPE_CHECKING:
    from configs.default import Config, DataConfig, LossConfig, MeshConfig, ModelConfig, OptimizerConfig, Section
else:  # when the code runs, a config is a ConfigDict; tests check annotations then
    Config = DataConfig = LossConfig = MeshConfig = ModelConfig = OptimizerConfig = Section = ml_collections.ConfigDict

SHIPPED = Path(default.__file__).parent
FITTED_BATCH, FITTED_MULTIPLE = 64, 8  # pairs: the largest batch that batch_size 0 stands for, and what divides it
PATHS = ("data.path", "init_from")  # fields that hold a path
# Fields whose value may differ: when the run goes on, in an evaluation of it, and between its hosts.
FREE = tuple(name for name, field in FIELDS.items() if field.change in ("on resume", "per host"))
EVALUATED = tuple(name for name, field in FIELDS.items() if field.change != "no")
PER_HOST = tuple(name for name, field in FIELDS.items() if field.change == "per host")
# Values that give the same run wherever both are allowed, so that a run may go on with the other.
ALIKE = {"data.frame_sampling": {"random", "random_of_stored"}}


def shipped_path(name: str) -> str:
    """Returns FILE[:ARG] with FILE, a path or a shipped name, as a path. Raises FileNotFoundError if it is neither.

    Raises ValueError for the address of an object store.
    """
    file, colon, argument = name.partition(":")
    file = expand(name if argument.startswith("//") else file)
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


def nearest(dotted: str) -> str:
    """Returns the field that was probably meant by `dotted`, as data.path, or "" if none is near."""
    leaf = dotted.rpartition(".")[2]
    by_leaf = {name.rpartition(".")[2]: name for name in sorted(FIELDS)}
    near = difflib.get_close_matches(dotted, sorted(FIELDS), n=1, cutoff=0.7)
    near = near or [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    initials = [name for short, name in by_leaf.items() if "".join(word[0] for word in short.split("_")) == leaf]
    return (near or initials or [""])[0]  # initials: lr


def check_field(dotted: str) -> None:
    """Raises ValueError, naming the nearest field or all of them, if `dotted` is no field, or is a section."""
    if dotted in FIELDS:
        return
    if inside := [name for name in sorted(FIELDS) if name.startswith(f"{dotted}.")]:
        raise ValueError(f"--config.{dotted}: is a section; its fields are {', '.join(inside)}.")
    if "accum" in dotted.rpartition(".")[2]:
        raise ValueError(
            f"--config.{dotted}: gradients are not accumulated, because a contrastive loss over parts of a batch is "
            "another loss; for a large batch on few devices set loss.micro_batch, and model.remat to dots or full: the "
            "same loss and gradients in less memory."
        )
    near = nearest(dotted)
    hint = f"the nearest is --config.{near}" if near else f"fields are {', '.join(sorted(FIELDS))}"
    raise ValueError(f"--config.{dotted}: the config has no such field; {hint}.")


def load_config(name: str) -> Config:
    """Returns get_config(ARG) of FILE[:ARG], a path or a shipped name, as `adopt` does.

    Raises FileNotFoundError without the file, and ValueError, which names the line if there is one: the file is no
    Python, fails, has no get_config, takes no ARG, or returns no config or one that `adopt` refuses.
    """
    path, colon, argument = shipped_path(name).partition(":")
    spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config {path}: is no Python file; give one with a function get_config().")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError("has no function get_config(); see configs/default.py")
        if colon and not inspect.signature(module.get_config).parameters:
            raise ValueError("that config takes no argument after the colon")
        return adopt(module.get_config(argument) if colon else module.get_config())
    except Exception as error:  # of the user's own code, which may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        at = getattr(error, "lineno", None) or (lines[-1] if lines else None)  # SyntaxError has no frame
        where = f"--config {name}" + (f" line {at}" if at else "")
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        text = text.partition(" Other fields present")[0]  # all of them, which a locked ConfigDict adds
        raise ValueError(f"{where}: {text.rstrip('.')}.") from error


def adopt(config: Any) -> Config:
    """Returns a locked copy with the fields of the table and `config`'s values, and with `~` expanded in PATHS.

    `config` may be locked, frozen or nested dicts. Raises ValueError, naming all of them, for fields that the table
    does not have (a run could not be opened again), that are missing, or whose value has another type; and for a path
    that is the address of an object store.
    """
    if not isinstance(config, (ml_collections.ConfigDict, dict)):
        raise ValueError(f"found {type(config).__name__}, needs a config; let get_config() return one")
    given = flatten(config)
    unknown = {name: nearest(name) for name in given if name not in FIELDS}
    faults = [
        f"{name} is no field of a config" + (f" (the nearest is {near})" * bool(near)) for name, near in unknown.items()
    ]
    faults += [f"{name} is missing" for name in FIELDS if name not in given]
    faults += _wrong(given, Field.has_type)
    if faults:
        raise ValueError(f"config: {'; '.join(faults)}; see docs/config.md.")
    own = default.get_config()
    for name, value in given.items():
        set_field(own, name, expand(value) if name in PATHS and value else value)
    return own


def _wrong(given: dict[str, Any], is_right: Callable[[Field, Any], bool]) -> list[str]:
    """Returns a text for each field, {dotted name: value}, whose value is not right, with what it needs."""
    return [
        f"{name} is {value!r}, needs {FIELDS[name].values}"
        for name, value in given.items()
        if name in FIELDS and not is_right(FIELDS[name], value)
    ]


def override(config: Config, dotted: str, text: str) -> None:
    """Sets a field to `text`, read as its type, tuples with commas. Raises ValueError for no such field or value."""
    check_field(dotted)
    field = FIELDS[dotted]
    try:
        if isinstance(field.default, tuple):
            value: Any = tuple(field.item(word) for word in text.split(",") if word)
        elif field.item is bool:
            value = {"true": True, "false": False}[text.lower()]
        else:
            value = field.item(text)
    except (ValueError, KeyError):
        raise ValueError(f"--config.{dotted}={text}: needs {field.values}.") from None
    set_field(config, dotted, expand(value) if dotted in PATHS and value else value)


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
    return arguments


def validate(config: Config | dict[str, Any]) -> Config:
    """Returns adopt(config). Raises ValueError, one message, for all values that FIELDS does not allow.

    If there are none, it raises ValueError for all values that misfit each other.
    """
    config = adopt(config)
    if faults := _wrong(flatten(config), Field.allows) or _misfits(config):
        raise ValueError("config: " + "; ".join(faults) + ".")
    return config


def _misfits(config: Config) -> list[str]:
    faults, f, model, optimizer = [], flatten(config), config.model, config.optimizer
    parts = {"model.patch_size": "data.image_size", "model.heads": "model.width", "model.decoder_heads": "model.width"}
    for part, whole in parts.items():
        if f[whole] % f[part]:
            faults.append(f"{whole} {f[whole]} does not divide by {part} {f[part]}")
    stem, blocks, size = model.stem_channels, model.stem_blocks, model.patch_size
    if stem and size & (size - 1):
        faults.append(f"model.patch_size {size} needs to be a power of 2, as model.stem_channels {stem} halve the side")
    elif stem and 2 ** len(stem) != size:
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


def fit_to_data(config: Config, *, clips: int, splits: Sequence[str], devices: int, saved: int = 0) -> Config:
    """Returns a copy in which batch_size 0 and data.eval_split "auto" are replaced by values that fit the data set.

    batch_size becomes `saved`, the size that the run began with, unless that is 0. Otherwise `clips`, the training
    clips, make as few equal batches of at most FITTED_BATCH as possible, so that few are left out; and the size is
    rounded down to a multiple of FITTED_MULTIPLE, so that it is the same on 1, 2, 4 and 8 devices. A set of fewer clips
    takes a smaller power of 2. Other numbers of devices have a size that they divide, too. "auto" becomes "val", or ""
    if there is none. Raises ValueError for batch_size 0 if `devices` does not divide `saved`, or if there are fewer
    clips than devices.
    """
    config = copy.deepcopy(config)
    if not config.batch_size:
        config.batch_size = saved or _fitted_batch(clips, devices)
        if config.batch_size % devices:
            fitting = ", ".join(str(n) for n in range(1, saved + 1) if saved % n == 0)
            raise ValueError(
                f"this run began with batch_size {saved}, which {devices} devices do not divide; continue it on "
                f"{fitting} devices, or begin another in a new --workdir."
            )
    if config.data.eval_split == "auto":
        config.data.eval_split = "val" if "val" in splits else ""
    return config


def _fitted_batch(clips: int, devices: int) -> int:
    if clips < devices:
        do = "convert more clips" + (", or take fewer devices" if clips else ", or leave fewer out by data.skip_clips")
        raise ValueError(
            f"batch_size 0: found {clips} training clip{'s' * (clips != 1)}, needs at least one for each of {devices} "
            f"device{'s' * (devices != 1)}; {do}."
        )
    unit = math.lcm(min(FITTED_MULTIPLE, 2 ** (clips.bit_length() - 1)), devices)
    if unit > min(clips, FITTED_BATCH):
        unit = devices
    return max(1, clips // -(-clips // FITTED_BATCH) // unit) * unit


def flatten(config: Section | dict[str, Any]) -> dict[str, Any]:
    """Returns {'data.path': value, ...}, in their order, for a config or nested dicts; the values are not copied.

    An empty dict is a value.
    """
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, (ml_collections.ConfigDict, dict)) and len(value):
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

    Raises ValueError if it is no JSON object, has unknown fields, or a value that FIELDS does not allow.
    """
    advice = "restore config.json, or remove it: the checkpoints have a copy."
    try:
        saved = json.loads(text.removeprefix("\ufeff"))  # an editor of Windows may put it there
        if not isinstance(saved, dict):
            raise ValueError(f"found a {type(saved).__name__}, needs an object")
        given = {name: tuple(x) if isinstance(x, list) else x for name, x in flatten(saved).items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the run's config is no JSON of a config ({error}); {advice}") from error
    if isinstance(ends := given.get("stall_ends"), bool):  # before there was "auto"
        given["stall_ends"] = str(ends).lower()
    first_of = {name.rpartition(".")[0]: name for name in reversed(FIELDS)}  # the first field of each section
    sections = {name: given.pop(name) for name in first_of if name in given}
    if wrong := [
        f"{name} is {x!r}, needs an object with fields such as {first_of[name]}"
        for name, x in sections.items()
        if x != {}
    ]:
        raise ValueError(f"the run's config: {'; '.join(wrong)}; {advice}")
    if unknown := sorted(given.keys() - FIELDS.keys()):
        raise ValueError(
            f"the run's config has fields of another version: {', '.join(unknown)}. This is rice_jax {__version__}; "
            "use that of the run, which is in its checkpoints/STEP/meta/metadata, or correct config.json."
        )
    if faults := _wrong(given, Field.has_type) or _wrong(given, Field.allows):
        raise ValueError(f"the run's config: {'; '.join(faults)}; {advice}")
    config = default.get_config()
    for name, value in given.items():
        set_field(config, name, value)
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

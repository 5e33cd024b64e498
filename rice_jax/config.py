"""Reading a config: a file or the name of a shipped one, then overrides; and comparing two.

Written as ml_collections' own flags are (`--config FILE[:ARG] --config.field=value`), but with argparse: those flags
report a mistyped field as its bare name, and a file that is not there at the first use of the config.
"""

import argparse
import difflib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections

import configs

SHIPPED = Path(configs.__path__[0])


def fail(message: str, *, status: int = 1) -> NoReturn:
    """One line on stderr and an exit status: 1 failed, 2 wrong use."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def run(main: Callable[[Any], None], values: Any) -> None:
    """Runs a command; what a user can mend is one message on stderr, anything else keeps its traceback."""
    try:
        main(values)
    except (ValueError, FileNotFoundError, ImportError) as error:
        if isinstance(error, ImportError) and "pip install" not in str(error):
            raise
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to go on", status=130)


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
    node: Any = config
    for part in dotted.split("."):
        if not isinstance(node, ml_collections.ConfigDict) or part not in node:
            known = sorted(flat(config))
            near = difflib.get_close_matches(dotted, known, n=1, cutoff=0.4) or difflib.get_close_matches(
                dotted.rsplit(".")[-1], known, n=1, cutoff=0.2
            )
            hint = f"; the nearest is --config.{near[0]}" if near else f"; fields are {', '.join(known)}"
            raise ValueError(f"--config.{dotted}: the config has no such field{hint}.")
        node = node[part]


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
            name, equals, text = word.removeprefix("--config.").partition("=")
            if not word.startswith("--config.") or not equals:
                raise ValueError(f"{word}: not understood; fields of the config are set as --config.field=value.")
            override(arguments.config, name, text)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    arguments.config.lock()
    return arguments


CHOICES = {
    "data.resize_mode": ("stretch", "keep_ratio"),
    "data.frame_sampling": ("uniform", "random"),
    "model.activation": ("quick_gelu", "gelu"),
    "model.dtype": ("float32", "bfloat16"),
    "model.pool": ("class_token", "mean"),
    "model.remat": ("none", "dots", "full"),
    "loss.icl_same_product": ("negative", "masked", "positive"),
    "loss.mining_direction": ("image_to_clip", "clip_to_image", "both"),
    "loss.pfr_attention": ("prob_scaled", "prob", "score"),
    "optimizer.eps_placing": ("uncorrected", "corrected"),
    "optimizer.decay_rule": ("official", "no_1d"),
}


def validate(config: Any) -> None:
    """Raises ValueError with every value of the config that cannot be meant."""
    fields, faults = flat(config), []
    for name, choices in CHOICES.items():
        if fields[name] not in choices:
            faults.append(f"{name} is {fields[name]!r}, needs one of {', '.join(choices)}")
    for whole, part in (
        ("data.image_size", "model.patch_size"),
        ("model.width", "model.heads"),
        ("model.width", "model.decoder_heads"),
    ):
        if fields[part] < 1 or fields[whole] % fields[part]:
            faults.append(f"{whole} {fields[whole]} does not divide by {part} {fields[part]}")
    for name in ("batch_size", "num_updates", "log_every", "checkpoint_every", "eval_batch_size", "checkpoints_kept"):
        if fields[name] < 1:
            faults.append(f"{name} is {fields[name]}, needs at least 1")
    stem = fields["model.stem_channels"]
    if stem and 2 ** len(stem) != fields["model.patch_size"]:
        faults.append(
            f"model.stem_channels has {len(stem)} halvings, needs log2 of model.patch_size {fields['model.patch_size']}"
        )
    if len(fields["model.stem_blocks"]) != len(stem):
        faults.append(
            f"model.stem_blocks {fields['model.stem_blocks']} needs one number for each of model.stem_channels {stem}"
        )
    if any(channels % 8 for channels in stem):
        faults.append(f"model.stem_channels {stem}: each needs to divide by 8, the groups of its norm")
    if not fields["data.path"]:
        faults.append("data.path is not set; give --config.data.path=FOLDER, as data_pipeline.convert made it")
    if faults:
        raise ValueError("config: " + "; ".join(faults) + ".")


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
    def tuples(node: Any) -> Any:  # JSON has lists only
        if isinstance(node, dict):
            return {name: tuples(value) for name, value in node.items()}
        return tuple(node) if isinstance(node, list) else node

    return ml_collections.ConfigDict(tuples(json.loads(text))).lock()


def differences(old: Any, new: Any, *, free: tuple[str, ...] = ()) -> list[str]:
    """Fields whose values differ, as 'field: old -> new'; those under a name in `free` may."""
    a, b = (flat(json.loads(to_json(c))) for c in (old, new))  # tuples as lists on both sides
    return [
        f"{name}: {a.get(name)!r} -> {b.get(name)!r}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and not any(name == f or name.startswith(f + ".") for f in free)
    ]

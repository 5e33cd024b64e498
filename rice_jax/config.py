"""Reading a config: a file or the name of a shipped one, then overrides; and comparing two.

The commands' flags are ml_collections' own (`--config FILE[:ARG] --config.field=value`); what it reports unhelpfully,
a mistyped field or a file that is not there, is said here.
"""

import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections
from absl import flags
from ml_collections import config_flags

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
    """'grocery', 'grocery.py', 'configs/grocery.py' or any path, with or without ':ARG', as an existing file (':ARG' kept).

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
    raise FileNotFoundError(f"--config {file}: no such file, and no shipped config of that name; shipped are {', '.join(names)}.")


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


def parse(argv: Sequence[str], define: Callable[[flags.FlagValues], None]) -> flags.FlagValues:
    """Flags of a command that takes --config; `define` adds its further ones. Wrong use exits with status 2."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "FILE[:ARG] or the name of a shipped config", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this text", short_name="h", flag_values=values)
    define(values)
    try:
        argv = _with_shipped_paths(argv)
        overrides = [arg for arg in argv[1:] if arg.startswith("--config.")]
        values([arg for arg in argv if arg not in overrides])
        if values.help:
            print(f"usage: {sys.modules['__main__'].__doc__}\n{values.get_help()}")
            raise SystemExit(0)
        if values.config is None:
            raise ValueError("--config FILE[:ARG] is required (a path or the name of a shipped config, e.g. grocery)")
        for override in overrides:
            if "=" not in override:
                raise ValueError(f"{override}: write {override}=VALUE")
            check_field(values.config, override.removeprefix("--config.").partition("=")[0])
        values.unparse_flags()
        rest = values([*argv])
        if len(rest) > 1:
            raise ValueError(f"{rest[1]}: not understood; fields of the config are set as --config.field=value")
    except (flags.Error, ValueError, FileNotFoundError, TypeError) as error:
        fail(str(error), status=2)
    values.config.lock()
    return values


CHOICES = {
    "data.resize_mode": ("stretch", "keep_ratio"),
    "data.frame_sampling": ("uniform", "random"),
    "model.activation": ("quick_gelu", "gelu"),
    "model.dtype": ("float32", "bfloat16"),
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
    if not fields["data.path"]:
        faults.append("data.path is not set; give --config.data.path=FOLDER, as data_pipeline.convert made it")
    if faults:
        raise ValueError("config: " + "; ".join(faults) + ".")


def _with_shipped_paths(argv: Sequence[str]) -> list[str]:
    out = list(argv)
    for i, arg in enumerate(out):
        if arg == "--config" and i + 1 < len(out):
            out[i + 1] = shipped_path(out[i + 1])
        elif arg.startswith("--config="):
            out[i] = "--config=" + shipped_path(arg.removeprefix("--config="))
    return out


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
    config = ml_collections.ConfigDict(json.loads(text), convert_dict=True)
    return config.lock()


def differences(old: Any, new: Any, *, free: tuple[str, ...] = ()) -> list[str]:
    """Fields whose values differ, as 'field: old -> new'; those under a name in `free` may."""
    a, b = flat(json.loads(to_json(old))), flat(json.loads(to_json(new)))
    return [
        f"{name}: {a.get(name)!r} -> {b.get(name)!r}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and not any(name == f or name.startswith(f + ".") for f in free)
    ]

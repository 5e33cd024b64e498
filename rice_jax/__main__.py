"""The console command `rice-jax`, also `python -m rice_jax`: it imports and runs the module of one subcommand."""

import difflib
import importlib
import sys
from collections.abc import Sequence

# For each subcommand the function that runs it, called with the rest of the words and `prog`; and a line of help.
GROUPS = {
    "data": {
        "convert": ("data_pipeline.convert:main", "turn a download or a folder of your own clips into a converted set"),
        "doctor": ("data_pipeline.doctor:main", "examine a source or a converted set, and report its faults"),
        "synthetic": ("data_pipeline.synthetic:main", "draw a livestream shop to try things on without a download"),
    },
    "training": {
        "preflight": ("rice_jax.preflight.__main__:command", "compute memory and time of a config on other devices"),
        "train": ("rice_jax.train:command", "train a model, or continue a run"),
        "explain": ("rice_jax.explain:command", "draw one update's clips, and check which clips its epoch showed"),
    },
    "use": {
        "evaluate": ("rice_jax.evaluate:command", "compute Recall@k of a run on a converted set"),
        "show": ("rice_jax.show:command", "draw clips and the shop images that an evaluation ranked first"),
        "weights": ("rice_jax.weights.__main__:command", "import, export and list weights"),
    },
    "first try": {
        "demo": ("rice_jax.demo:command", "draw a shop, convert, train, evaluate and show it, in a few minutes"),
    },
}
COMMANDS = {name: entry for group in GROUPS.values() for name, (entry, _) in group.items()}


def usage(prog: str) -> str:
    """Returns the help text: the subcommands in their groups."""
    lines = [f"usage: {prog} COMMAND ...", "", "Livestreaming product recognition; each COMMAND has its own --help."]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<11}{about}" for name, (_, about) in group.items())]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, prog: str = "rice-jax") -> int:
    """Runs the subcommand that the first word names; returns its exit status, 0 for None. Its SystemExit passes.

    Returns 2 without a known name, 0 for --help. argv: None takes sys.argv's. prog: what the user typed, for help.
    """
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if name in ("", "-h", "--help"):
        print(usage(prog), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        do = f"the nearest is {near[0]}" if near else f"needs one of {', '.join(COMMANDS)}"
        print(f"error: {prog} {name}: no such command; {do}.", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(module), function)(rest, prog=f"{prog} {name}") or 0


if __name__ == "__main__":
    sys.exit(main(prog="python -m rice_jax"))

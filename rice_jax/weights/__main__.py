"""Imports weights of other programs, exports those of a run, and shows the tensors of a file.

python -m rice_jax.weights import SOURCE --output DIR [--activation quick_gelu|gelu] [--image-size PX]
python -m rice_jax.weights export RUN --format official|pth|huggingface|stablehlo --output DIR [--step N]
python -m rice_jax.weights show PATH [--json]

SOURCE is a file or folder of OpenAI's CLIP, Hugging Face's, open_clip's, or of the official RICE. rice_jax.load,
rice_jax.evaluate and --config.init_from open the DIR of an import. RUN is a training run or the DIR of an import.
"""

import argparse
import json

from data_pipeline.system.paths import parse_path
from rice_jax.checkpoints.run_folder import is_run
from rice_jax.errors import run, warn
from rice_jax.models.vit import ACTIVATIONS
from rice_jax.parallel.devices import find_devices
from rice_jax.training.step import own_switches
from rice_jax.weights import naming
from rice_jax.weights.card import describe_model
from rice_jax.weights.inspect import Kind, inspect_weights
from rice_jax.weights.model_config import infer_config
from rice_jax.weights.readers import load_on_one_device
from rice_jax.weights.writers import FORMATS, export_run, import_weights


@own_switches()
def main(arguments: argparse.Namespace) -> None:
    {"import": _import, "export": _export, "show": _show}[arguments.command](arguments)


def _import(arguments: argparse.Namespace) -> None:
    find_devices()
    path, output = arguments.source, arguments.output
    source = import_weights(path, output, activation=arguments.activation, image_size=arguments.image_size)
    print(f"{path}: {source.kind}, {describe_model(source.config)}", *source.notes, sep="\n  ")
    print(f"written to {output}; train from it with --config.init_from={output}")


def _export(arguments: argparse.Namespace) -> None:
    model, warnings = export_run(arguments.run, arguments.output, arguments.format, step=arguments.step)
    for warning in warnings:
        warn(warning)
    print(f"{arguments.run}: {describe_model(model.config)}; step {model.step}")
    for path in sorted(arguments.output.iterdir()):
        print(f"  {path.name}  {path.stat().st_size:,} bytes")
    print(f"written to {arguments.output}, read back and compared")


def _show(arguments: argparse.Namespace) -> None:
    path, faults, notes = arguments.path, list[str](), tuple[str, ...]()
    if is_run(path):
        model = load_on_one_device(path)
        kind, config = Kind.RUN, model.config
        rows = [(name, x.shape, str(x.dtype), name) for name, x in naming.flattened(model.params).items()]
    else:
        weights = inspect_weights(path)
        path, kind = weights.path, weights.kind
        notes, (config, faults) = weights.notes, infer_config(weights)
        rows = [(name, x.shape, x.dtype, _destination(name, weights.table)) for name, x in weights.tensors.items()]
    if arguments.json:
        tensors = [dict(zip(("name", "shape", "dtype", "to"), row, strict=True)) for row in rows]
        sizes = {"image_size": config.data.image_size, **config.model}
        print(json.dumps({"file": str(path), "kind": kind, "model": sizes, "tensors": tensors, "faults": faults}))
        return
    print(f"{path}: {kind}, {describe_model(config)}", *notes, sep="\n  ")
    width = max(len(name) for name, *_ in rows)
    for name, shape, dtype, destination in rows:
        print(f"  {name:{width}}  {'x'.join(map(str, shape)) or 'scalar':>14}  {dtype:>8}  {destination}")
    for fault in faults:
        print(f"fault: {fault}")


def _destination(name: str, table: naming.Table) -> str:
    """Returns where a tensor goes: "encoder/resblocks/ln_1/scale[3]", "not used", "no rule matches" and the like."""
    try:
        rule, match = naming.find_rule(name, table)
    except ValueError as error:
        return str(error).rpartition(": ")[2]
    if rule.path is None:
        return "not used"
    layer = f"[{match[1]}]" if match.groups() else ""
    return rule.path + layer + ("" if rule.part is None else f" {'qkv'[rule.part]}")


def parse(argv: list[str] | None = None, prog: str = "python -m rice_jax.weights") -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import", help="write others' weights as a folder that rice_jax opens")
    command.add_argument("source", type=parse_path, metavar="SOURCE", help="file or folder of weights")
    command.add_argument("--output", type=parse_path, required=True, metavar="DIR", help="a folder, new or empty")
    activation_help = "of the MLPs, for a file that does not state it"
    command.add_argument("--activation", choices=sorted(ACTIVATIONS), help=activation_help)
    command.add_argument("--image-size", type=int, metavar="PX", help="resize position embeddings to this image size")
    command = commands.add_parser("export", help="write a run as files for other programs")
    command.add_argument("run", type=parse_path, metavar="RUN", help="a training run or an imported folder")
    command.add_argument("--format", choices=FORMATS, required=True)
    command.add_argument("--output", type=parse_path, required=True, metavar="DIR", help="a folder, new or empty")
    command.add_argument("--step", type=int, help="a checkpoint's number of updates (default: the newest)")
    command = commands.add_parser("show", help="list the tensors of a file, a folder or a run, and where each would go")
    command.add_argument("path", type=parse_path, metavar="PATH")
    command.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser.parse_args(argv)


def command(argv: list[str] | None = None, prog: str = "python -m rice_jax.weights") -> None:
    """Runs `argv` (None: sys.argv). Raises SystemExit: 2 wrong words, 0 help, 1 ValueError or OSError, 130 Ctrl-C."""
    run(main, parse(argv, prog))


if __name__ == "__main__":
    command()

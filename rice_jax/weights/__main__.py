"""Weights in and out.

python -m rice_jax.weights import SOURCE --output DIR [--activation quick_gelu|gelu] [--image-size PX]
python -m rice_jax.weights export RUN --format official|pth|huggingface|stablehlo --output DIR [--step N]
python -m rice_jax.weights show PATH [--json]

SOURCE is a file or folder of OpenAI's CLIP, Hugging Face's, open_clip's, or of the official RICE; DIR then opens with
rice_jax.load, rice_jax.evaluate and --config.init_from. RUN is a training run or an imported folder.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from data_pipeline.system.output_folder import new_folder
from rice_jax.checkpoints.run_folder import write_config
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import to_json
from rice_jax.errors import run, warn
from rice_jax.models.vit import ACTIVATIONS
from rice_jax.training.step import State
from rice_jax.weights import naming
from rice_jax.weights.card import departures, model_card
from rice_jax.weights.inspect import inspect_weights
from rice_jax.weights.readers import RUN, is_run, load_on_one_device, measure, read_source, read_unused, save_unused
from rice_jax.weights.writers import FORMATS, check_equal, sizes


def import_weights(arguments: argparse.Namespace) -> None:
    if is_run(arguments.source):
        raise ValueError(
            f"{arguments.source}: is a run already; give it to rice_jax.load or --config.init_from as it is."
        )
    with new_folder(arguments.output) as folder:
        source = read_source(arguments.source, activation=arguments.activation, image_size=arguments.image_size)
        said = source.config.model.activation
        if arguments.activation not in (None, said):
            raise ValueError(f"--activation {arguments.activation}: the file says {said}; leave the option out.")
        about = {"name": arguments.source.name, "kind": source.kind, "notes": list(source.notes)}
        state = State(jnp.int32(0), jax.tree.map(jnp.asarray, source.params), {}, {})
        write_config(folder, to_json(source.config))
        with Checkpoints(folder, kept=1) as checkpoints:
            checkpoints.save(0, state, {"source": about})
        save_unused(source.unused, folder)
        check_equal(source.params, jax.device_get(load_on_one_device(folder).params), str(arguments.output))
        check_equal(source.unused, read_unused(folder), str(arguments.output))
    print(f"{arguments.source}: {source.kind}, {sizes(source.config)}")
    for note in source.notes:
        print(f"  {note}")
    print(f"written to {arguments.output}; train from it with --config.init_from={arguments.output}")


def export(arguments: argparse.Namespace) -> None:
    if not is_run(arguments.run):
        raise ValueError(
            f"{arguments.run}: is no run and no imported folder; import it first (rice_jax.weights import)."
        )
    with new_folder(arguments.output) as folder:
        m = load_on_one_device(arguments.run, arguments.step)
        FORMATS[arguments.format](m, read_unused(arguments.run), folder)
        warnings = departures(m.config) if arguments.format in ("official", "pth") else []
        card = model_card(m, arguments.run, arguments.format, warnings)
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    for warning in warnings:
        warn(warning)
    print(f"{arguments.run}: {sizes(m.config)}; step {m.step}")
    for name, size in files.items():
        print(f"  {name}  {size:,} bytes")
    print(f"written to {arguments.output}, read back and compared")


def show(arguments: argparse.Namespace) -> None:
    path, faults = arguments.path, list[str]()
    if is_run(path):
        m = load_on_one_device(path)
        kind, file, config = RUN, path, m.config
        rows = [(name, x.shape, str(x.dtype), name) for name, x in naming.flattened(m.params).items()]
    else:
        found = inspect_weights(path)
        kind, file = found.kind, found.file
        config, faults = measure(found)
        rows = [(name, x.shape, x.dtype, _goal(name, found.table)) for name, x in found.tensors.items()]
    if arguments.json:
        tensors = [dict(zip(("name", "shape", "dtype", "to"), row, strict=True)) for row in rows]
        sized = {"image_size": config.data.image_size, **config.model}
        print(json.dumps({"file": str(file), "kind": kind, "model": sized, "tensors": tensors, "faults": faults}))
        return
    print(f"{file}: {kind}, {sizes(config)}")
    width = max(len(name) for name, *_ in rows)
    for name, shape, dtype, goal in rows:
        print(f"  {name:{width}}  {'x'.join(map(str, shape)) or 'scalar':>14}  {dtype:>8}  {goal}")
    for fault in faults:
        print(f"fault: {fault}")


def _goal(name: str, table: naming.Table) -> str:
    try:
        rule, found = naming.find_rule(name, table)
    except ValueError as error:
        return str(error).rpartition(": ")[2]
    if rule.path is None:
        return "not used"
    return (
        rule.path + (f"[{found[1]}]" if found.groups() else "") + ("" if rule.part is None else f" {'qkv'[rule.part]}")
    )


def main(arguments: argparse.Namespace) -> None:
    {"import": import_weights, "export": export, "show": show}[arguments.command](arguments)


def parse(argv: list[str] | None = None, prog: str = "python -m rice_jax.weights") -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import", help="weights of others as a folder that rice_jax opens")
    command.add_argument("source", type=Path, metavar="SOURCE", help="file or folder of weights")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder, new or empty")
    command.add_argument("--activation", choices=sorted(ACTIVATIONS), help="of the MLPs, where the file does not say")
    command.add_argument("--image-size", type=int, metavar="PX", help="resize position embeddings for this image size")
    command = commands.add_parser("export", help="a run for other programs")
    command.add_argument("run", type=Path, metavar="RUN", help="a training run or an imported folder")
    command.add_argument("--format", choices=FORMATS, required=True)
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder, new or empty")
    command.add_argument("--step", type=int, help="a checkpoint's number of updates (default: the newest)")
    command = commands.add_parser("show", help="what is in a file, a folder or a run, and what would go where")
    command.add_argument("path", type=Path, metavar="PATH")
    command.add_argument("--json", action="store_true", help="as one line of JSON")
    return parser.parse_args(argv)


def command(argv: list[str] | None = None, prog: str = "python -m rice_jax.weights") -> None:
    run(main, parse(argv, prog))


if __name__ == "__main__":
    command()

"""Weights in and out.

python -m rice_jax.weights import SOURCE --output DIR [--activation quick_gelu|gelu] [--image-size PX]
python -m rice_jax.weights export RUN --format official|pth|huggingface|stablehlo --output DIR [--step N]
python -m rice_jax.weights show PATH [--json]

SOURCE is a file or folder of OpenAI's CLIP, Hugging Face's, open_clip's, or of the official RICE; DIR then opens with
rice_jax.load, rice_jax.evaluate and --config.init_from. RUN is a training run or an imported folder.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipeline.system.output_folder import new_folder
from rice_jax import config as configuration
from rice_jax.checkpoints.store import Checkpoints, write_config
from rice_jax.models import vit as model
from rice_jax.retrieval import model as retrieval
from rice_jax.training.step import State
from rice_jax.version import __version__
from rice_jax.weights import exports, naming
from rice_jax.weights.inspect import look
from rice_jax.weights.readers import (
    RUN,
    is_run,
    load_on_one_device,
    measure,
    read_source,
    read_unused,
    save_unused,
    write_safetensors,
)

Tensors = dict[str, np.ndarray]
DECODER = "transformer.transformer"  # as the official code calls it
LICENCE = "The licence is that of the weights' source and of the data they were trained on; none is granted here."


def check_equal(ours: Any, again: Any, what: str) -> None:
    """ValueError unless two trees of parameters are the same, bit for bit."""
    left, right = naming.flattened(ours), naming.flattened(again)
    wrong = [name for name in left.keys() | right.keys() if not _same(left.get(name), right.get(name))]
    if wrong:
        raise ValueError(
            f"{what} does not read back as it was written ({', '.join(sorted(wrong)[:5])}); the disk may be at fault: "
            "nothing was kept, run the same command again."
        )


def _same(a: Any, b: Any) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)


# --- In ---


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
        write_config(folder, configuration.to_json(source.config))
        with Checkpoints(folder, kept=1) as checkpoints:
            checkpoints.save(0, state, {"source": about})
        save_unused(source.unused, folder)
        check_equal(source.params, jax.device_get(load_on_one_device(folder).params), str(arguments.output))
        check_equal(source.unused, read_unused(folder), str(arguments.output))
    print(f"{arguments.source}: {source.kind}, {sizes(source.config)}")
    for note in source.notes:
        print(f"  {note}")
    print(f"written to {arguments.output}; train from it with --config.init_from={arguments.output}")


def sizes(config: Any) -> str:
    c = config.model
    parts = ["encoder", *(["decoder"] if config.loss.pmd or config.loss.pfr else [])]
    heads = f", {c.decoder_heads} decoder heads" if len(parts) > 1 else ""
    return (
        f"{' and '.join(parts)}: patch {c.patch_size}, {config.data.image_size} px, width {c.width}, "
        f"{c.layers} layers, {c.heads} heads, MLP {c.hidden}, embedding {c.embedding}, {c.activation}{heads}"
    )


# --- Out ---


def official_tensors(m: retrieval.Model, unused: Tensors) -> Tensors:
    """All tensors of the official checkpoint of this model, by their names (SPEC 3.4, 5.8, 15.1).

    Raises:
      ValueError: parameters that the official code does not have.
    """
    flat = naming.flattened(jax.device_get(m.params))
    untrained = {name: x for name, x in unused.items() if name.startswith((f"{DECODER}.transformer.", f"{DECODER}.po"))}
    embeddings = {name: x for name, x in unused.items() if name.startswith(f"{DECODER}.embeddings.")}
    if m.net.decoder is not None:
        table, kept = naming.OFFICIAL, _embeddings(m, flat) | _of_this_size(m, embeddings)
    elif untrained:  # imported from MovingFashion's ICL alone, whose checkpoint has a decoder that saw no training
        table, kept = naming.OFFICIAL_NO_HEAD, _embeddings(m, flat) | _of_this_size(m, embeddings) | untrained
    else:
        scale = "transformer.logit_scale"  # not used beside norm_s, and there
        table, kept = naming.OFFICIAL_CONTRASTIVE, {scale: unused.get(scale, np.asarray(4.0))}
    foreign = sorted(flat.keys() - {rule.path for rule in table})
    if foreign:
        raise ValueError(
            f"{len(foreign)} parameter(s) have no place in the official code: {', '.join(foreign[:5])}; it "
            "knows CLIP's patch embedding and ICL's softmax only (model.stem_channels empty, loss.icl_form softmax)."
        )
    return {name: np.asarray(x, np.float32) for name, x in (naming.invert(flat, table) | kept).items()}


def _embeddings(m: retrieval.Model, flat: Tensors) -> Tensors:
    """The decoder's embeddings, which nothing reads, as the official code starts them (SPEC 5.8)."""
    width = m.config.model.width
    return {
        f"{DECODER}.embeddings.class_embedding": np.random.default_rng(m.config.seed).normal(size=width),
        f"{DECODER}.embeddings.position_embedding.weight": flat["encoder/positional_embedding"],
        f"{DECODER}.embeddings.layer_norm.weight": np.ones(width),
        f"{DECODER}.embeddings.layer_norm.bias": np.zeros(width),
    }


def _of_this_size(m: retrieval.Model, embeddings: Tensors) -> Tensors:
    """Imported ones, but for positions of another image size."""
    tokens = 1 + m.net.encoder.patches
    return {name: x for name, x in embeddings.items() if "position" not in name or len(x) == tokens}


def write_official(m: retrieval.Model, unused: Tensors, folder: Path) -> None:
    tensors = official_tensors(m, unused)
    write_safetensors(tensors, folder / "model.safetensors")
    _describe_and_read_back(m, tensors, folder)


def write_pth(m: retrieval.Model, unused: Tensors, folder: Path) -> None:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            "--format pth needs torch: pip install 'rice_jax[torch]' (or take --format official)."
        ) from error
    tensors = official_tensors(m, unused)
    # np.array, C: torch shares the memory of what it is given, and ours is read-only and transposed here and there.
    state = {name: torch.from_numpy(np.array(x, order="C")) for name, x in tensors.items()}
    torch.save(state, folder / "rice_final.pth")
    _describe_and_read_back(m, tensors, folder)


def _describe_and_read_back(m: retrieval.Model, tensors: Tensors, folder: Path) -> None:
    """Our config beside the official names, so that a reader of ours need not guess what no tensor shows."""
    write_config(folder, configuration.to_json(m.config))
    check_equal(tensors, {name: tensor.read() for name, tensor in look(folder).tensors.items()}, str(folder))
    check_equal(jax.device_get(m.params), read_source(folder).params, str(folder))


def write_huggingface(m: retrieval.Model, unused: Tensors, folder: Path) -> None:
    """The encoder as CLIPVisionModelWithProjection, with what prepares its pictures."""
    del unused
    c, data = m.config.model, m.config.data
    if c.stem_channels or c.pool != "class_token":
        raise ValueError(
            "--format huggingface: CLIP has no convolutional stem and pools its class token; take --format stablehlo."
        )
    encoder = naming.flattened({"encoder": jax.device_get(m.params["encoder"])})
    write_safetensors(naming.invert(encoder, naming.HUGGING_FACE), folder / "model.safetensors")
    stated = {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_channels": 3,
        "image_size": data.image_size,
        "patch_size": c.patch_size,
        "projection_dim": c.embedding,
        "hidden_act": c.activation,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(stated, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation(data), indent=2) + "\n")
    again = read_source(folder)
    check_equal(naming.nested(encoder), {"encoder": again.params["encoder"]}, str(folder))


def write_stablehlo(m: retrieval.Model, unused: Tensors, folder: Path) -> None:
    del unused
    exports.export_programs(m, folder)  # reads back and compares by itself


def preparation(data: Any) -> dict[str, Any]:
    """The config's `data` section as preprocessor_config.json of Hugging Face: what evaluation does to a picture."""
    stretch = data.resize_mode == "stretch"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": data.resize, "width": data.resize} if stretch else {"shortest_edge": data.resize},
        "resample": 2 if stretch else 3,  # Pillow's bilinear, bicubic
        "do_center_crop": True,
        "crop_size": {"height": data.image_size, "width": data.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.MEAN),
        "image_std": list(model.STD),
    }


FORMATS = {
    "official": write_official,
    "pth": write_pth,
    "huggingface": write_huggingface,
    "stablehlo": write_stablehlo,
}
USE = {
    "official": 'safetensors.torch.load_file("model.safetensors")  # for load_state_dict of the official code',
    "pth": 'torch.load("rice_final.pth", weights_only=True)  # for its load_state_dict(strict=True)',
    "huggingface": "transformers.CLIPVisionModelWithProjection.from_pretrained(FOLDER)  # its image_embeds: any length",
    "stablehlo": 'load_programs(FOLDER)["encode_images"](images)  # the function in rice_jax/exports.py: copy it',
}


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
        configuration.warn(warning)
    print(f"{arguments.run}: {sizes(m.config)}; step {m.step}")
    for name, size in files.items():
        print(f"  {name}  {size:,} bytes")
    print(f"written to {arguments.output}, read back and compared")


def departures(config: Any) -> list[str]:
    """In what the official code, as it is published, computes something else from the same weights."""
    c = config.model
    official = {
        "model.activation": (c.activation, "quick_gelu"),
        "model.pool": (c.pool, "class_token"),
        "model.heads": (c.heads, c.width // 64),
        "model.hidden": (c.hidden, 4 * c.width),
    }
    if config.loss.pmd or config.loss.pfr:
        official |= {
            "model.decoder_heads": (c.decoder_heads, 8),
            "model.cross_kv_norm": (c.cross_kv_norm, False),
            "model.decoder_self_eps": (c.decoder_self_eps, 1e-12),
        }
    return [
        f"{name} is {ours}, where the official code has {theirs}: with these weights it computes something else."
        for name, (ours, theirs) in official.items()
        if ours != theirs
    ]


def model_card(m: retrieval.Model, run: Path, form: str, warnings: list[str]) -> str:
    """README.md of an export: what it is, how to open it, what it was trained on, and how good it is."""
    meta = Checkpoints(run).meta(m.step)
    count = sum(x.size for x in jax.tree.leaves(m.params))
    lines = [
        f"# RICE, {form}",
        "",
        f"Which shop image does a clip of a livestream show? {sizes(m.config)}; {count:,} parameters, "
        f"after {m.step} updates. Made by rice_jax {__version__}.",
        "",
        f"```python\n{USE[form]}\n```",
        "",
        "| | |",
        "|---|---|",
        f"| parameters (fingerprint) | `{m.fingerprint}` |",
        f"| data (content hash of its manifest) | `{meta.get('data', 'none: not trained here')}` |",
        f"| started from | {_origin(m.config, meta)} |",
        "",
        *(line for warning in warnings for line in (f"**Note.** {warning}", "")),
        "## Metrics",
        "",
        *_metrics(run, m),
        "",
        "## Licence",
        "",
        LICENCE,
        "",
        "## Config",
        "",
        f"```json\n{configuration.to_json(m.config)}```",
        "",
    ]
    return "\n".join(lines)


def _origin(config: Any, meta: Mapping[str, Any]) -> str:
    source = meta.get("source")
    if source:
        return f"{source['name']} ({source['kind']}): {'; '.join(source['notes'])}"
    return config.init_from or "random weights"


def _metrics(run: Path, m: retrieval.Model) -> list[str]:
    """A line a figure: of this model's evaluations in the run's folder, and of the training's own at this step."""
    found = []
    for path in sorted(run.glob("evaluation-*/metrics.json")):
        figures = json.loads(path.read_text())
        if figures.get("model") == m.fingerprint:
            found.append((path.parent.name, figures))
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found += [("during training", line) for line in lines if line["step"] == m.step and "loss" not in line]
    rows = [
        f"| {where} | {name} | {value:.2f} |"
        for where, figures in found
        for name, value in figures.items()
        if isinstance(value, (int, float)) and name != "step"
    ]
    return ["| evaluation | figure | value (recall in percent) |", "|---|---|--:|", *rows] if rows else ["None yet."]


# --- What is there ---


def show(arguments: argparse.Namespace) -> None:
    path, faults = arguments.path, list[str]()
    if is_run(path):
        m = load_on_one_device(path)
        kind, file, config = RUN, path, m.config
        rows = [(name, x.shape, str(x.dtype), name) for name, x in naming.flattened(m.params).items()]
    else:
        found = look(path)
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
        rule, found = naming.match(name, table)
    except ValueError as error:
        return str(error).rpartition(": ")[2]
    if rule.path is None:
        return "not used"
    return (
        rule.path + (f"[{found[1]}]" if found.groups() else "") + ("" if rule.part is None else f" {'qkv'[rule.part]}")
    )


def main(arguments: argparse.Namespace) -> None:
    {"import": import_weights, "export": export, "show": show}[arguments.command](arguments)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rice_jax.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import", help="weights of others as a folder that rice_jax opens")
    command.add_argument("source", type=Path, metavar="SOURCE", help="file or folder of weights")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder, new or empty")
    command.add_argument(
        "--activation", choices=sorted(model.ACTIVATIONS), help="of the MLPs, where the file does not say"
    )
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


if __name__ == "__main__":
    configuration.run(main, parse())

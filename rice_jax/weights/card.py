"""Describes models in words: one line on a model's sizes, and the README.md of an export."""

import json
from pathlib import Path

import jax

from rice_jax.config import Config, to_json
from rice_jax.retrieval.model import Model
from rice_jax.training.ledger import read_metrics
from rice_jax.version import __version__

LICENCE = "The licence is that of the weights' source and of the data they were trained on; none is granted here."
HOW_TO_OPEN = {
    "official": 'safetensors.torch.load_file("model.safetensors")  # for load_state_dict of the official code',
    "pth": 'torch.load("rice_final.pth", weights_only=True)  # for its load_state_dict(strict=True)',
    "huggingface": "transformers.CLIPVisionModelWithProjection.from_pretrained(FOLDER)  # its image_embeds: any length",
    "stablehlo": 'load_programs(FOLDER)["encode_images"](images)  # copy it from rice_jax/weights/exports.py',
}


def describe_model(config: Config) -> str:
    """Returns one line of text: the parts of the model (a decoder with PMD or PFR), their sizes, the activation."""
    c = config.model
    has_decoder = bool(config.loss.pmd or config.loss.pfr)
    parts, heads = ("encoder and decoder", f", {c.decoder_heads} decoder heads") if has_decoder else ("encoder", "")
    return (
        f"{parts}: patch {c.patch_size}, {config.data.image_size} px, width {c.width}, "
        f"{c.layers} layers, {c.heads} heads, MLP {c.hidden}, embedding {c.embedding}, {c.activation}{heads}"
    )


def differences_from_official(config: Config) -> list[str]:
    """Returns a sentence for each field with which the official code computes something else; [] if none."""
    c = config.model
    official: dict[str, tuple[object, object]] = {
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
        f"{name} is {ours}, where the official code has {theirs}: from these weights it computes something else."
        for name, (ours, theirs) in official.items()
        if ours != theirs
    ]


def model_card(model: Model, run: Path, format_name: str, warnings: list[str]) -> str:
    """Returns the README.md of an export: sizes, how to open it, origin, warnings, metrics, licence and config.

    Raises ValueError if the figures of an evaluation or the log are damaged; KeyError if HOW_TO_OPEN lacks
    `format_name`.
    """
    count = sum(x.size for x in jax.tree.leaves(model.params))
    origin = model.config.init_from or "random weights"
    if source := model.meta.get("source"):
        origin = f"{source['name']} ({source['kind']}): {'; '.join(source['notes'])}"
    paragraphs = [
        f"# RICE, {format_name}",
        f"Which shop image does a clip of a livestream show? {describe_model(model.config)}; {count:,} parameters, "
        f"after {model.step} updates. Made by rice_jax {__version__}.",
        f"```python\n{HOW_TO_OPEN[format_name]}\n```",
        "| | |\n|---|---|\n"
        f"| parameters (fingerprint) | `{model.fingerprint}` |\n"
        f"| data (content hash of its manifest) | `{model.meta.get('data', 'none: not trained here')}` |\n"
        f"| started from | {origin} |",
        *(f"**Note.** {warning}" for warning in warnings),
        "## Metrics",
        "\n".join(_metrics(run, model)),
        "## Licence",
        LICENCE,
        "## Config",
        f"```json\n{to_json(model.config)}```\n",
    ]
    return "\n\n".join(paragraphs)


def _metrics(run: Path, model: Model) -> list[str]:
    """Returns lines: a table of this model's figures in `run`, or "None yet." alone. Raises ValueError for no JSON."""
    found = []
    for path in sorted(run.glob("evaluation-*/metrics.json")):
        try:
            figures = json.loads(path.read_text())
            is_of_model = figures.get("model") == model.fingerprint
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: is damaged ({error}); run the same rice_jax.evaluate again, or move that folder away."
            ) from error
        if is_of_model:
            found.append((path.parent.name, figures))
    log = run / "metrics.jsonl"
    lines = read_metrics(log) if log.exists() else []
    found += [("during training", line) for line in lines if line["step"] == model.step and "loss" not in line]
    rows = [
        f"| {where} | {name} | {value:.2f} |"
        for where, figures in found
        for name, value in figures.items()
        if isinstance(value, (int, float)) and name != "step"
    ]
    return ["| evaluation | figure | value (recall in percent) |", "|---|---|--:|", *rows] if rows else ["None yet."]

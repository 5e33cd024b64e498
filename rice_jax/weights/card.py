"""The model card of an export."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import to_json
from rice_jax.retrieval.model import Model
from rice_jax.version import __version__
from rice_jax.weights.writers import sizes

LICENCE = "The licence is that of the weights' source and of the data they were trained on; none is granted here."


USE = {
    "official": 'safetensors.torch.load_file("model.safetensors")  # for load_state_dict of the official code',
    "pth": 'torch.load("rice_final.pth", weights_only=True)  # for its load_state_dict(strict=True)',
    "huggingface": "transformers.CLIPVisionModelWithProjection.from_pretrained(FOLDER)  # its image_embeds: any length",
    "stablehlo": 'load_programs(FOLDER)["encode_images"](images)  # the function in rice_jax/exports.py: copy it',
}


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


def model_card(m: Model, run: Path, form: str, warnings: list[str]) -> str:
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
        f"```json\n{to_json(m.config)}```",
        "",
    ]
    return "\n".join(lines)


def _origin(config: Any, meta: Mapping[str, Any]) -> str:
    source = meta.get("source")
    if source:
        return f"{source['name']} ({source['kind']}): {'; '.join(source['notes'])}"
    return config.init_from or "random weights"


def _metrics(run: Path, m: Model) -> list[str]:
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

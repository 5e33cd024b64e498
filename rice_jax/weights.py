"""Names of others and ours: one table a source and one loop, closed in both directions.

A rule is (pattern on the source's name, our path, transform). A stack of blocks is stored by us on a leading axis, so
a pattern with a group `(\\d+)` collects its layers. Exactly one rule must match every tensor, and every parameter
of ours must be filled; all faults are reported together.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Tensor = np.ndarray


class Rule(NamedTuple):
    pattern: str
    path: str | None  # None: known, and not used
    transform: Callable[[Tensor], Tensor] = lambda x: x


def _transpose(x: Tensor) -> Tensor:
    return x.T  # torch's linear layers are [out, in]


def _block(source: str, ours: str) -> tuple[Rule, ...]:
    """The twelve tensors of a CLIP block."""
    return (
        *(Rule(rf"{source}\.ln_{i}\.weight", f"{ours}/ln_{i}/scale") for i in (1, 2)),
        *(Rule(rf"{source}\.ln_{i}\.bias", f"{ours}/ln_{i}/bias") for i in (1, 2)),
        Rule(rf"{source}\.attn\.in_proj_weight", f"{ours}/attn/in_proj_kernel", _transpose),
        Rule(rf"{source}\.attn\.in_proj_bias", f"{ours}/attn/in_proj_bias"),
        *(
            rule
            for name, path in (
                ("attn\\.out_proj", "attn/out_proj"),
                ("mlp\\.c_fc", "mlp/c_fc"),
                ("mlp\\.c_proj", "mlp/c_proj"),
            )
            for rule in (
                Rule(rf"{source}\.{name}\.weight", f"{ours}/{path}/kernel", _transpose),
                Rule(rf"{source}\.{name}\.bias", f"{ours}/{path}/bias"),
            )
        ),
    )


ENCODER = r"image_encoder\.model"
DECODER = r"transformer\.transformer"

OFFICIAL: tuple[Rule, ...] = (  # SPEC 2.6, 15.1 and golden/parameters.csv
    Rule(rf"{ENCODER}\.class_embedding", "encoder/class_embedding"),
    Rule(rf"{ENCODER}\.positional_embedding", "encoder/positional_embedding"),
    Rule(rf"{ENCODER}\.proj", "encoder/proj"),  # used un-transposed (2.4)
    Rule(rf"{ENCODER}\.conv1\.weight", "encoder/conv1/kernel", lambda x: x.transpose(2, 3, 1, 0)),
    *(Rule(rf"{ENCODER}\.ln_{part}\.weight", f"encoder/ln_{part}/scale") for part in ("pre", "post")),
    *(Rule(rf"{ENCODER}\.ln_{part}\.bias", f"encoder/ln_{part}/bias") for part in ("pre", "post")),
    *_block(rf"{ENCODER}\.transformer\.resblocks\.(\d+)", "encoder/resblocks"),
    Rule(r"transformer\.logit_scale", "logit_scale"),
    Rule(rf"{DECODER}\.embeddings\..*", None),  # bypassed, never trained (5.1)
    *_block(rf"{DECODER}\.transformer\.layers\.0", "decoder/self_layer"),
    *_block(rf"{DECODER}\.transformer\.layers\.1", "decoder/cross_layer"),
    Rule(rf"{DECODER}\.pooler\.layer_norm\.weight", "decoder/pooler_norm/scale"),
    Rule(rf"{DECODER}\.pooler\.layer_norm\.bias", "decoder/pooler_norm/bias"),
    Rule(rf"{DECODER}\.pooler\.dense\.weight", "decoder/dense/kernel", _transpose),
    Rule(r"transformer\.heads\.vim\.weight", "decoder/match", lambda x: x[0]),
    Rule(r"transformer\.heads\.rec\.0\.weight", "reconstruction/conv1_kernel", lambda x: x[:, :, 0, 0].T),
    Rule(r"transformer\.heads\.rec\.0\.bias", "reconstruction/conv1_bias"),
    Rule(r"transformer\.heads\.rec\.2\.weight", "reconstruction/conv2_kernel", lambda x: x[0, :, 0, 0]),
    Rule(r"transformer\.heads\.rec\.2\.bias", "reconstruction/conv2_bias"),
)


def convert(tensors: Mapping[str, Tensor], rules: tuple[Rule, ...] = OFFICIAL) -> dict[str, Any]:
    """Another program's tensors as our parameters: nested dicts of NumPy arrays.

    Raises:
      ValueError: tensors without a rule or with two, and blocks with a layer missing; all of them in one message.
    """
    flat: dict[str, Tensor] = {}
    layers: dict[str, dict[int, Tensor]] = {}
    faults = []
    for name, tensor in tensors.items():
        try:
            rule, found = match(name, rules)
        except ValueError as error:
            faults.append(f"{error} (shape {tensor.shape})")
            continue
        if rule.path is None:
            continue
        if found.groups():
            layers.setdefault(rule.path, {})[int(found[1])] = rule.transform(tensor)
        else:
            flat[rule.path] = rule.transform(tensor)
    for path, stack in layers.items():
        if sorted(stack) != list(range(len(stack))):
            faults.append(f"{path}: layers {sorted(stack)} are not 0 to {len(stack) - 1}")
        else:
            flat[path] = np.stack([stack[layer] for layer in range(len(stack))])
    if faults:
        raise ValueError("these tensors are not of the official RICE model:\n  " + "\n  ".join(faults))
    return nested(flat)


def match(name: str, rules: tuple[Rule, ...] = OFFICIAL) -> tuple[Rule, re.Match[str]]:
    """The one rule for a source's tensor; ValueError when there is none or more than one."""
    matches = [(rule, found) for rule in rules if (found := re.fullmatch(rule.pattern, name))]
    if len(matches) != 1:
        raise ValueError(f"{name}: {'several rules match' if matches else 'no rule matches'}")
    return matches[0]


def nested(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """{'a/b': x} as {'a': {'b': x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return tree

"""Tables of tensor names: which parameter of ours each tensor of another program is. One table per kind of file.

A rule maps one name of theirs to the path of one parameter of ours, with the change of axes between the two, and works
in both directions. Exactly one rule must match each tensor. In a name `*` stands for the number of a layer, because we
stack the layers on a leading axis. `**` stands for any text, in the rules of tensors that are known and not used.
"""

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


class Axes(NamedTuple):
    """A change of axes: `ours` makes our array of theirs, and `theirs` makes theirs of ours."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


AS_IS = Axes(lambda x: x, lambda x: x)
LINEAR = Axes(lambda x: x.T, lambda x: x.T)  # torch's linear layers are [out, in]
PATCHES = Axes(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # convolutions [out, in, h, w]
ROW = Axes(lambda x: np.asarray(x[0]), lambda x: x[None])  # a linear layer with one output
POINTS = Axes(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # a 1x1 convolution
POINT = Axes(lambda x: x[0, :, 0, 0], lambda x: x[None, :, None, None])  # a 1x1 convolution with one output


class Rule(NamedTuple):
    name: str  # theirs
    path: str | None  # ours; None: the tensor is known and not used
    axes: Axes = AS_IS
    part: int | None = None  # 0, 1, 2: the tensor is the q, k or v part of ours, which joins the three

    @property
    def pattern(self) -> str:
        """A regular expression for whole names. Its group 1 is the layer's number, if the name has a single `*`."""
        return re.escape(self.name).replace(r"\*\*", ".*").replace(r"\*", r"(\d+)")


Table = tuple[Rule, ...]


def _norm(name: str, path: str) -> Table:
    return Rule(f"{name}.weight", f"{path}/scale"), Rule(f"{name}.bias", f"{path}/bias")


def _linear(name: str, path: str) -> Table:
    return Rule(f"{name}.weight", f"{path}/kernel", LINEAR), Rule(f"{name}.bias", f"{path}/bias")


def _block(name: str, path: str) -> Table:
    return (
        *_norm(f"{name}.ln_1", f"{path}/ln_1"),
        Rule(f"{name}.attn.in_proj_weight", f"{path}/attn/in_proj_kernel", LINEAR),
        Rule(f"{name}.attn.in_proj_bias", f"{path}/attn/in_proj_bias"),
        *_linear(f"{name}.attn.out_proj", f"{path}/attn/out_proj"),
        *_norm(f"{name}.ln_2", f"{path}/ln_2"),
        *_linear(f"{name}.mlp.c_fc", f"{path}/mlp/c_fc"),
        *_linear(f"{name}.mlp.c_proj", f"{path}/mlp/c_proj"),
    )


def _tower(name: str) -> Table:
    """The rules of CLIP's vision transformer in OpenAI's names (docs/official.md 2)."""
    return (
        Rule(f"{name}.class_embedding", "encoder/class_embedding"),
        Rule(f"{name}.positional_embedding", "encoder/positional_embedding"),
        Rule(f"{name}.proj", "encoder/proj"),  # used un-transposed (docs/official.md 2.4)
        Rule(f"{name}.conv1.weight", "encoder/conv1/kernel", PATCHES),
        *_norm(f"{name}.ln_pre", "encoder/ln_pre"),
        *_block(f"{name}.transformer.resblocks.*", "encoder/resblocks"),
        *_norm(f"{name}.ln_post", "encoder/ln_post"),
    )


def _not_used(*names: str) -> Table:
    return tuple(Rule(name, None) for name in names)


DECODER = "transformer.transformer"  # the official code's name for it
_OFFICIAL_ENCODER = _tower("image_encoder.model")
_OFFICIAL_EMBEDDINGS = _not_used(  # never read or trained (docs/official.md 5.1)
    f"{DECODER}.embeddings.class_embedding",
    f"{DECODER}.embeddings.position_embedding.weight",
    f"{DECODER}.embeddings.layer_norm.weight",
    f"{DECODER}.embeddings.layer_norm.bias",
)
OFFICIAL: Table = (  # with the head `pretraining` (docs/official.md 3.4, 15.1; tests/golden/parameters.csv)
    *_OFFICIAL_ENCODER,
    Rule("transformer.logit_scale", "logit_scale"),
    *_OFFICIAL_EMBEDDINGS,
    *_block(f"{DECODER}.transformer.layers.0", "decoder/self_layer"),
    *_block(f"{DECODER}.transformer.layers.1", "decoder/cross_layer"),
    *_norm(f"{DECODER}.pooler.layer_norm", "decoder/pooler_norm"),
    Rule(f"{DECODER}.pooler.dense.weight", "decoder/dense/kernel", LINEAR),
    Rule("transformer.heads.vim.weight", "decoder/match", ROW),
    Rule("transformer.heads.rec.0.weight", "reconstruction/conv1_kernel", POINTS),
    Rule("transformer.heads.rec.0.bias", "reconstruction/conv1_bias"),
    Rule("transformer.heads.rec.2.weight", "reconstruction/conv2_kernel", POINT),
    Rule("transformer.heads.rec.2.bias", "reconstruction/conv2_bias"),
)
OFFICIAL_NO_HEAD: Table = (  # ICL alone on MovingFashion, with a decoder that was never trained
    *_OFFICIAL_ENCODER,
    Rule("transformer.logit_scale", "logit_scale"),
    *_OFFICIAL_EMBEDDINGS,
    *_not_used(f"{DECODER}.transformer.layers.**", f"{DECODER}.pooler.**"),
)
OFFICIAL_CONTRASTIVE: Table = (  # the head `contrastive`: ICL alone on LPR; its logit_scale is not used
    *_OFFICIAL_ENCODER,
    Rule("transformer.contrastive_norm.norm_s", "logit_scale", ROW),
    *_not_used("transformer.logit_scale"),
)
_TEXT = _not_used(
    "positional_embedding",
    "token_embedding.weight",
    "transformer.resblocks.**",
    "ln_final.**",
    "text_projection",
    "logit_scale",
)
OPENAI: Table = (  # docs/official.md 15.2
    *_tower("visual"),
    *_TEXT,
    *_not_used("input_resolution", "context_length", "vocab_size"),
)
OPEN_CLIP: Table = (  # docs/official.md 15.5; newer models name the text tower `text.`
    *_tower("visual"),
    *_TEXT,
    *_not_used("input_resolution", "context_length", "vocab_size", "text.**", "attn_mask", "logit_bias"),
)
_LAYER, _RESBLOCKS = "vision_model.encoder.layers.*", "encoder/resblocks"
HUGGING_FACE: Table = (  # docs/official.md 15.4
    Rule("vision_model.embeddings.class_embedding", "encoder/class_embedding"),
    Rule("vision_model.embeddings.position_embedding.weight", "encoder/positional_embedding"),
    Rule("vision_model.embeddings.patch_embedding.weight", "encoder/conv1/kernel", PATCHES),
    *_norm("vision_model.pre_layrnorm", "encoder/ln_pre"),  # their spelling
    *_norm(f"{_LAYER}.layer_norm1", f"{_RESBLOCKS}/ln_1"),
    *(
        rule
        for part, letter in enumerate("qkv")
        for rule in (
            Rule(f"{_LAYER}.self_attn.{letter}_proj.weight", f"{_RESBLOCKS}/attn/in_proj_kernel", LINEAR, part),
            Rule(f"{_LAYER}.self_attn.{letter}_proj.bias", f"{_RESBLOCKS}/attn/in_proj_bias", AS_IS, part),
        )
    ),
    *_linear(f"{_LAYER}.self_attn.out_proj", f"{_RESBLOCKS}/attn/out_proj"),
    *_norm(f"{_LAYER}.layer_norm2", f"{_RESBLOCKS}/ln_2"),
    *_linear(f"{_LAYER}.mlp.fc1", f"{_RESBLOCKS}/mlp/c_fc"),
    *_linear(f"{_LAYER}.mlp.fc2", f"{_RESBLOCKS}/mlp/c_proj"),
    *_norm("vision_model.post_layernorm", "encoder/ln_post"),
    Rule("visual_projection.weight", "encoder/proj", LINEAR),
    *_not_used("vision_model.embeddings.position_ids", "text_model.**", "text_projection.weight", "logit_scale"),
)


@functools.cache
def find_rule(name: str, table: Table = OFFICIAL) -> tuple[Rule, re.Match[str]]:
    """Returns the rule for a tensor's name, and the match. Raises ValueError if no rule matches, or several do."""
    matches = [(rule, match) for rule in table if (match := re.fullmatch(rule.pattern, name))]
    if len(matches) != 1:
        raise ValueError(f"{name}: {'several rules match' if matches else 'no rule matches'}")
    return matches[0]


def is_known(name: str, table: Table) -> bool:
    """Returns whether a rule of the table is for the tensor's name."""
    return any(re.fullmatch(rule.pattern, name) for rule in table)


def convert(tensors: Mapping[str, np.ndarray], table: Table = OFFICIAL) -> dict[str, Any]:
    """Returns another program's tensors as our parameters: nested dicts of NumPy arrays, without the unused tensors.

    A stack has its layers on axis 0. Dtypes stay. Shapes are not checked: the caller does so before. Raises ValueError,
    naming all, for tensors without exactly one rule and parameters that lack a layer or one of q, k and v.
    """
    faults = []
    found: dict[str, dict[tuple[int | None, int | None], tuple[Axes, np.ndarray]]] = {}  # path -> (layer, part)
    for name, tensor in tensors.items():
        try:
            rule, match = find_rule(name, table)
        except ValueError as error:
            faults.append(f"{error} (shape {tensor.shape})")
            continue
        if rule.path is not None:
            layer = int(match[1]) if match.groups() else None
            found.setdefault(rule.path, {})[layer, rule.part] = rule.axes, tensor
    flat = {}
    for path, arrays in found.items():
        numbers = sorted({layer for layer, _ in arrays if layer is not None})
        layers = range(len(numbers)) or [None]
        parts = range(3) if any(part is not None for _, part in arrays) else [None]
        if arrays.keys() != set(itertools.product(layers, parts)):
            faults.append(f"{path}: layers {numbers} are not 0 to {len(numbers) - 1}, or lack one of q, k, v")
            continue
        for layer in layers:
            ours = [axes.ours(tensor) for axes, tensor in (arrays[layer, part] for part in parts)]
            array = np.concatenate(ours, axis=-1) if len(ours) > 1 else ours[0]
            if layer is None:
                flat[path] = array
                continue
            if layer == 0:  # the stack is filled layer by layer: half of np.stack's memory
                flat[path] = np.empty((len(numbers), *array.shape), array.dtype)
            flat[path][layer] = array
    if faults:
        raise ValueError("these tensors are not of the model:\n  " + "\n  ".join(faults))
    return nested(flat)


def invert(flat: Mapping[str, np.ndarray], table: Table = OFFICIAL) -> dict[str, np.ndarray]:
    """Returns parameters, given by path, as another program's tensors by name, a stack split; those in `table` only."""
    tensors = {}
    for rule in table:
        if rule.path is None or rule.path not in flat:
            continue
        array = flat[rule.path]
        for layer, theirs in enumerate(array) if "*" in rule.name else [(0, array)]:
            if rule.part is not None:
                theirs = np.split(theirs, 3, axis=-1)[rule.part]
            tensors[rule.name.replace("*", str(layer))] = rule.axes.theirs(theirs)
    return tensors


flattened = functools.partial(flatten_dict, sep="/")  # of {'a': {'b': x}} it makes {'a/b': x}
nested = functools.partial(unflatten_dict, sep="/")  # and of {'a/b': x} it makes {'a': {'b': x}}

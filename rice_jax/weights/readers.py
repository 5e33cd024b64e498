"""Pretrained weights as our parameters: of CLIP, of the official RICE, of runs of our own.

    source = read_source(Path("ViT-B-32.pt"))
    source.kind, source.config.model.width, source.params["encoder"]

Sizes are read off the tensors; heads and activation, which no tensor shows, from the JSON beside them (SPEC 15).
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from configs import default
from rice_jax.config import from_json
from rice_jax.models.arrays import MEAN, STD
from rice_jax.models.rice import build_model
from rice_jax.models.vit import ACTIVATIONS
from rice_jax.parallel import hosts
from rice_jax.parallel.mesh import make_mesh
from rice_jax.retrieval.model import Model, load
from rice_jax.training.step import State, init_params
from rice_jax.weights import archives, naming
from rice_jax.weights.inspect import HUGGING_FACE, OFFICIAL, OPENAI, Contents, inspect_weights, read_json

RUN = "rice_jax run"
UNUSED = "unused.safetensors"  # in a run's folder: the source's tensors that only an export writes back (SPEC 5.8)
SHOWN = 100  # faults of one file


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that were read, checked and renamed.

    Attributes:
      kind: whose names the file had (contents.py), or RUN.
      config: the model that they are of; its other fields are the defaults, or the run's.
      params: our parameters, nested dicts of float32 NumPy arrays; the encoder alone for CLIP.
      unused: tensors of the official model that take no part in it, by their official names.
      notes: what a user should know of the conversion.
    """

    kind: str
    config: Any
    params: dict[str, Any]
    unused: dict[str, np.ndarray]
    notes: tuple[str, ...]


def is_run(path: Path) -> bool:
    return (path / "checkpoints").is_dir()


def load_on_one_device(run: Path, step: int | None = None) -> Model:
    """A run's model where its parameters lie once, not once a device."""
    mesh = make_mesh(data=1, fsdp=1, devices=jax.local_devices()[:1])
    return load(run, step=step, mesh=mesh)


def read_source(path: Path, *, activation: str | None = None, image_size: int | None = None) -> Source:
    """The parameters of a file, a folder or a run.

    Args:
      activation: "quick_gelu" or "gelu", for files that do not say.
      image_size: px; position embeddings are resized where the file has another.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: a damaged file, another kind of model, or tensors that are missing, unexpected, of another shape or
        dtype or not finite: all of them in one message.
    """
    if is_run(path):
        run = load_on_one_device(path)
        params, resized = _resized(jax.device_get(run.params), run.config, image_size)
        return Source(RUN, run.config, params, read_unused(path), (f"after {run.step} updates of its own", *resized))
    found = inspect_weights(path)
    config, faults = measure(found, activation)
    tensors = {}
    for name, tensor in found.tensors.items():
        rule = _rule(name, found.table)
        # What the official model does not use is kept, so that an export gives back what came.
        if rule is None or tensor.dtype not in archives.FLOATS or (rule.path is None and found.kind != OFFICIAL):
            continue
        try:
            tensors[name] = tensor.read()
        except ValueError as error:
            faults.append(f"{name}: {error}")
            continue
        if not np.isfinite(tensors[name]).all():
            faults.append(f"{name}: holds NaN or infinite numbers")
    if faults:
        shown = faults[:SHOWN] + ([f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else [])
        raise ValueError(
            f"{found.file} ({found.kind}): {len(faults)} fault(s), nothing was converted:\n  " + "\n  ".join(shown)
        )
    unused = {name: tensors.pop(name) for name in list(tensors) if naming.find_rule(name, found.table)[0].path is None}
    dtypes = ", ".join(sorted({found.tensors[name].dtype for name in tensors}))
    notes = [f"{len(tensors)} tensors ({dtypes}) converted to float32"]
    if len(tensors) < len(found.tensors):
        notes.append(f"{len(found.tensors) - len(tensors)} tensors are known and not used")
    params = naming.convert(tensors, found.table)
    if found.kind != OFFICIAL:
        params["logit_scale"] = np.asarray(
            config.model.logit_scale_init, np.float32
        )  # CLIP's own is not used (SPEC 2.6)
    params, resized = _resized(params, config, image_size)
    return Source(found.kind, config.lock(), params, unused, (*notes, *resized))


def measure(found: Contents, activation: str | None = None) -> tuple[Any, list[str]]:
    """A config whose model the file holds, and all that is wrong with the file short of its numbers.

    Raises:
      ValueError: the JSON beside the file describes no model at all.
    """
    try:
        config, faults = _config(found, activation)
    except (ValueError, AttributeError, TypeError, KeyError, ZeroDivisionError) as error:
        if not found.description:
            raise
        raise ValueError(
            f"{found.file.parent}: the JSON beside {found.file.name} describes no model that is known here "
            f"({type(error).__name__}: {error}); fetch it again."
        ) from error
    return config, faults + _check(found, config)


def read_unused(run: Path) -> dict[str, np.ndarray]:
    """The official tensors that a run keeps only to give them back."""
    return load_file(run / UNUSED) if (run / UNUSED).exists() else {}


def save_unused(unused: dict[str, np.ndarray], run: Path) -> None:
    if unused:
        write_safetensors(unused, run / UNUSED)


def write_safetensors(tensors: Mapping[str, Any], path: Path) -> None:
    """float32 tensors as a file that everybody may read; the package itself makes it the owner's alone."""
    # Contiguous: the package writes an array's memory as it lies, whatever its strides say.
    arrays = {name: np.ascontiguousarray(x, np.float32).reshape(np.shape(x)) for name, x in tensors.items()}
    save_file(arrays, path, {"format": "pt"})  # transformers asks for that word
    path.chmod(0o644)


def _resized(params: dict[str, Any], config: Any, image_size: int | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Position embeddings for another image size, bicubic with anti-aliasing as open_clip has it; config follows."""
    old, patch = config.data.image_size, config.model.patch_size
    if image_size is None or image_size == old:
        return params, ()
    if image_size < patch:
        raise ValueError(f"image size {image_size}: needs at least the patch size, {patch}.")
    position = jnp.asarray(params["encoder"]["positional_embedding"])
    side, new = math.isqrt(len(position) - 1), image_size // patch
    grid = position[1:].reshape(side, side, -1)  # the class token's stays as it is
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic", antialias=True)
    encoder = params["encoder"] | {
        "positional_embedding": np.concatenate([position[:1], grid.reshape(new * new, -1)], axis=0)
    }
    with config.unlocked():
        config.data.resize = round(config.data.resize * image_size / old)
        config.data.image_size = image_size
    note = f"position embeddings resized (bicubic) from {side}x{side} patches to {new}x{new}: {old} px to {image_size}"
    return params | {"encoder": encoder}, (note,)


# --- How large the model is ---


def _config(found: Contents, activation: str | None) -> tuple[Any, list[str]]:
    """A config whose model the file holds, and what is wrong with what is said of it."""
    faults: list[str] = []
    sizes = _sizes(found)
    stated, said = _stated(found, faults)
    for name, value in stated.items():
        if name == "image_size" and value // sizes["patch_size"] == sizes[name] // sizes["patch_size"]:
            sizes[name] = value  # with pixels at the border that fill no patch
        elif sizes.setdefault(name, value) != value:
            faults.append(f"{name}: the JSON beside the file says {value}, the tensors {sizes[name]}")
    sizes.setdefault("heads", max(1, sizes["width"] // 64))
    sizes.setdefault("decoder_heads", 8 if sizes["width"] % 8 == 0 else sizes["heads"])
    for heads in ("heads", "decoder_heads"):
        if sizes["width"] % sizes[heads]:
            faults.append(f"{heads}: {sizes[heads]} do not divide the width {sizes['width']}")
            sizes[heads] = 1
    if not (said or activation):
        faults.append(
            "activation: the file does not say; give --activation quick_gelu (OpenAI's weights, and models named "
            "-quickgelu) or --activation gelu (most others of open_clip)"
        )
    if found.kind == OFFICIAL and found.description:
        config = from_json(json.dumps(found.description))
    else:
        config = default.get_config()
    with config.unlocked():
        config.init_from = ""
        if not found.description or found.kind != OFFICIAL:
            _fill(config, found)
        image_size = sizes.pop("image_size")
        config.data.resize = round(config.data.resize * image_size / config.data.image_size)
        config.data.image_size = image_size
        config.model.update(sizes | {"activation": said or activation or "quick_gelu"})
    return config, faults


def _fill(config: Any, found: Contents) -> None:
    """What the losses and the preparation of pictures must be, from what is there."""
    if found.kind != OFFICIAL:  # as CLIP was trained: shorter side, bicubic, and no border to cut off
        config.data.resize, config.data.resize_mode = config.data.image_size, "keep_ratio"
    pfr = any(name.startswith("transformer.heads.rec.") for name in found.tensors)
    config.loss.pfr = float(pfr)
    config.loss.pmd = float(pfr or "transformer.heads.vim.weight" in found.tensors)
    if found.table is naming.OFFICIAL_CONTRASTIVE:
        config.optimizer.logit_scale_lr_multiplier = 100.0  # SPEC 3.4


def _sizes(found: Contents) -> dict[str, int]:
    """What the tensors show. Those that are missing, which is told elsewhere, count as the smallest possible."""
    shapes: dict[str, tuple[int, ...]] = {}
    layers = set()
    for name, tensor in found.tensors.items():
        rule = _rule(name, found.table)
        if rule is not None and rule.path is not None:
            shapes.setdefault(rule.path, tensor.shape)
            if "*" in rule.name:
                layers.add(naming.find_rule(name, found.table)[1][1])

    def length(path: str, axis: int = 0) -> int:
        shape = shapes.get(path, ())
        return shape[axis] if -len(shape) <= axis < len(shape) else 0

    vectors = (length(f"encoder/{name}") for name in ("class_embedding", "ln_pre/scale", "ln_post/scale"))
    width = next((size for size in vectors if size), 64)
    # Whichever side of proj is not the width: a transposed one is then of a wrong shape, not of another size.
    sides = [side for side in shapes.get("encoder/proj", ()) if side != width]
    patch = length("encoder/conv1/kernel", -1) or 1
    sizes = {
        "width": width,
        "patch_size": patch,
        "image_size": max(1, math.isqrt(max(0, length("encoder/positional_embedding") - 1))) * patch,
        "layers": max(1, len(layers)),
        "hidden": length("encoder/resblocks/mlp/c_fc/bias") or 4 * width,
        "embedding": sides[0] if sides else width,
    }
    heads = length("reconstruction/conv1_kernel", 1)
    return sizes | ({"decoder_heads": heads} if heads else {})


def _stated(found: Contents, faults: list[str]) -> tuple[dict[str, int], str | None]:
    """Sizes and activation as the JSON beside the file has them; what our model cannot be goes to `faults`."""
    said = found.description
    if found.kind == OPENAI or (found.kind == OFFICIAL and not said):
        return {}, "quick_gelu"  # SPEC 2.3
    if not said:
        return {}, None
    if found.kind == OFFICIAL:
        config = from_json(json.dumps(said))
        names = ("width", "layers", "heads", "hidden", "embedding", "patch_size", "decoder_heads")
        sizes = {name: config.model[name] for name in names}
        return sizes | {"image_size": config.data.image_size}, config.model.activation
    if found.kind == HUGGING_FACE:
        sizes, activation, fixed, pixels = _of_hugging_face(said, found.file.parent)
    else:
        sizes, activation, fixed, pixels = _of_open_clip(said)
    where = "the JSON beside the file"
    if activation not in ACTIVATIONS:
        faults.append(f"activation: {where} says {activation}, needs one of {', '.join(ACTIVATIONS)}")
    faults += [f"{name}: {where} says {value}, needs {needed}" for name, value, needed in fixed if value != needed]
    faults += [
        f"{name} of pixels: {where} says {value}, needs CLIP's {list(needed)}"
        for name, value, needed in zip(("mean", "std"), pixels, (MEAN, STD), strict=True)
        if value is not None and (np.shape(value) != (3,) or not np.allclose(value, needed, atol=1e-4))
    ]
    whole = {name: size for name, size in sizes.items() if isinstance(size, int) and size > 0}
    faults += [f"{name}: {where} says {sizes[name]!r}, needs a whole number" for name in sizes.keys() - whole.keys()]
    return whole, activation if activation in ACTIVATIONS else "quick_gelu"


Stated = tuple[dict[str, Any], str, list[tuple[str, Any, Any]], tuple[Any, Any]]  # sizes, activation, fixed, pixels


def _of_hugging_face(said: Mapping[str, Any], folder: Path) -> Stated:
    """config.json of CLIPModel or CLIPVisionModelWithProjection; what it leaves out is ViT-B/32's (SPEC 15.4)."""
    vision = said.get("vision_config") or said
    sizes = {
        "width": vision.get("hidden_size", 768),
        "hidden": vision.get("intermediate_size", 3072),
        "layers": vision.get("num_hidden_layers", 12),
        "heads": vision.get("num_attention_heads", 12),
        "image_size": vision.get("image_size", 224),
        "patch_size": vision.get("patch_size", 32),
        "embedding": said.get("projection_dim", 512),
    }
    fixed = [
        ("layer_norm_eps", vision.get("layer_norm_eps", 1e-5), 1e-5),
        ("num_channels", vision.get("num_channels", 3), 3),
    ]
    prepared = read_json(folder / "preprocessor_config.json")
    return (
        sizes,
        vision.get("hidden_act", "quick_gelu"),
        fixed,
        (prepared.get("image_mean"), prepared.get("image_std")),
    )


def _of_open_clip(said: Mapping[str, Any]) -> Stated:
    """open_clip_config.json (SPEC 15.5)."""
    cfg, prepared = said.get("model_cfg", said), said.get("preprocess_cfg", {})
    vision = cfg.get("vision_cfg", {})
    sizes = {name: vision[name] for name in ("width", "layers", "patch_size", "image_size") if name in vision}
    if isinstance(sizes.get("width"), int):
        sizes["heads"] = sizes["width"] // vision.get("head_width", 64)
        sizes["hidden"] = int(sizes["width"] * vision.get("mlp_ratio", 4.0))
    if "embed_dim" in cfg:
        sizes["embedding"] = cfg["embed_dim"]
    fixed = [
        ("pool_type", vision.get("pool_type", "tok"), "tok"),
        ("global_average_pool", vision.get("global_average_pool", False), False),
        ("final_ln_after_pool", vision.get("final_ln_after_pool", False), False),
        ("eps", (vision.get("norm_kwargs") or {}).get("eps", 1e-5), 1e-5),
    ]
    activation = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
    return sizes, activation, fixed, (prepared.get("mean"), prepared.get("std"))


# --- Whether all is there ---


def _rule(name: str, table: naming.Table) -> naming.Rule | None:
    try:
        return naming.find_rule(name, table)[0]
    except ValueError:
        return None


def _check(found: Contents, config: Any) -> list[str]:
    """Tensors that are missing, unexpected, or of another shape or dtype than the model's sizes ask for."""
    shapes = jax.eval_shape(lambda: init_params(build_model(config), config, jax.random.key(0)))
    nothing = {path: np.broadcast_to(np.float32(0), x.shape) for path, x in naming.flattened(shapes).items()}
    wanted = {name: array.shape for name, array in naming.invert(nothing, found.table).items()}
    faults = []
    for name, tensor in found.tensors.items():
        try:
            rule, _ = naming.find_rule(name, found.table)
        except ValueError as error:
            faults.append(f"{error}: unexpected (shape {tensor.shape})")
            continue
        if rule.path is None:
            continue
        if name not in wanted:
            faults.append(f"{name}: unexpected in a model of {config.model.layers} layers")
        elif tensor.shape != wanted[name]:
            faults.append(f"{name}: shape {tensor.shape}, needs {wanted[name]}")
        elif tensor.dtype not in archives.FLOATS:
            faults.append(f"{name}: {tensor.dtype}, needs one of {', '.join(archives.FLOATS)}")
    return faults + [f"{name}: missing (shape {shape})" for name, shape in wanted.items() if name not in found.tensors]


# --- The start of a run ---

SAME = (
    "patch_size", "stem_channels", "stem_blocks", "pool", "width", "layers", "heads", "hidden", "embedding",
    "activation",
)  # fmt: skip


def initialise(state: State, config: Any, workdir: Path) -> tuple[State, list[str]]:
    """The state of a new run with the weights of config.init_from in it, and what a user should know of that.

    Raises:
      FileNotFoundError, ValueError: as read_source and start_from.
    """
    source = read_source(Path(config.init_from), activation=config.model.activation, image_size=config.data.image_size)
    if jax.process_count() > 1:
        hosts.agree({"weights of init_from": digest(source.params)})
    started = start_from(source, state, config)
    if hosts.is_first():
        save_unused(source.unused, workdir)
    return started


def digest(params: Any) -> str:
    """Of NumPy parameters: each process fills its own devices from its own file."""
    sha = hashlib.sha256()
    for path, array in sorted(naming.flattened(params).items()):
        sha.update(f"{path} {array.shape} ".encode() + np.ascontiguousarray(array, np.float32).tobytes())
    return sha.hexdigest()[:16]


def start_from(source: Source, state: State, config: Any) -> tuple[State, list[str]]:
    """A new run's state with a source's weights in place of random ones, and what a user should know of it.

    The encoder always; the decoder and its heads where the source has them, and otherwise the decoder's two layers from
    the encoder's last two blocks, as the official code starts from CLIP (SPEC 5.8).

    Raises:
      ValueError: a model of other sizes than the config's, all fields named.
    """
    theirs, ours = source.config.model, config.model
    differ = [
        f"model.{name}: {theirs[name]!r} there, {ours[name]!r} here" for name in SAME if theirs[name] != ours[name]
    ]
    old = naming.flattened(state.params)
    new = naming.flattened(source.params)
    has_decoder = any(path.startswith("decoder/") for path in old)
    borrows = has_decoder and "decoder" not in source.params
    if borrows and ours.layers < 2:
        differ.append("model.layers: 1, and the decoder starts as the encoder's last two blocks")
    if differ:
        raise ValueError(f"init_from={config.init_from} is not the config's model:\n  " + "\n  ".join(differ))

    notes = [f"starts from {config.init_from} ({source.kind}): {'; '.join(source.notes)}"]
    if source.kind not in (OFFICIAL, RUN):
        del new["logit_scale"]  # the config's own start
    if borrows:
        prefix = "encoder/resblocks/"
        stacks = {path.removeprefix(prefix): stack for path, stack in new.items() if path.startswith(prefix)}
        for name, layer in (("self_layer", -2), ("cross_layer", -1)):
            new |= {f"decoder/{name}/{path}": stack[layer] for path, stack in stacks.items()}
        notes.append("the decoder's layers start as the encoder's last two blocks, its pooler and heads anew")
    elif has_decoder and theirs.decoder_heads != ours.decoder_heads:
        new = {path: array for path, array in new.items() if not path.startswith("reconstruction/")}
        notes.append(
            f"the rec head of PFR starts anew: model.decoder_heads is {theirs.decoder_heads} there, "
            f"{ours.decoder_heads} here"
        )
    elif "reconstruction/conv1_kernel" in old.keys() - new.keys():
        notes.append("the rec head of PFR starts anew: there is none there")

    def put(like: Any, array: np.ndarray) -> Any:
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: np.asarray(array[index]))

    params = naming.nested({path: put(x, new[path]) if path in new else x for path, x in old.items()})
    average = jax.tree.map(jnp.copy, params) if state.average else {}
    return state._replace(params=params, average=average), notes

"""Exports a model as programs that run without this package: StableHLO by jax.export, and the parameters beside it.

    DIR/encode_images.stablehlo   (parameters, images uint8 [b,px,px,3])                           -> float32 [b,E]
    DIR/encode_clips.stablehlo    (parameters, frames uint8 [b,n,px,px,3], mask int32 [b,n])       -> float32 [b,E]
    DIR/match.stablehlo           (parameters, frames, mask, images uint8 [m,px,px,3])             -> float32 [b,m]
    DIR/parameters.safetensors    {name: float32 array}, the first argument of each program
    DIR/programs.json             versions, platforms, shapes

b, n and m are any numbers of clips, frame slots and images. `load_programs` shows how another program runs them.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from safetensors.numpy import save

from data_pipeline.system.output_folder import new_folder
from rice_jax.models.rice import matmul_precision
from rice_jax.parallel.mesh import path_name
from rice_jax.retrieval import inference
from rice_jax.retrieval.model import Model
from rice_jax.version import __version__

PLATFORMS = ("cpu", "cuda", "tpu")


def load_programs(folder: "str | os.PathLike[str]") -> "dict[str, Callable[..., Any]]":
    """Returns the programs of an export: {name: function of pictures}, with names and arguments as in programs.json.

    This function needs jax, flatbuffers and safetensors and nothing of rice_jax, so it can be copied into another
    program. Each returned function is compiled once for each shape of its arguments, and returns a float32 jax array:

        programs = load_programs(folder)
        scores = programs["match"](frames, mask, images)

    Raises FileNotFoundError if one of the export's files is missing, and ValueError if programs.json is no JSON or a
    newer jax than this one wrote it.
    """
    import functools
    import json
    from pathlib import Path

    import jax
    from jax import export
    from safetensors.numpy import load_file

    about = json.loads((Path(folder) / "programs.json").read_text())
    if tuple(about["jax"]) > jax.__version_info__:
        written, here = (".".join(map(str, version)) for version in (about["jax"], jax.__version_info__))
        raise ValueError(f"{folder}: written by jax {written}, which jax {here} may not read; install jax>={written}.")
    parameters = jax.device_put(load_file(Path(folder) / "parameters.safetensors"))
    programs: dict[str, Callable[..., Any]] = {}  # Python does not evaluate annotations of locals
    for name in about["programs"]:
        exported = export.deserialize(bytearray((Path(folder) / f"{name}.stablehlo").read_bytes()))
        programs[name] = functools.partial(jax.jit(exported.call), parameters)
    return programs


def export_programs(model: Model, output: Path) -> None:
    """Writes the programs of a model into the folder `output`, which is new or empty.

    A model that was not trained with PMD has no program `match`. The programs are read back and compared with the
    model's methods before the folder appears; after an error there is no folder. Raises ValueError if `output` is not
    empty, or a program that was read back gives other figures than the model.
    """
    with new_folder(output) as folder:
        _write_programs(model, folder)
        _compare(model, load_programs(folder), output)


def _write_programs(model: Model, folder: Path) -> None:
    flat = flat_parameters(model)
    parameters = save({name: np.array(leaf, order="C") for name, leaf in flat.items()})
    (folder / "parameters.safetensors").write_bytes(parameters)
    programs = {}
    for name, exported in _exported_programs(model, flat):
        (folder / f"{name}.stablehlo").write_bytes(exported.serialize())
        programs[name] = {
            "inputs": [f"{x.dtype} {x.shape}" for x in exported.in_avals[len(flat) :]],
            "output": f"{exported.out_avals[0].dtype} {exported.out_avals[0].shape}",
            "calling_convention": exported.calling_convention_version,
        }
    about = {
        "rice_jax": __version__,
        "jax": jax.__version_info__,
        "platforms": PLATFORMS,
        "model": model.fingerprint,
        "image_size": model.config.data.image_size,
        "mirror_images_added": model.config.eval_flip,
        "programs": programs,
    }
    (folder / "programs.json").write_text(json.dumps(about, indent=2) + "\n")


def flat_parameters(model: Model) -> dict[str, Any]:
    """Returns {path: array on the devices} of all parameters, such as 'encoder/proj'."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)}


def _exported_programs(model: Model, flat: Mapping[str, Any]) -> Iterator[tuple[str, export.Exported]]:
    """Yields name and program of encode_images, encode_clips and, if the model can match, match; any batch size."""
    structure = jax.tree.structure(model.params)
    parameters = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}
    b, n, m = export.symbolic_shape("b, n, m")
    side, flip = model.config.data.image_size, model.config.eval_flip
    shapes = lambda *batch: jax.ShapeDtypeStruct((*batch, side, side, 3), np.uint8)
    clips = shapes(b, n), jax.ShapeDtypeStruct((b, n), np.int32)
    encode_images = functools.partial(inference.encode_images, model.net, flip)
    encode_clips = functools.partial(inference.encode_clips, model.net, flip)
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "encode_images": (encode_images, (shapes(b),)),
        "encode_clips": (encode_clips, clips),
    }
    if model.can_match:
        match = functools.partial(inference.score_all_pairs, model.net, False)
        programs["match"] = (match, (*clips, shapes(m)))

    for name, (function, inputs) in programs.items():

        def program(parameters: dict[str, Any], *pictures: Any, function: Callable[..., Any] = function) -> Any:
            # A plain dict has its keys sorted, so leaves are put back in order by name.
            with matmul_precision(model.net):
                return function(jax.tree.unflatten(structure, [parameters[key] for key in flat]), *pictures)

        yield name, export.export(jax.jit(program), platforms=PLATFORMS)(parameters, *inputs)


def _compare(model: Model, programs: Mapping[str, Callable[..., Any]], output: Path) -> None:
    """Raises ValueError if a result differs from the model's in shape, or by over the tolerance of its precision."""
    model = dataclasses.replace(model, batch_size=model.mesh.size)
    side = model.config.data.image_size
    # Products are not rounded alike in batches of different sizes: to bfloat16 or TF32, in float32 on accelerators,
    # and on CPUs, where every precision of float32 is the highest.
    on_cpu = jax.default_backend() == "cpu" and model.config.model.dtype == "float32"
    tolerance = 1e-5 if on_cpu else 1e-4 if model.net.precision == "highest" else 2e-2
    rng, mask = np.random.default_rng(0), np.array([[1, 0, 0], [1, 1, 1]], np.int32)
    frames, images = (rng.integers(0, 256, (*n, side, side, 3), np.uint8) for n in (mask.shape, (5,)))
    inputs = {"encode_images": (images,), "encode_clips": (frames, mask), "match": (frames, mask, images)}
    for name, program in programs.items():
        expected, found = getattr(model, name)(*inputs[name]), np.asarray(program(*inputs[name]))
        gap = float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf
        if not gap <= tolerance:
            raise ValueError(
                f"{output}: {name} read back differs from the model by {gap:.1e}; nothing was exported. Report it with "
                f"rice_jax {__version__} and jax {jax.__version__}."
            )

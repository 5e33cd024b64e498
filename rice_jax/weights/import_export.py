"""Makes a run's folder from weights of another program, and an export's folder from a run.

A folder appears when all of it is written, was read back and is equal; after an error there is none.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from data_pipeline.system.output_folder import new_folder
from rice_jax.checkpoints.run_folder import is_run, write_config
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import to_json
from rice_jax.retrieval.model import Model
from rice_jax.training.step import State
from rice_jax.weights.card import differences_from_official, model_card
from rice_jax.weights.readers import Source, load_on_one_device, read_source
from rice_jax.weights.tensor_files import read_unused, save_unused
from rice_jax.weights.writers import FORMATS, check_equal


def import_weights(path: Path, output: Path, *, activation: str | None = None, image_size: int | None = None) -> Source:
    """Writes the weights of a file or folder as a run at step 0 into the folder `output`, and returns them.

    Args:
      output: new or empty.
      activation, image_size: as in read_source.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: `path` is a run, an `activation` other than the file's, an `output` that is not empty, a written file
        that reads back differently, or what read_source refuses.
    """
    if is_run(path):
        raise ValueError(f"{path}: is a run already; give it to rice_jax.load or --config.init_from as it is.")
    with new_folder(output) as folder:
        source = read_source(path, activation=activation, image_size=image_size)
        stated = source.config.model.activation
        if activation not in (None, stated):
            raise ValueError(f"--activation {activation}: the file says {stated}; leave the option out.")
        origin = {"name": path.name, "kind": source.kind, "notes": list(source.notes)}
        state = State(jnp.int32(0), jax.tree.map(jnp.asarray, source.params), {}, {})
        write_config(folder, to_json(source.config))
        with Checkpoints(folder, kept=1) as checkpoints:
            checkpoints.save(0, state, {"source": origin})
        save_unused(source.unused, folder)
        check_equal(source.params, jax.device_get(load_on_one_device(folder).params), str(output))
        check_equal(source.unused, read_unused(folder), str(output))
    return source


def export_run(run: Path, output: Path, format_name: str, *, step: int | None = None) -> tuple[Model, list[str]]:
    """Writes a run's model and its README.md into the folder `output`. Returns the model, and warnings for the user.

    Args:
      output: new or empty.
      format_name: a key of writers.FORMATS.
      step: a checkpoint's number of updates; None: the newest.

    Raises:
      FileNotFoundError: the run has no checkpoint, or none of that step.
      ValueError: `run` is no run, a damaged checkpoint, an `output` that is not empty, a model that the format cannot
        express, a written file that reads back differently, or torch is missing for format "pth".
    """
    if not is_run(run):
        raise ValueError(f"{run}: is no run and no imported folder; import it first (rice_jax.weights import).")
    with new_folder(output) as folder:
        model = load_on_one_device(run, step)
        FORMATS[format_name](model, read_unused(run), folder)
        warnings = differences_from_official(model.config) if format_name in ("official", "pth") else []
        (folder / "README.md").write_text(model_card(model, run, format_name, warnings), encoding="utf-8")
    return model, warnings

"""The order of the files is the order in which the data meets them: nothing imports what lies below it."""

import ast
import re
from pathlib import Path

import jax
import pytest

from configs import default, demo, folder, grocery, lpr750k, pod, rice, smoke
from rice_jax import model, sharding, step
from tests import official

ROOT = Path(__file__).parent.parent

ORDER = {
    "data_pipeline": "faults processes shell tfrecord folders schema records plan frames examples batches histogram "
    "pictures listing layouts sources survey shards workers columns report convert checkup doctor "
    "drawing synthetic",
    "rice_jax": "version config cluster line hosts sharding model pairs losses optimizer step programs costs "
    "topologies digests checkpoints guards metrics inference retrieval archives naming contents sources exports "
    "weights logs show order explain preflight train evaluate demo",
}
# Nobody imports a command.
COMMANDS = {"convert", "doctor", "synthetic", "show", "explain", "preflight", "train", "evaluate", "demo"}
PRESETS = [
    *(config.get_config() for config in (default, demo, folder, grocery, smoke)),
    *map(lpr750k.get_config, default.STAGES),
    *map(rice.get_config, default.STAGES),
    *map(pod.get_config, pod.SIZES),
]


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports from our packages."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if re.match(r"(rice_jax|data_pipeline|configs)\b", name)}


def files(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).glob("*.py")) if path.stem != "__init__"]


@pytest.mark.parametrize("package", ORDER)
def test_every_file_has_its_place_in_the_order(package: str) -> None:
    found = {path.stem for path in files(package)} | {
        p.name for p in (ROOT / package).iterdir() if (p / "__init__.py").exists()
    }
    assert found == set(ORDER[package].split())


@pytest.mark.parametrize("package", ORDER)
def test_no_file_imports_one_below_it(package: str) -> None:
    order = ORDER[package].split()
    for path in [*files(package), *sorted((ROOT / package).glob("*/*.py"))]:
        place = path.stem if path.parent.name == package else path.parent.name
        for name in imports(path):
            owner, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if (owner == "data_pipeline" and package == "data_pipeline") or owner == package:
                if target in order and target != place:
                    assert order.index(target) < order.index(place), f"{path.name} imports {name}, which lies below it"
            else:
                assert package == "rice_jax", f"{path.name}: data_pipeline imports {name}"
            assert target not in COMMANDS, f"{path.name} imports the command {name}"


def test_only_sharding_names_a_mesh_axis() -> None:
    for path in files("rice_jax"):
        if path.stem != "sharding":
            strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            assert "fsdp" not in strings, path.name


def test_only_batches_imports_grain() -> None:
    for path in files("data_pipeline"):
        if path.stem != "batches":
            assert "import grain" not in path.read_text(), path.name


def test_every_sharding_rule_is_used_by_some_preset_and_every_parameter_has_one() -> None:
    mesh, used = official.mesh_of(1, 1), set()
    for config in PRESETS:
        net = model.build(config)
        shapes = jax.eval_shape(lambda net=net, config=config: step.init_params(net, config, jax.random.key(0)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            name = sharding.path_name(path)
            sharding.parameter_spec(name, leaf.shape, mesh)  # raises without a rule
            used.add(next(pattern for pattern, _ in sharding.RULES if re.search(pattern, name)))
    assert used == {pattern for pattern, _ in sharding.RULES}

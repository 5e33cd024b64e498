"""The packages are rooms in a partial order: a file imports from its own room and from those below it."""

import ast
import re
from pathlib import Path

import jax
import pytest

from configs import default, demo, folder, grocery, lpr750k, one_gpu, pod, rice, smoke
from rice_jax.models.rice import build_model
from rice_jax.parallel.mesh import RULES, parameter_spec, path_name
from rice_jax.training import step
from tests import official

ROOT = Path(__file__).parent.parent

# Rooms, from the ground up: what each may import beside itself. A partial order; a new room gets its line here.
ROOMS = {
    "data_pipeline": {
        "faults": "",
        "owner": "",
        "format": "faults owner",
        "system": "faults owner format",
        "input": "faults format system",
        "layouts": "faults format input system",
        "synthetic_shop": "faults input",
        "conversion": "faults format input layouts system",
        "inspection": "faults format input layouts system conversion",
    },
    "rice_jax": {
        "version": "",
        "errors": "",
        "config": "errors version",
        "models": "config",
        "parallel": "config errors",
        "losses": "config models parallel",
        "training": "config errors models parallel losses",
        "checkpoints": "config errors version parallel training",
        "preflight": "config errors models parallel losses training",
        "retrieval": "config errors models parallel training checkpoints",
        "weights": "config errors version models parallel training checkpoints retrieval",
    },
}
# Nobody imports a command. `__init__` and the console command, __main__, import commands by name when they are used.
COMMANDS = {
    "data_pipeline": {"convert", "doctor", "synthetic"},
    "rice_jax": {"__main__", "train", "evaluate", "explain", "show", "demo"},
}
LARGEST_FILE = 450  # lines
LARGEST_ROOM = 12  # files, besides __init__
PRESETS = [
    *(config.get_config() for config in (default, demo, folder, grocery, smoke)),
    *map(lpr750k.get_config, default.STAGES),
    *map(rice.get_config, default.STAGES),
    *map(pod.get_config, pod.SIZES),
    *map(one_gpu.get_config, one_gpu.RECIPES),
]


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports from our packages, lazy imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if re.match(r"(rice_jax|data_pipeline|configs)\b", name)}


def files(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).rglob("*.py")) if path.stem != "__init__"]


def room_of(path: Path, package: str) -> str:
    return path.relative_to(ROOT / package).with_suffix("").parts[0]


def climbing(package: str, room: str, names: set[str]) -> list[str]:
    """The imports among `names` that a file of `room` may not make."""
    commands, rooms = COMMANDS[package], ROOMS[package]
    wrong = []
    for name in names:
        owner, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if owner == package:
            allowed = {room, *(rooms[room].split() if room in rooms else rooms)}
            if target in rooms.keys() | commands and target not in allowed:
                wrong.append(name)
        elif owner == "rice_jax" or target in COMMANDS.get(owner, ()):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("package", ROOMS)
def test_every_file_lies_in_a_room_of_the_table(package: str) -> None:
    found = {room_of(path, package) for path in files(package)}
    assert found == ROOMS[package].keys() | COMMANDS[package]


@pytest.mark.parametrize("package", ROOMS)
def test_the_table_has_no_circle(package: str) -> None:
    seen: set[str] = set()
    for room, below in ROOMS[package].items():
        assert set(below.split()) <= seen, room
        seen.add(room)


@pytest.mark.parametrize("package", ROOMS)
def test_no_file_imports_from_a_room_above_it(package: str) -> None:
    for path in files(package):
        assert not climbing(package, room_of(path, package), imports(path)), path


def test_an_import_that_climbs_is_noticed() -> None:
    assert climbing("rice_jax", "losses", {"rice_jax.training.step"}) == ["rice_jax.training.step"]
    assert climbing("rice_jax", "retrieval", {"rice_jax.train"}) == ["rice_jax.train"]
    assert climbing("data_pipeline", "input", {"rice_jax.errors.fail"}) == ["rice_jax.errors.fail"]
    assert not climbing("rice_jax", "training", {"rice_jax.losses.pairs", "data_pipeline.input.plan"})


@pytest.mark.parametrize("package", [*ROOMS, "configs"])
def test_no_file_and_no_room_outgrows_its_measure(package: str) -> None:
    for path in files(package):
        assert len(path.read_text().splitlines()) <= LARGEST_FILE, path
    for room in {path.parent for path in files(package)}:
        assert len([path for path in files(package) if path.parent == room]) <= LARGEST_ROOM, room


def test_only_mesh_names_a_mesh_axis() -> None:
    for path in files("rice_jax"):
        if path.stem != "mesh":
            strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            assert "fsdp" not in strings, path.name


def test_only_batches_imports_grain() -> None:
    for path in files("data_pipeline"):
        if path.stem != "batches":
            assert "import grain" not in path.read_text(), path.name


def test_every_sharding_rule_is_used_by_some_preset_and_every_parameter_has_one() -> None:
    mesh, used = official.mesh_of(1, 1), set()
    for config in PRESETS:
        net = build_model(config)
        shapes = jax.eval_shape(lambda net=net, config=config: step.init_params(net, config, jax.random.key(0)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            name = path_name(path)
            parameter_spec(name, leaf.shape, mesh)  # raises without a rule
            used.add(next(pattern for pattern, _ in RULES if re.search(pattern, name)))
    assert used == {pattern for pattern, _ in RULES}

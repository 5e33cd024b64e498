"""Config files of a user's own: what they may contain, and how they are refused; and the batch that fits the data."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_collections
import pytest

from configs import default, folder, smoke
from rice_jax import config as config_module
from rice_jax import train
from rice_jax.config import adopt, fit_to_data, load_config

START = "from configs import smoke\ndef get_config():\n    c = smoke.get_config()\n"


def own(tmp_path: Path, body: str, start: str = START) -> str:
    path = tmp_path / "own.py"
    path.write_text(start + "".join(f"    {line}\n" for line in body.splitlines()))
    return str(path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("c.unlock()\nc.notes = 'mine'\nreturn c", "notes is no field of a config; see"),
        ("c.unlock()\nc.batchsize = 3\nreturn c", r"batchsize is no field of a config \(the nearest is batch_size\)"),
        ("c.unlock()\nc.data.flips = True\nreturn c", r"data.flips is no field .* \(the nearest is data.flip\)"),
        ("c.unlock()\nc.extra = {'a': {'b': 1}}\nreturn c", "extra.a.b is no field"),
        ("c.unlock()\nc.extra = {}\nreturn c", "extra is no field"),
        ("c.unlock()\nc.loss.own = lambda x: x\nreturn c", "loss.own is no field"),
        ("d = c.to_dict()\nd['seed'] = '3'\nreturn d", "seed is '3', needs a whole number of at least 0"),
        ("d = c.to_dict()\nd['seed'] = True\nreturn d", "seed is True, needs a whole number"),
        ("d = c.to_dict()\nd['data']['flip'] = 1\nreturn d", "data.flip is 1, needs true or false"),
        ("d = c.to_dict()\nd['data']['skip_clips'] = 'a'\nreturn d", "data.skip_clips is 'a', needs values separated"),
        ("c.data.path = None\nreturn c", "data.path is None, needs a text"),
        ("d = c.to_dict()\ndel d['seed']\nreturn d", "seed is missing"),
        ("pass", "found NoneType, needs a config"),
        ("c.seed = 'x'\nreturn c", "line 4: TypeError"),
        ("c.notes = 1\nreturn c", 'line 4: AttributeError: .*"notes" does not exist and cannot be added'),
        ("return open('/nowhere')", "line 4: FileNotFoundError"),
        ("return (", "line 4: SyntaxError"),
    ],
)
def test_a_config_that_could_not_be_opened_again_is_refused_at_once(tmp_path: Path, body: str, message: str) -> None:
    path = own(tmp_path, body)
    with pytest.raises(ValueError, match=message) as refused:
        load_config(path)
    assert str(refused.value).startswith(f"--config {path}") and "\n" not in str(refused.value)


def test_the_command_refuses_it_in_one_line(tmp_path: Path) -> None:
    path = own(tmp_path, "c.unlock()\nc.notes = 'mine'\nreturn c")
    words = ["-m", "rice_jax.train", "--config", path, "--workdir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "notes is no field" in done.stderr
    assert not (tmp_path / "run").exists()


def test_python_refuses_it_before_the_first_update(converted: Path, tmp_path: Path) -> None:
    config = smoke.get_config()
    config.data.path = str(converted)
    with config.unlocked():
        config.notes = "mine"
    with pytest.raises(ValueError, match="notes is no field of a config"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_file_of_any_editor_is_read(tmp_path: Path, coding: str, newline: str) -> None:
    path = Path(own(tmp_path, "c.seed = 7  # größer\nreturn c"))
    path.write_bytes(path.read_text().replace("\n", newline).encode(coding))
    assert load_config(str(path)).seed == 7
    saved = config_module.to_json(smoke.get_config()).replace("\n", newline).encode(coding)
    assert config_module.from_json(saved.decode()) == smoke.get_config()


def test_whatever_is_adopted_is_opened_again() -> None:
    """Frozen, unlocked and plain configs, numbers of NumPy, whole numbers for fractions."""
    numpy = pytest.importorskip("numpy")
    for config in (
        smoke.get_config(),
        smoke.get_config().unlock(),
        ml_collections.FrozenConfigDict(smoke.get_config()),
    ):
        adopted = adopt(config)
        assert adopted == smoke.get_config() and adopted.is_locked and adopted is not config
    plain: dict[str, Any] = smoke.get_config().to_dict()
    plain["stall_seconds"], plain["optimizer"]["eps"] = 3, numpy.float64(0.5)
    adopted = adopt(plain)
    assert config_module.from_json(config_module.to_json(adopted)) == adopted


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ('{"batch_size": "64"}', "batch_size is '64', needs a whole number of at least 0; restore config.json"),
        ('{"data": {"flip": 3}}', "data.flip is 3, needs true or false; restore config.json"),
        ("[]", r"found a list, needs an object\); restore config.json"),
        ('{"notes": 1}', "fields of another version: notes. This is rice_jax .*/meta/metadata, or correct config.json"),
    ],
)
def test_a_saved_config_that_was_edited_is_an_error_that_names_the_field(changed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_module.from_json(changed)


@pytest.mark.parametrize(("old", "now"), [(True, "true"), (False, "false"), ("auto", "auto")])
def test_a_saved_stall_ends_of_an_earlier_version_is_understood(old: Any, now: str) -> None:
    saved = json.loads(config_module.to_json(smoke.get_config())) | {"stall_ends": old}
    assert config_module.from_json(json.dumps(saved)).stall_ends == now
    assert default.get_config().stall_ends == "auto"


# --- the batch that fits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clips", "devices", "size"),
    [
        *((387, devices, 48) for devices in (1, 2, 3, 4, 6, 8, 16)), (387, 9, 54), (387, 128, 128),
        *((5, devices, 4) for devices in (1, 2, 4)), (5, 5, 5), (1, 1, 1), (24, 1, 24), (24, 8, 24), (30, 8, 24),
        (64, 1, 64), (65, 1, 32), (200, 1, 48), (70, 40, 40),
    ],
)  # fmt: skip
def test_the_batch_fits_to_the_set_and_not_to_the_devices(clips: int, devices: int, size: int) -> None:
    config = fit_to_data(folder.get_config(), clips=clips, splits=("train", "test"), devices=devices)
    assert (config.batch_size, config.data.eval_split) == (size, "")


def test_fewer_clips_than_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="found 5 training clips, needs at least one for each of 8 devices; conv"):
        fit_to_data(folder.get_config(), clips=5, splits=(), devices=8)


def test_a_run_keeps_the_size_that_it_began_with() -> None:
    fit = {"clips": 387, "splits": ()}
    assert fit_to_data(folder.get_config(), devices=5, saved=55, **fit).batch_size == 55
    with pytest.raises(ValueError, match=r"began with batch_size 55, which 8 devices .* on 1, 5, 11, 55 devices"):
        fit_to_data(folder.get_config(), devices=8, saved=55, **fit)

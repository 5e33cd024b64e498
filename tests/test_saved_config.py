"""config.json as an editor, another program or a broken copy leaves it: one line says what is wrong with it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import rice_jax
from configs import smoke
from configs.default import FIELDS
from rice_jax import train
from rice_jax.checkpoints.reading import DamagedError
from rice_jax.checkpoints.step_folder import read_meta
from rice_jax.config import flatten, from_json, to_json

DEEP, HUGE = 100_000, 10**400


def saved(**changes: Any) -> str:
    nested = json.loads(to_json(smoke.get_config()))
    for dotted, value in changes.items():
        section, _, name = dotted.rpartition(".")
        (nested[section] if section else nested)[name] = value
    return json.dumps(nested)


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '"a"', "", "{", "[" * DEEP, '{"a": ' * DEEP, '{"a":' * 2000 + "1" + "}" * 2000]
)
def test_what_is_no_json_object_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"^the run's config .*; (restore config\.json|use that version)"):
        from_json(text)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    "value",
    ["64", 64.5, None, True, -3, ["x"], [[1]], {}, {"a": 1}, float("nan"), HUGE],
    ids=lambda value: repr(value)[:9],
)
def test_each_field_takes_what_the_table_allows_and_names_what_it_does_not(name: str, value: Any) -> None:
    as_tuple = tuple(value) if isinstance(value, list) else value
    field, text = FIELDS[name], saved(**{name: value})
    if name == "stall_ends" and value is True:  # of an earlier version
        as_tuple = "true"
    if field.has_type(as_tuple) and field.allows(as_tuple):
        assert flatten(from_json(text))[name] == as_tuple
    else:
        with pytest.raises(ValueError, match=re.escape(name)):
            from_json(text)


def test_a_choice_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"data\.resize_mode is 'strech', needs one of stretch, keep_ratio"):
        from_json(saved(**{"data.resize_mode": "strech"}))


def test_a_section_that_is_none_is_named() -> None:
    for section in (None, [], 3, "x"):
        with pytest.raises(ValueError, match=r"data is .*, needs an object with fields such as data\.path"):
            from_json(saved(data=section))
    assert from_json(saved(data={})).data == from_json("{}").data


def test_deep_json_in_meta_is_damage(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "metadata").write_text("[" * DEEP)
    with pytest.raises(DamagedError, match="metadata is damaged"):
        read_meta(tmp_path)


def test_a_config_that_is_no_utf_8_is_named_and_the_checkpoints_have_a_copy(converted: Path, tmp_path: Path) -> None:
    config = smoke.get_config()
    config.data.path, config.data.eval_split, config.num_updates = str(converted), "", 3
    train.train_and_evaluate(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_bytes(to_json(config).encode("utf-16"))
    with pytest.raises(ValueError, match=rf"{path}: byte 0 is not UTF-8; .*remove it: the checkpoints have a copy"):
        rice_jax.load(tmp_path / "copy")
    path.unlink()
    assert rice_jax.load(tmp_path / "copy").step == 3

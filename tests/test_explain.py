"""Explaining an update: the ledger against the plan, the picture, and refused input."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import smoke
from data_pipeline.format.reader import open_dataset
from data_pipeline.input.plan import Plan
from rice_jax import explain
from rice_jax.checkpoints.run_folder import write_config
from rice_jax.config import to_json
from rice_jax.training import ledger as order
from rice_jax.training import logs


def make_run(folder: Path, data: Path, *, updates: int = 4, **fields: Any) -> Plan:
    """Writes a run's config and the ledger of its first `updates` updates, without training, and returns its plan."""
    config = smoke.get_config()
    config.data.path, config.batch_size = str(data), 5
    config.data.update(fields)
    write_config(folder, to_json(config))
    plan = order.make_plan(config, open_dataset(data))
    with logs.Log(folder, step=0) as log:
        for update in range(1, updates + 1):
            rows = jnp.asarray(plan.batch(update - 1), jnp.int32)
            log.write(update, {"ledger": order.batch_digest(rows, jnp)})
        log.write(2, {"val/queries": 3})  # a line that is none of an update
    return plan


def test_the_digest_is_the_same_in_numpy_and_in_the_step() -> None:
    rows = np.random.default_rng(0).permutation(4_000_000)[:300]
    digest = order.batch_digest(rows)
    np.testing.assert_array_equal(jax.jit(lambda x: order.batch_digest(x, jnp))(jnp.asarray(rows, jnp.int32)), digest)
    assert order.as_hex(order.batch_digest(np.array([0, 2]))) == "0000000a00000a4f"
    swapped = rows.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert (order.batch_digest(swapped) != digest).any()


def test_an_epoch_is_proved_to_show_no_clip_twice(converted: Path, tmp_path: Path) -> None:
    """24 clips in batches of 5: four batches an epoch, 20 clips once, 4 left out."""
    plan = make_run(tmp_path, converted)
    ledger = order.read_ledger(tmp_path)
    epoch = order.check_epoch(plan, ledger, 0, last_update=6)
    assert (epoch.shown, epoch.twice, epoch.wrong, epoch.checked) == (20, [], [], [1, 2, 3, 4])
    shown = np.concatenate([plan.batch(i) for i in range(4)])
    assert sorted(shown.tolist() + epoch.left_out) == list(range(24)) and len(epoch.left_out) == 4
    to_come = order.check_epoch(plan, ledger, 1, last_update=6)
    assert (to_come.shown, to_come.checked, to_come.updates) == (0, [], range(5, 7))


def test_an_update_that_saw_other_clips_is_found(converted: Path, tmp_path: Path) -> None:
    plan = make_run(tmp_path, converted)
    ledger = order.read_ledger(tmp_path) | {3: order.as_hex(order.batch_digest(plan.batch(7)))}
    assert order.check_epoch(plan, ledger, 0, last_update=6).wrong == [3]


def run(*words: str) -> None:
    explain.explain(explain.parse(list(words)))


def test_the_command_names_draws_and_proves(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_run(tmp_path, converted)
    run("--workdir", str(tmp_path), "--step", "2", "--examples", "3")
    text, split = capsys.readouterr().out, open_dataset(converted).split("train")
    assert "batch 2 of 4 of epoch 0" in text and "(the plan's)" in text and "20 clips shown, none twice" in text
    assert all(split.clip_ids[row] in text for row in plan.batch(1).tolist())
    assert "leaves out 4 of 24 clips" in text
    with Image.open(tmp_path / "update-2.png") as sheet:  # three lines, a shop image and three slots each
        assert sheet.width > 4 * 78 + 18 and sheet.height == 3 * 94 + 6
        right = np.asarray(sheet.convert("L"))[6:22, 4 * 78 + 18 :]
        assert right.min() < 128 and (right[:, -4:] == 255).all()  # the ids are wider than the pictures, and whole
        assert len(set(np.asarray(sheet).reshape(-1, 3)[:, 0].tolist())) > 50

    run("--workdir", str(tmp_path), "--step", "2", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["epoch"]["updates"] == [1, 4] and len(found["pairs"]) == 5 and found["epoch"]["wrong"] == []
    assert found["epoch"]["left_out"] == [split.clip_ids[row] for row in sorted(plan.left_out(0).tolist())]


@pytest.mark.parametrize("field", ["spread_products", "skip_clips"])
def test_the_plan_follows_the_config(
    field: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = open_dataset(converted).split("train").clip_ids[3]
    make_run(tmp_path, converted, **{field: True if field == "spread_products" else (skipped,)})
    run("--workdir", str(tmp_path), "--step", "1")
    text = capsys.readouterr().out
    assert "4 with the plan's ledger; 20 clips shown, none twice" in text
    assert ("leaves out 3 of 23 clips" in text and skipped not in text) == (field == "skip_clips")


def test_another_data_set_and_a_moved_one_without_data_are_refused(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger has only rows: with another set of the same length it would agree with the plan all the same."""
    moved = shutil.copytree(converted, tmp_path / "data")
    make_run(tmp_path, moved)
    monkeypatch.setattr(explain.Checkpoints, "latest", lambda self: 3)
    monkeypatch.setattr(explain.Checkpoints, "meta", lambda self, step: {"data": "0" * 64})
    with pytest.raises(ValueError, match=r"needs 000000000000, on which the run was trained"):
        run("--workdir", str(tmp_path), "--step", "1")
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="give its folder with --data"):
        run("--workdir", str(tmp_path), "--step", "1")
    content = open_dataset(converted).content_hash
    monkeypatch.setattr(explain.Checkpoints, "meta", lambda self, step: {"data": content})
    run("--workdir", str(tmp_path), "--step", "1", "--data", str(tmp_path / "elsewhere"))
    assert (tmp_path / "update-1.png").exists()


@pytest.mark.parametrize(
    "words", [("--step", "0"), ("--step", "1", "--examples", "0"), ("--step", "1", "--output", "a.x")]
)
def test_wrong_use_is_exit_status_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run("--workdir", "run", *words)
    assert end.value.code == 2 and "needs" in capsys.readouterr().err


def test_no_run_a_wrong_step_and_a_wrong_ledger_are_refused(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        run("--workdir", str(tmp_path), "--step", "1")
    make_run(tmp_path, converted)
    with pytest.raises(ValueError, match="updates 1 to 6"):
        run("--workdir", str(tmp_path), "--step", "7")
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], json.dumps({"step": 3, "ledger": "0" * 16}) + "\n"]) + '{"step": 4, "le')
    with pytest.raises(ValueError, match=r"update 3 saw other clips.*; give the --data that .*, or restore the"):
        run("--workdir", str(tmp_path), "--step", "1")
    assert "2 with the plan's ledger" in capsys.readouterr().out
    path.write_text("no json\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1"):
        order.read_ledger(tmp_path)

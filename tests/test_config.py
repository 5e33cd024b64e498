"""Reading, overriding and comparing configs."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from configs import default, lpr750k, smoke
from rice_jax import config as config_module

ROOT = Path(__file__).parent.parent


def parse(*words: str) -> argparse.Namespace:
    return config_module.parse_arguments(argparse.ArgumentParser(), list(words))


@pytest.mark.parametrize("name", ["smoke", "smoke.py", "configs/smoke.py"])
def test_a_shipped_config_is_found_by_name_from_any_folder(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("--config", name).config == smoke.get_config()


def test_a_file_of_the_users_own_comes_first(tmp_path, monkeypatch) -> None:
    (tmp_path / "smoke.py").write_text(
        "from configs import default\n"
        "def get_config(arg=''):\n c = default.get_config()\n c.seed = 7 if arg == 'seven' else 1\n return c\n"
    )
    monkeypatch.chdir(tmp_path)
    assert parse("--config", "smoke.py:seven").config.seed == 7


def test_overrides_take_the_type_of_their_field() -> None:
    words = (
        "--config.seed=3",
        "--config.data.flip=false",
        "--config.optimizer.learning_rate=2",
        "--config.data.skip_clips=a,b",
        "--config.model.stem_channels=8,16",
    )
    config = parse("--config", "default", *words).config
    assert (config.seed, config.data.flip, config.optimizer.learning_rate) == (3, False, 2.0)
    assert config.data.skip_clips == ("a", "b") and config.model.stem_channels == (8, 16)
    assert isinstance(config.optimizer.learning_rate, float)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "--config.optimzer.b1=1",
            "--config.optimzer.b1: the config has no such field; the nearest is --config.optimizer.b1.",
        ),
        ("--config.lr=1", "no such field; the nearest is --config.optimizer.learning_rate."),
        ("--config.batchsize=1", "the nearest is --config.batch_size."),
        ("--config.xyz=1", "no such field; fields are batch_size, "),
        ("--config.data=1", "--config.data: is a section; its fields are data.apply_exif, "),
        ("--config.seed=x", "--config.seed=x: needs a whole number of at least 0."),
        ("--config.data.flip=maybe", "--config.data.flip=maybe: needs true or false."),
        (
            "--config.model.stem_channels=8,x",
            "needs values separated by commas, each a whole number of at least 1.",
        ),
        ("--seed=1", "--seed=1: there is no such option"),
        ("--config.seed", "--config.seed: not understood"),
    ],
)
def test_a_wrong_override_says_what_is_meant(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse("--config", "default", word)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_stages_of_the_official_recipe() -> None:
    weights = {
        stage: (c.loss.icl, c.loss.pmd, c.loss.pfr) for stage in default.STAGES if (c := lpr750k.get_config(stage))
    }
    assert weights == {"icl": (1, 0, 0), "icl_pmd": (1, 1, 0), "icl_pmd_pfr": (1, 1, 1)}
    assert lpr750k.get_config("icl").optimizer.logit_scale_lr_multiplier == 100  # docs/official.md 3.4
    with pytest.raises(ValueError, match="stages are icl, icl_pmd, icl_pmd_pfr"):
        lpr750k.get_config("pfr")


def test_every_fault_of_a_config_is_named_at_once() -> None:
    config = default.get_config()
    config.data.resize_mode, config.eval_batch_size = "squash", 0
    with pytest.raises(
        ValueError,
        match=r"squash.*one of stretch, keep_ratio; .*eval_batch_size is 0, needs a whole number of at least 1",
    ):
        config_module.validate(config)
    config = default.get_config()
    config.model.heads = 7
    with pytest.raises(ValueError, match=r"model.width 768 does not divide by model.heads 7; data.path is not set"):
        config_module.validate(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss.cross_dropout", 1.5), ("optimizer.learning_rate", float("nan")), ("optimizer.ema_decay", 2.0),
        ("optimizer.b1", 1.0), ("loss.icl", -1.0), ("loss.micro_batch", -1), ("eval_every", -1), ("seed", -1),
        ("model.layers", 0), ("data.cache_bytes", -5), ("data.num_frames", 0), ("loss.unit_slots", 0),
        ("optimizer.warmup_updates", 5000), ("model.stem_channels", (8, 16)), ("model.pool", "max"),
        ("model.stem_channels", (8, 8, 8, 8, 0)), ("model.stem_blocks", (-1,)), ("model.stem_blocks", (1,)),
        ("optimizer.eps", float("inf")), ("model.logit_scale_init", float("nan")), ("data.erase", 1.5),
        ("data.min_scale", 0.0), ("data.max_aspect", 0.5), ("mesh.fsdp", 0),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_meant_is_refused(field: str, value: object) -> None:
    config = default.get_config()
    config.data.path = "somewhere"
    config_module.validate(config)
    config_module.set_field(config, field, value)
    with pytest.raises(ValueError, match=field):
        config_module.validate(config)


@pytest.mark.parametrize("name", ["grocery:icl_pdm", "lpr750k:pfr", "grocery:"])
def test_a_mistyped_stage_is_refused(name: str) -> None:
    with pytest.raises(SystemExit):
        parse("--config", name)


def test_a_config_without_argument_refuses_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--config", "smoke:x")
    assert "takes no argument" in capsys.readouterr().err


def test_a_config_survives_its_text() -> None:
    config = smoke.get_config()
    again = config_module.from_json(config_module.to_json(config))
    assert again == config and not config_module.differences(again, config)
    config.data.path = "elsewhere"
    assert config_module.differences(again, config) == ["data.path: '' -> 'elsewhere'"]
    assert not config_module.differences(again, config, free=("data.path", "seed"))


def test_every_field_says_what_it_is_and_allows_its_default() -> None:
    assert config_module.flatten(default.get_config()) == {
        name: field.default for name, field in default.FIELDS.items()
    }
    for name, field in default.FIELDS.items():
        assert field.meaning and field.allows(field.default), name
        items = field.default if isinstance(field.default, tuple) else (field.default,)
        assert all(type(item) is field.item for item in items), name


def test_the_documentation_is_the_table() -> None:
    printed = subprocess.run([sys.executable, "-m", "configs.default"], cwd=ROOT, capture_output=True, check=True)
    again = "docs/config.md is not the table; run: python -m configs.default > docs/config.md"
    assert (ROOT / "docs" / "config.md").read_bytes() == printed.stdout, again


def test_what_may_change_after_a_run_began() -> None:
    free, evaluated = set(config_module.FREE), set(config_module.EVALUATED)
    assert evaluated - free == {"data.apply_exif", "data.to_srgb"}
    assert set(config_module.PER_HOST) == {"data.path", "data.threads", "data.workers", "data.cache_bytes"} <= free
    assert {"mesh.fsdp", "eval_every", "checkpoints_kept", "data.eval_split", "stall_seconds"} <= free
    assert not free & {"seed", "batch_size", "num_updates", "init_from", "data.skip_clips", "loss.micro_batch"}
    assert not any(name.startswith(("model.", "loss.", "optimizer.")) for name in evaluated)


def test_gradient_accumulation_is_refused_with_what_to_use() -> None:
    with pytest.raises(ValueError, match=r"another loss; .* set loss.micro_batch"):
        config_module.override(default.get_config(), "optimizer.accumulation_steps", "4")

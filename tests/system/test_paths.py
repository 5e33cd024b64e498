"""Paths as users give them to commands, fields and Python."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rice_jax
from configs import smoke
from data_pipeline.system import paths
from rice_jax import config as config_module
from rice_jax import train

ROOT = Path(__file__).parents[2]
ADDRESSES = [
    "gs://bucket/run", "s3://bucket/run", "hf://owner/set", "file:///tmp/run", "hdfs://host:8020/run", "GS://bucket",
    "gs:/bucket/run", "https://host/run", "dbfs:/mnt/run", "filecache::s3://bucket/run", "abfss://box@host/run",
    "s3:bucket/key", "S3:bucket", "gs:bucket", "hdfs:x", "file:runs", "me@host:/data", "my_host:/data",
]  # fmt: skip
COMMANDS = {  # one option of each path that a command takes; others are there so that parsing gets so far
    "rice_jax.train": ["--config smoke --workdir", "--config smoke --workdir w --secret-file", "--workdir w --config"],
    "rice_jax.evaluate": ["--workdir", "--data", "--output", "--subset"],
    "rice_jax.explain": ["--step 1 --workdir", "--step 1 --data", "--step 1 --output"],
    "rice_jax.show": ["--evaluation", "--data", "--output"],
    "rice_jax.preflight": ["--topology cpu:1 --config smoke --json"],
    "rice_jax.demo": ["--output"],
    "rice_jax.weights": ["import", "import x --output", "export", "export x --format pth --output", "show"],
    "data_pipeline.convert": ["--layout lpr750k --source", "--layout lpr750k --source x --output"],
    "data_pipeline.doctor": ["", "x --output"],
    "data_pipeline.synthetic": ["--output"],
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_no_path(address: str) -> None:
    with pytest.raises(ValueError, match=r"found an address .*, needs a path of this machine; mount or copy"):
        paths.local_path(address)


@pytest.mark.parametrize(
    "path", ["runs/a", "/data/shop: 2026", "C:/runs", "./gs:/x", "./s3:x", "a:b", "s3", "a~", "x/~/y", "Läden [1]", "."]
)
def test_other_paths_stay_as_they_are(path: str) -> None:
    assert paths.expand(path) == path


@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_an_empty_path_is_not_the_current_folder(empty: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"a path is empty, as that of a shell variable .*; give the path"):
        paths.local_path(empty)
    with pytest.raises(SystemExit) as ended:
        train.parse(["--config", "smoke", f"--workdir={empty}"])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: a path is empty")


def test_a_tilde_is_the_home_folder_and_an_unknown_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.local_path("~/set") == Path("/home/me/set") and paths.local_path("~") == Path("/home/me")
    with pytest.raises(ValueError, match="no such user"):
        paths.local_path("~nobody-of-this-name/set")


def parser_of(module: str):
    """Returns the function that parses a command's words."""
    name = "rice_jax.preflight.__main__" if module == "rice_jax.preflight" else module
    name = "rice_jax.weights.__main__" if module == "rice_jax.weights" else name
    loaded = __import__(name, fromlist=["parse"])
    if parse := getattr(loaded, "parse", None):
        return lambda words: parse(words, "command")
    return lambda words: loaded.parse_options(words, "command")


@pytest.mark.parametrize(("module", "words"), [(m, w) for m, options in COMMANDS.items() for w in options])
def test_every_command_refuses_an_address_in_one_line_before_it_makes_anything(
    module: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    split = words.split()
    joined = (
        [*split[:-1], f"{split[-1]}=gs://bucket/x"] if split and split[-1].startswith("-") else [*split, "gs://b/x"]
    )
    with pytest.raises(SystemExit) as ended:
        parser_of(module)(joined)
    text = capsys.readouterr()
    assert ended.value.code == 2 and text.err.startswith("error: ") and text.err.count("\n") == 1 and not text.out
    assert "found an address" in text.err and not list(tmp_path.iterdir())


def test_no_option_takes_a_path_unchecked() -> None:
    for package in ("data_pipeline", "rice_jax", "benchmarks"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.keyword) and node.arg == "type":
                    assert ast.unparse(node.value) != "Path", f"{file} line {node.value.lineno}"


@pytest.mark.parametrize("field", config_module.PATHS)
def test_fields_that_hold_a_path_are_read_alike(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    words = ["--config", "smoke", "--workdir", str(tmp_path)]
    parsed = train.parse([*words, f"--config.{field}=~/set"]).config
    assert config_module.flatten(parsed)[field] == "/home/me/set"
    own = tmp_path / "own.py"
    own.write_text(
        f"from configs import smoke\ndef get_config():\n c = smoke.get_config()\n c.{field} = '~/set'\n return c"
    )
    assert config_module.flatten(config_module.load_config(str(own)))[field] == "/home/me/set"
    with pytest.raises(SystemExit):
        train.parse([*words, f"--config.{field}=s3://bucket/x"])
    assert "found an address (s3:)" in capsys.readouterr().err
    config = smoke.get_config()
    config_module.set_field(config, field, "gs://bucket/x")
    with pytest.raises(ValueError, match="found an address"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_python_refuses_an_address_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="found an address"):
        rice_jax.load("gs://bucket/run")
    with pytest.raises(ValueError, match="found an address"):
        train.train_and_evaluate(smoke.get_config(), "s3://bucket/run")
    assert not list(tmp_path.iterdir())


def test_a_command_makes_no_folder_called_tilde(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "data_pipeline.synthetic", "--output=~/shop", "--products=4", "--workers=1"],
        cwd=tmp_path, env={"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "PATH": ""}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert not (tmp_path / "~").exists(), done.stderr
    assert done.returncode != 0 or (tmp_path / "home" / "shop").is_dir()

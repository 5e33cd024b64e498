"""The console command: its help, its subcommands, and words that are none."""

import ast
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from rice_jax.__main__ import COMMANDS, GROUPS, main

ROOT = Path(__file__).parents[1]


def test_help_shows_every_subcommand_once_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^([a-z ]+):$", printed, re.MULTILINE) == ["data", "training", "use", "first try"]
    assert re.findall(r"^  (\w+) +\S", printed, re.MULTILINE) == list(COMMANDS)
    assert {name: list(group) for name, group in GROUPS.items()} == {
        "data": ["convert", "doctor", "synthetic"],
        "training": ["preflight", "train", "explain"],
        "use": ["evaluate", "show", "weights"],
        "first try": ["demo"],
    }
    assert all(len(line) <= 100 for line in printed.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_subcommands_help_says_what_was_typed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f"usage: rice-jax {name} ")
    module, _, function = COMMANDS[name].partition(":")
    with pytest.raises(SystemExit) as end:
        getattr(importlib.import_module(module), function)(["--help"])
    typed = f"python -m {module.removesuffix('.__main__')}"
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {typed} ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "error: rice-jax trian: no such command; the nearest is train.\n"),
        (["x"], f"error: rice-jax x: no such command; needs one of {', '.join(COMMANDS)}.\n"),
    ],
)
def test_an_unknown_subcommand_is_one_line_with_the_nearest(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr() == ("", message)


def test_without_a_subcommand_help_goes_to_stderr_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith("usage: rice-jax COMMAND ...")


def test_arguments_and_exit_status_are_passed_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop = tmp_path / "shop"
    assert main(["synthetic", f"--output={shop}", "--products=12", "--clips=40", "--workers=1"]) == 0
    assert main(["convert", "--layout=lpr750k", f"--source={shop}", f"--output={tmp_path / 'records'}"]) == 0
    assert (tmp_path / "records" / "manifest.json").exists()
    assert main(["doctor", str(tmp_path / "nowhere"), f"--output={tmp_path / 'report'}"]) == 2
    with pytest.raises(SystemExit) as end:
        main(["show", f"--evaluation={tmp_path}", f"--data={shop}", f"--output={tmp_path / 'a.png'}"])
    assert end.value.code == 1 and "rankings.jsonl: no such file" in capsys.readouterr().err


def test_python_m_rice_jax_is_the_same_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["rice_jax", "--help"])
    monkeypatch.delitem(sys.modules, "rice_jax.__main__")  # as in a fresh process
    with pytest.raises(SystemExit) as end:
        runpy.run_module("rice_jax", run_name="__main__")
    assert not end.value.code and capsys.readouterr().out.startswith("usage: python -m rice_jax COMMAND")


def test_only_the_chosen_subcommand_is_imported() -> None:
    code = "import sys; from rice_jax.__main__ import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    imported = set(done.stdout.split())
    assert not imported & {entry.partition(":")[0] for entry in COMMANDS.values()} and "jax" not in imported


def test_the_package_installs_the_command() -> None:
    keywords = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword)]
    (value,) = (keyword.value for keyword in keywords if keyword.arg == "entry_points")
    (script,) = ast.literal_eval(value)["console_scripts"]
    name, module, function = re.split(r" = |:", script)
    assert name == "rice-jax" and getattr(importlib.import_module(module), function) is main

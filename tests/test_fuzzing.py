"""The fuzzing itself: each hypothesis target runs for a moment, and a finding is reported."""

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests import fuzzing


@pytest.mark.parametrize("name", fuzzing.hypothesis_targets(Path()))
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of metadata that is broken on purpose
def test_nothing_is_found_in_a_moment(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "EXAMPLES", 60)
    result = fuzzing.run_hypothesis(name, *fuzzing.hypothesis_targets(tmp_path)[name], seconds=0.01, first_seed=0)
    assert result.finding == ""
    assert result.executions >= 30


@pytest.mark.parametrize("name", fuzzing.atheris_seeds())
def test_the_seeds_of_the_other_engine_pass_whole_cut_and_changed(name: str, tmp_path: Path) -> None:
    check = fuzzing.atheris_targets(tmp_path)[name]
    for data in fuzzing.atheris_seeds()[name]:
        for end in range(0, len(data) + 1, max(1, len(data) // 60)):
            check(data[:end])
            check(data[:end] + b"\xff" + data[end + 1 :])


def test_a_finding_is_reported_and_ends_in_exit_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses_large(number: int) -> None:
        assert number < 1000, "too large"

    monkeypatch.setattr(fuzzing, "hypothesis_targets", lambda folder: {"x": (st.tuples(st.integers()), refuses_large)})
    monkeypatch.setattr(fuzzing.importlib.util, "find_spec", lambda name: None)
    assert fuzzing.main(["--minutes=0.001", f"--output={tmp_path}"]) == 1
    (result,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert "too large" in result["finding"]
    assert "1000" in result["finding"]

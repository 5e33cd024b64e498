"""Running the doctor's command in tests."""

import json
from pathlib import Path
from typing import Any

from data_pipeline import doctor


def inspect(path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit status and report.json of the command."""
    output = path.parent / "checked"
    status = doctor.main([str(path), f"--output={output}", "--workers=1", *more])
    return status, json.loads((output / "report.json").read_text())


def kinds(report: dict[str, Any]) -> dict[str, int]:
    return {kind: each["count"] for kind, each in report["counts"].items()}


def of_kind(report: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [fault for fault in report["faults"] if fault["kind"] == kind]

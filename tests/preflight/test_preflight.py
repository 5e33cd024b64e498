"""Preflight reports on configs for CPU devices and TPU slices, advises, searches, and refuses wrong use."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import official_formulation
from configs import default, pod, smoke
from data_pipeline.format.reader import open_dataset
from data_pipeline.input.batches import train_batches
from data_pipeline.input.plan import Plan
from rice_jax.parallel.mesh import to_global
from rice_jax.preflight import __main__ as command_module
from rice_jax.preflight import advice, assessment, topologies
from rice_jax.preflight.__main__ import main, parse
from rice_jax.preflight.advice import first_remedy, largest_batch, remedies, with_changes
from rice_jax.preflight.assessment import (
    abstract_batch,
    assess,
    assess_in_subprocess,
    parse_needed_bytes,
    without_data_set,
)
from rice_jax.preflight.report import Report
from rice_jax.preflight.topologies import GIB
from rice_jax.retrieval.model import frame_options
from tests import official

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'rice_jax[preflight]'"
)
KEYS = {
    "fits", "device_bytes", "argument_bytes", "temp_bytes", "flops_per_device", "collectives", "floor_seconds",
}  # fmt: skip
TINY = ["--config", "smoke", "--config.model.layers=1", "--config.loss.pmd=0", "--config.loss.pfr=0"]


def command(*words: object, module: str = "rice_jax.preflight") -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Returns the one line that the command prints to stderr before it ends with status 2."""
    with pytest.raises(SystemExit) as end:
        main(parse(words if "--config" in words else [*TINY, *words]))
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


NOTHING = Report(
    topology="cpu:8", mesh={"data": 8}, batch_size=0, fits=False, device_bytes=None, available_bytes=16 * GIB,
    argument_bytes=0, batch_bytes=0, temp_bytes=None, other_bytes=None, peak_bytes=None, flops_per_example=0.0,
    flops_per_device=0.0, repeated_share=0.0, collectives=None, sent_bytes=None, floor_seconds=None,
    compute_seconds=None, link_seconds=None, hosts=1, frames_per_second=None, cores=None, compile_seconds=0.0,
)  # fmt: skip


def answer(config: Any, *, fits: bool) -> Report:
    """Returns a report with this batch and verdict, and otherwise NOTHING."""
    return dataclasses.replace(NOTHING, batch_size=config.batch_size, fits=fits)


# --- the command, on CPU devices --------------------------------------------------------------------------------------


def test_the_command_reports_a_step_on_more_devices_than_there_are(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    with command(*TINY, "--topology", "cpu:16", "--config.batch_size=32", "--json", out) as run:
        text, errors = run.communicate()
    assert run.returncode == 0 and errors == ""
    report = json.loads(out.read_text())
    assert report.keys() >= KEYS and report["fits"] is True
    assert report["mesh"] == {"data": 16, "fsdp": 1} and report["floor_seconds"] is None
    assert report["collectives"].keys() >= {"all-reduce", "all-gather"}
    assert "memory of a device: fits" in text and "all-gather" in text


def test_the_memory_of_a_device_has_its_share_of_state_and_batch() -> None:
    config = with_changes(smoke.get_config(), {"model.layers": 1, "loss.pmd": 0.0, "loss.pfr": 0.0})
    whole, split = (assess(with_changes(config, {"mesh.fsdp": fsdp}), topologies.parse("cpu:8")) for fsdp in (1, 4))
    frames = config.data.num_frames
    batch = (
        frames * 32 * 32 * 3 + frames * 4 + 32 * 32 * 3 + 4 + 4
    )  # one of 8 rows: frames, mask, image, product, index
    assert whole.batch_bytes == split.batch_bytes == batch
    assert split.argument_bytes < 0.5 * whole.argument_bytes
    assert whole.collectives is not None and split.collectives is not None
    assert split.collectives["all-gather"] > whole.collectives["all-gather"]
    assert whole.device_bytes is not None and whole.temp_bytes is not None and whole.other_bytes is not None
    assert whole.device_bytes == whole.argument_bytes + whole.temp_bytes + whole.other_bytes + batch


def test_the_batch_that_it_compiles_for_has_the_shapes_of_a_training_batch(converted: Path) -> None:
    config, mesh = smoke.get_config(), official.mesh_of(1, 1)
    split = open_dataset(converted).split("train")
    plan, options = Plan(split.num_clips, 8, 0), frame_options(config.data, train=True)
    with train_batches(split, plan, np.arange(8), options, threads=0) as batches:
        batch = to_global(next(batches), mesh)
    expected = abstract_batch(config, mesh)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in expected.items()
    }


def test_a_step_that_does_not_fit_is_reported_with_settings_that_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # the command adds to it
    monkeypatch.setattr(assessment, "host_memory_bytes", lambda: 8 * 2**20)
    chunks = {"loss.micro_batch": 128, "loss.pair_chunk": 16}
    monkeypatch.setattr(advice, "remedies", lambda config, devices: iter([chunks, {"batch_size": 8}]))
    out = tmp_path / "report.json"
    words = ["--topology", "cpu:8", "--config.batch_size=256", "--json", str(out)]
    with pytest.raises(SystemExit) as end:
        main(parse([*TINY, *words]))
    assert end.value.code == 1
    report, text = json.loads(out.read_text()), capsys.readouterr().out
    assert report["fits"] is False and report["device_bytes"] > report["available_bytes"] == 2**20
    assert report["fits_with"] == {"batch_size": 8} and text.endswith("It fits with --config.batch_size=8\n")
    assert "memory of a device: DOES NOT FIT" in text


# --- what to set, and how much fits -----------------------------------------------------------------------------------


def test_remedies_that_change_no_loss_come_first_and_each_gives_a_valid_config() -> None:
    config = with_changes(default.get_config(), {"batch_size": 2**16, "data.path": "x"})
    found = list(remedies(config, 256))
    chunks = {"loss.micro_batch": 128, "loss.pair_chunk": 16, "loss.icl_chunk": 128}
    dots, less = chunks | {"model.remat": "dots"}, {"model.remat": "dots", "loss.micro_batch": 32}
    full = chunks | less | {"model.remat": "full"}
    assert found[:5] == [chunks, dots, chunks | less, full, full | {"mesh.data": 64, "mesh.fsdp": 4}]
    smaller = ["batch_size" in changes for changes in found]
    assert smaller == sorted(smaller) and found[-1]["batch_size"] == 256
    for changes in found:
        without_data_set(with_changes(config, changes))  # raises for an invalid config
        assert changes.get("mesh.data", 256) * changes.get("mesh.fsdp", 1) == 256
    done = with_changes(config, found[-1])
    assert all("loss.micro_batch" not in changes for changes in remedies(done, 256))


def test_the_first_remedy_that_fits_is_the_advice(capsys: pytest.CaptureFixture[str]) -> None:
    fits_with_full = lambda config: answer(config, fits=config.model.remat == "full")
    changes = first_remedy(default.get_config(), 8, fits_with_full)
    assert changes is not None and changes["model.remat"] == "full" and "batch_size" not in changes
    assert first_remedy(default.get_config(), 8, lambda config: answer(config, fits=False)) is None
    assert "--config.model.remat=dots: not known of 16.00 GiB, does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [1, 7, 12, 13, 100])
def test_the_search_ends_at_the_largest_batch_that_fits(limit: int) -> None:
    tried = []

    def assess_rows(config: Any) -> Report:
        assert config.batch_size % 8 == 0
        tried.append(config.batch_size // 8)
        return answer(config, fits=tried[-1] <= limit)

    report = largest_batch(default.get_config(), 8, assess_rows)  # starts at 96, 12 a device
    assert report.fits and report.batch_size == 8 * (limit if limit < 64 else limit // 16 * 16)
    assert len(tried) == len(set(tried)) <= 5 + 2 * limit.bit_length()


def test_a_search_needs_few_tries_where_memory_grows_evenly() -> None:
    tried = []

    def assess_rows(config: Any) -> Report:
        tried.append(config.batch_size // 8)
        needed = int((3 + tried[-1] / 100) * GIB)
        report = answer(config, fits=needed <= NOTHING.available_bytes)
        return dataclasses.replace(report, device_bytes=needed)

    assert (
        largest_batch(default.get_config(), 8, assess_rows).batch_size == 8 * 1296
    )  # 1,300 would fit; a multiple of 16
    assert len(tried) <= 12 and tried[:8] == [12, 24, 48, 96, 192, 384, 768, 1536]


def test_a_search_in_which_nothing_fits_reports_one_row_a_device() -> None:
    report = largest_batch(default.get_config(), 8, lambda config: answer(config, fits=False))
    assert not report.fits and report.batch_size == 8


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("memory required for HLO temporaries (49.45G) exceeds available HBM (15.75G)", 49.45),
        ("Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5),
        ("Ran out of memory: tried 53687091200 bytes of 16 GiB", 50.0),
        ("Attempting to allocate 17.5 GiB. That was not possible. There are 512.5MiB free.", 17.5),
    ],
)
def test_the_needed_bytes_are_parsed_from_any_wording(text: str, gib: float) -> None:
    needed = parse_needed_bytes(text)
    assert needed is not None and needed / GIB == pytest.approx(gib)


def test_a_refusal_without_a_size_gives_none() -> None:
    assert parse_needed_bytes("RESOURCE_EXHAUSTED: out of memory, see error_1000") is None


# --- wrong use --------------------------------------------------------------------------------------------------------


def test_wrong_use_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    for words, expected in {
        ("--config.batch_size=12",): "batch_size 12 does not divide by the mesh's 8 devices",
        ("--config.mesh.data=16",): "mesh (data=16, fsdp=1) does not cover 8 device(s)",
        ("--config.mesh.tensor=2",): "--config.mesh.tensor: the config has no such field",
        ("--config.mesh.fsdp=8", "--config.model.width=36", "--config.model.heads=2"): "does not divide by mesh axis",
        ("--config.batch_size=0",): "batch_size 0 depends on the data set",
        ("--config.model.remat=some",): "model.remat is 'some', needs one of none, dots, full",
    }.items():
        assert expected in refusal(capsys, "--topology", "cpu:8", *words)
    assert "found 8 CPU devices" in refusal(capsys, "--topology", "cpu:9")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "--topology '': found no such chip, needs v5e, v5p, v6e"),
        ("foo:4x4", "--topology foo:4x4: found no such chip"),
        ("v4:2x2x1", "--topology v4:2x2x1: found no such chip"),
        ("v5p-8", "give v5e:16x16 or cpu:8"),
        ("v5e", "found no v5e slice of shape nothing"),
        ("v5e:3x3", "found no v5e slice of shape 3x3; shapes are 1x1, 2x2, 2x4"),
        ("v5e:16x32", "found no v5e slice of shape 16x32"),
        ("v5e:4x4x4", "found no v5e slice of shape 4x4x4"),
        ("v5p:4x4", "found no v5p slice of shape 4x4; shapes are 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, ... 16x16"),
        ("cpu:0", "needs the number of devices"),
        ("cpu:", "needs the number of devices"),
    ],
)  # fmt: skip
def test_an_unknown_or_ambiguous_topology_is_refused(
    name: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refusal(capsys, "--topology", name)


def test_slices_have_as_many_chips_as_their_sides_multiply_to() -> None:
    sizes = {"v5e:1x1": 1, "v5e:16x16": 256, "v5p:2x2x1": 4, "v5p:4x4x4": 64, "v5p:16x16x24": 6144, "v6e:2x4": 8}
    assert {name: topologies.parse(name).size for name in sizes} == sizes


def test_without_libtpu_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_module, "assess_in_subprocess", assess)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'rice_jax[preflight]'" in refusal(capsys, "--topology", "v5e:2x2")


def test_another_slice_than_the_requested_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "environ", dict(os.environ))
    described = type("Described", (), {"devices": jax.devices()[:4]})
    monkeypatch.setattr(topologies.topologies, "get_topology_desc", lambda **_: described)
    with pytest.raises(ValueError, match="v5e:2x2: libtpu describes 4 x cpu, needs 4 x TPU v5 lite"):
        topologies.devices(topologies.parse("v5e:2x2"))


# --- TPU slices -------------------------------------------------------------------------------------------------------


@needs_libtpu
def test_two_preflights_of_a_slice_at_once_both_report_and_print_nothing_to_stderr(tmp_path: Path) -> None:
    outs = [tmp_path / "a.json", tmp_path / "b.json"]
    runs = [command(*TINY, "--topology", "v5e:2x2", "--json", out) for out in outs]
    for run, out in zip(runs, outs, strict=True):
        _, errors = run.communicate()
        assert run.returncode == 0 and errors == ""
        report = json.loads(out.read_text())
        assert report["fits"] is True and report["floor_seconds"] > 0 and report["cores"] >= 1
        assert report["available_bytes"] == int(15.75 * GIB)


def figures(config: Any, topology: str, **changes: Any) -> Report:
    return assess_in_subprocess(with_changes(config, changes), topologies.parse(topology))


FULL_SIZE: Sequence[tuple[str, str, int]] = [
    ("b32", "v5e:16x16", 32768),
    ("b32", "v5e:16x16", 131072),
    ("b32", "v5e:4x4", 4096),
    ("b16", "v5e:8x8", 8192),
    ("l14", "v5e:16x16", 16384),
    ("l14", "v5p:4x4x4", 32768),
]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("size", "topology", "batch_size"), FULL_SIZE)
def test_the_full_recipe_fits(size: str, topology: str, batch_size: int) -> None:
    report = figures(pod.get_config(size), topology, batch_size=batch_size)
    assert report.fits and report.collectives is not None and report.floor_seconds is not None
    config = pod.get_config(size)
    gradients = 4 * 88e6  # at least
    example = 4 * 2 * (config.model.width + 2 * config.model.embedding) + 40
    assert gradients < sum(report.collectives.values()) < 4 * 360e6 + batch_size * example


@needs_libtpu
@pytest.mark.slow
def test_the_official_formulation_at_32768_does_not_fit() -> None:
    report = assess_in_subprocess(pod.get_config("b32"), topologies.parse("v5e:16x16"), official_formulation.make_loss)
    assert not report.fits and report.collectives is None
    assert report.device_bytes is not None and 45 < report.device_bytes / GIB < 55


@needs_libtpu
@pytest.mark.slow
def test_a_config_that_does_not_fit_a_slice_gets_advice(capsys: pytest.CaptureFixture[str]) -> None:
    config = with_changes(default.get_config(), {"batch_size": 4096, "model.dtype": "bfloat16"})
    assess_4x4 = lambda config: assess_in_subprocess(config, topologies.parse("v5e:4x4"))
    assert not assess_4x4(config).fits
    changes = first_remedy(config, 16, assess_4x4)
    assert changes == {"loss.micro_batch": 128, "loss.pair_chunk": 16}

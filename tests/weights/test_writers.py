"""Imported folders and exports: nothing is lost between them, and an error leaves no folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import rice_jax
from data_pipeline.format.reader import open_dataset
from rice_jax import evaluate, train
from rice_jax.checkpoints.run_folder import write_config
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import to_json
from rice_jax.models.rice import build_model
from rice_jax.training import step
from rice_jax.weights import exports, naming, writers
from rice_jax.weights.__main__ import parse
from rice_jax.weights.readers import read_source
from rice_jax.weights.writers import official_tensors, write_huggingface, write_safetensors
from tests import clip_files, official, torch_files
from tests.test_train import smoke_config
from tests.weights.conftest import call
from tests.weights.test_start import empty_state


def test_an_output_that_is_not_empty_is_refused_and_not_changed(tower: clip_files.Tensors, tmp_path: Path) -> None:
    clip_files.write_openai(tmp_path / "clip.pt", tower)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    for command in (["import", tmp_path / "clip.pt"], ["export", tmp_path, "--format", "official"]):
        with pytest.raises(ValueError, match=r"empty|is neither a training run"):
            call(*command, "--output", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(FileNotFoundError, match="nowhere: found nothing there"):
        call("export", tmp_path / "nowhere", "--format", "official", "--output", tmp_path / "new")


def test_the_command_prints_one_line_for_an_error_and_sets_the_status(tmp_path: Path) -> None:
    (tmp_path / "cut.pt").write_bytes(b"PK\3\4")
    command = [sys.executable, "-m", "rice_jax.weights", "import", str(tmp_path / "cut.pt"), "--output"]
    found = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert found.returncode == 1 and found.stderr.count("\n") == 1 and "cut short" in found.stderr
    with pytest.raises(SystemExit, match="2"):
        parse(["import", str(tmp_path / "cut.pt")])


@pytest.fixture(scope="module")
def trained(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Imported official weights of the smoke config's size, and a run that started from them."""
    folder = tmp_path_factory.mktemp("trained")
    config = trained_config(converted)
    shapes = step.abstract_state(build_model(config), config, official.mesh_of(1, 1)).params
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    embeddings = {
        f"transformer.transformer.embeddings.{name}": rng.normal(size=shape).astype(np.float32)
        for name, shape in (
            ("class_embedding", (32,)),
            ("position_embedding.weight", (5, 32)),
            ("layer_norm.weight", (32,)),
            ("layer_norm.bias", (32,)),
        )
    }
    torch_files.write_state_dict(folder / "rice_final.pth", naming.invert(naming.flattened(params)) | embeddings)
    call("import", folder / "rice_final.pth", "--output", folder / "imported")
    train.train_and_evaluate(trained_config(converted, init_from=str(folder / "imported")), folder / "run")
    return folder / "imported", folder / "run"


def trained_config(converted: Path, **changes: Any) -> Any:
    config = smoke_config(converted, num_updates=4, checkpoint_every=2, **changes)
    config.model.heads = 1  # as the official code has it at this width
    config.loss.pfr = 0.0  # for the time that compiling takes
    config.data.eval_split = ""
    return config


def test_a_run_starts_from_imported_weights_and_resumes_without_init_from(
    trained: tuple[Path, Path], converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported, run = trained
    # The first update has rate 0 (docs/official.md 7.4), the second moves nothing by more than rate and decay.
    before, after = rice_jax.load(imported).params, rice_jax.load(run, step=2).params
    largest = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert 0 < max(jax.tree.leaves(largest)) < 5e-3
    train.train_and_evaluate(trained_config(converted), run)  # without init_from
    assert "all 4 updates are done" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["init_from"] == str(imported)
    with pytest.raises(ValueError, match=r"(?s)another config.*init_from"):
        train.train_and_evaluate(trained_config(converted, init_from="elsewhere"), run)


def test_imported_weights_are_evaluated_and_not_trained_in_place(
    trained: tuple[Path, Path], converted: Path, tmp_path: Path
) -> None:
    imported, _ = trained
    evaluate.evaluate(evaluate.parse(["--workdir", str(imported), "--data", str(converted), "--output", str(tmp_path)]))
    assert json.loads((tmp_path / "metrics.json").read_text())["queries"] == 3
    with pytest.raises(ValueError, match=r"holds imported weights and no run; .*--config.init_from="):
        train.train_and_evaluate(trained_config(converted), imported)
    with pytest.raises(ValueError, match="is a run already"):
        call("import", imported, "--output", tmp_path / "again")


# --- Exports ---


def test_an_official_export_of_a_run_has_every_tensor_and_a_card(
    trained: tuple[Path, Path], converted: Path, tmp_path: Path
) -> None:
    imported, run = trained
    evaluate.evaluate(evaluate.parse(["--workdir", str(run), "--data", str(converted), "--split", "val"]))
    call("export", run, "--format", "official", "--output", tmp_path / "out")
    call("export", imported, "--format", "official", "--output", tmp_path / "start")
    found, started = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "start"))
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in started.items()}
    for name in started:  # the training did not change the unused embeddings
        assert np.array_equal(found[name], started[name]) == ("embeddings." in name), name
    assert read_source(tmp_path / "out").config.model == rice_jax.load(run).config.model
    card = (tmp_path / "out/README.md").read_text()
    assert open_dataset(converted).content_hash in card
    assert rice_jax.load(run).fingerprint in card
    assert "| evaluation-val | recall@1 |" in card and '"init_from"' in card and str(imported) in card
    assert "none: not trained here" in (tmp_path / "start/README.md").read_text()


def test_what_an_export_reads_beside_the_weights_is_named_if_it_is_damaged(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[1], run)
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')  # of a training that goes on
    (run / "evaluation-x").mkdir()
    (run / "evaluation-x/metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation-x/metrics.json: is damaged .*move that folder away"):
        call("export", run, "--format", "official", "--output", tmp_path / "out")
    shutil.rmtree(run / "evaluation-x")
    (run / "unused.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"unused.safetensors: is damaged .*, or remove it"):
        call("export", run, "--format", "official", "--output", tmp_path / "out")
    (run / "unused.safetensors").unlink()
    call("export", run, "--format", "official", "--output", tmp_path / "out")


def test_a_run_from_random_weights_gets_fresh_embeddings(tmp_path: Path) -> None:
    config = smoke_config(tmp_path)
    config.model.activation = "gelu"
    rng, empty = np.random.default_rng(3), empty_state(config, official.mesh_of(1, 1))
    state = empty._replace(params=jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), empty.params))
    with Checkpoints(tmp_path / "run", kept=1) as checkpoints:
        checkpoints.save(3, state, {})
    write_config(tmp_path / "run", to_json(config))
    call("export", tmp_path / "run", "--format", "official", "--output", tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    embeddings = "transformer.transformer.embeddings"
    np.testing.assert_array_equal(
        found[f"{embeddings}.position_embedding.weight"], found["image_encoder.model.positional_embedding"]
    )
    assert found[f"{embeddings}.layer_norm.weight"].tolist() == [1] * 32
    assert not found[f"{embeddings}.layer_norm.bias"].any() and found[f"{embeddings}.class_embedding"].std() > 0.5
    card = (tmp_path / "out/README.md").read_text()
    assert "model.heads is 2, where the official code has 0" in card
    assert "model.activation is gelu, where the official code has quick_gelu" in card
    # The config beside the tensors has what they do not show.
    call("import", tmp_path / "out", "--output", tmp_path / "again")
    call("export", tmp_path / "run", "--format", "huggingface", "--output", tmp_path / "hf")
    call("import", tmp_path / "hf", "--output", tmp_path / "encoder")
    run, again, encoder = (rice_jax.load(tmp_path / name) for name in ("run", "again", "encoder"))
    assert run.fingerprint == again.fingerprint and run.config.model == again.config.model
    for name in ("heads", "activation", "hidden"):
        assert encoder.config.model[name] == run.config.model[name]
    jax.tree.map(np.testing.assert_array_equal, run.params["encoder"], encoder.params["encoder"])


def test_a_hugging_face_export_has_hugging_faces_names_and_preparation(
    tower: clip_files.Tensors, tmp_path: Path
) -> None:
    source = clip_files.write_hugging_face(tmp_path / "hf", tower, num_attention_heads=4, hidden_act="gelu")
    call("import", source, "--output", tmp_path / "run")
    call("export", tmp_path / "run", "--format", "huggingface", "--output", tmp_path / "out")
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    stated = json.loads((tmp_path / "out/config.json").read_text())
    assert json.loads((source / "config.json").read_text()).items() <= stated.items()
    prepared = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert prepared["size"] == {"shortest_edge": 24} and prepared["resample"] == 3


def test_stablehlo_is_exported_with_a_card(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The programs are tested in test_exports."""
    monkeypatch.setattr(exports, "export_programs", lambda model, folder: (folder / "of").write_text(model.fingerprint))
    call("export", trained[0], "--format", "stablehlo", "--output", tmp_path / "out")
    fingerprint = (tmp_path / "out/of").read_text()
    assert fingerprint == rice_jax.load(trained[0]).fingerprint
    card = (tmp_path / "out/README.md").read_text()
    assert "load_programs" in card and fingerprint in card


def test_a_stem_cannot_be_exported(tmp_path: Path) -> None:
    config = smoke_config(tmp_path)
    config.model.stem_channels, config.model.stem_blocks = (8, 8, 8, 8), (0, 0, 0, 0)
    net = build_model(config)
    params = empty_state(config, official.mesh_of(1, 1)).params
    model = rice_jax.Model(config, net, params, official.mesh_of(1, 1), batch_size=8)
    with pytest.raises(ValueError, match=r"no place in the official code: encoder/stem.*; take --format stablehlo"):
        official_tensors(model, {})
    with pytest.raises(ValueError, match=r"CLIP has no convolutional stem"):
        write_huggingface(model, {}, tmp_path)


def test_an_export_that_reads_back_differently_is_not_kept(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(tensors: Any, path: Path) -> None:
        changed = dict(tensors)
        changed["image_encoder.model.proj"] = np.asarray(changed["image_encoder.model.proj"]) + 1e-6
        write_safetensors(changed, path)

    monkeypatch.setattr(writers, "write_safetensors", damaged)
    with pytest.raises(ValueError, match=r"does not read back as it was written \(image_encoder.model.proj\)"):
        call("export", trained[1], "--format", "official", "--output", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_pth_export_without_torch_says_what_to_install(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"--format pth needs torch: pip install 'rice_jax\[torch\]'"):
        call("export", trained[0], "--format", "pth", "--output", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- Show ---


def test_show_lists_where_each_tensor_would_go(
    tower: clip_files.Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip_files.write_openai(tmp_path / "clip.pt", tower | {"odd": np.zeros(2, np.float32)})
    call("show", tmp_path / "clip.pt")
    text = capsys.readouterr().out
    assert (
        "OpenAI CLIP, encoder: patch 8, 24 px, width 128, 3 layers, 2 heads, MLP 512, embedding 48, quick_gelu" in text
    )
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  ")}
    assert rows["visual.conv1.weight"] == ["128x3x8x8", "float16", "encoder/conv1/kernel"]
    assert rows["visual.transformer.resblocks.2.ln_1.bias"] == ["128", "float32", "encoder/resblocks/ln_1/bias[2]"]
    assert rows["logit_scale"] == ["scalar", "float32", "not", "used"]
    assert "fault: visual.odd: no rule matches: unexpected (shape (2,))" in text
    call("show", tmp_path / "clip.pt", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["width"] == 128 and len(found["faults"]) == 1


def test_show_opens_runs_and_hugging_face_folders(
    trained: tuple[Path, Path], tower: clip_files.Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("show", trained[1])
    assert "rice_jax run, encoder and decoder: patch 16, 32 px" in capsys.readouterr().out
    call("show", clip_files.write_hugging_face(tmp_path / "hf", tower))
    assert "encoder/resblocks/attn/in_proj_kernel[0] q" in capsys.readouterr().out


@pytest.mark.slow
def test_a_vit_b_32_is_imported_within_20_seconds_and_3_gigabytes(tmp_path: Path) -> None:
    tower = clip_files.vision_tower(width=768, layers=12, px=224, patch=32, embedding=512)
    clip_files.write_openai(tmp_path / "ViT-B-32.pt", tower)
    del tower
    script = (
        "import resource, sys; from rice_jax.weights.__main__ import command; command(sys.argv[1:]);"
        "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime, used.ru_maxrss)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, "import", tmp_path / "ViT-B-32.pt", "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, kilobytes = map(float, found.stdout.split()[-2:])
    assert seconds < 20  # of processor time, because a clock would measure the machine's other work too
    assert kilobytes * 1024 < 3e9

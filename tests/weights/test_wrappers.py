"""Models within other things are found: wrapped dicts, prefixes, parts of a model, folders of other programs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rice_jax.checkpoints.run_folder import is_run
from rice_jax.weights.inspect import Kind, inspect_weights
from rice_jax.weights.readers import read_source
from tests import clip_files, torch_files
from tests.clip_files import Tensors
from tests.weights.conftest import call

Names = Callable[[Tensors], dict[str, Any]]


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: array for name, array in tensors.items()}


def check_same_encoder(path: Path, tower: Tensors, kind: Kind) -> tuple[str, ...]:
    """Checks that the file's encoder has the tower's numbers, and returns the notes."""
    source = read_source(path, activation=None if kind == Kind.OPENAI else "quick_gelu")
    assert source.kind == kind
    np.testing.assert_array_equal(source.params["encoder"]["proj"], tower["proj"])
    last = max(int(name.split(".")[2]) for name in tower if name.startswith("transformer."))
    np.testing.assert_array_equal(
        source.params["encoder"]["resblocks"]["mlp"]["c_proj"]["kernel"][last],
        tower[f"transformer.resblocks.{last}.mlp.c_proj.weight"].T,
    )
    return source.notes


WRAPPED: dict[str, Names] = {
    "model_state_dict": lambda t: {"model_state_dict": clip_files.visual(t), "optimizer_state_dict": {"m": t["proj"]}},
    "a name of one's own": lambda t: {"my weights": clip_files.visual(t), "epoch": 3},
    "dicts in dicts": lambda t: {"trainer": {"net": {"clip": clip_files.visual(t)}}, "best": 0},
    "open_clip's training": lambda t: {
        "epoch": 3, "name": "mine", "state_dict": prefixed("module.", clip_files.visual(t)), "optimizer": {"state": {}}
    },
    "torch.compile": lambda t: prefixed("_orig_mod.", clip_files.visual(t)),
    "torch.compile of blocks": lambda t: {
        name.replace("resblocks.0.", "resblocks.0._orig_mod."): x for name, x in clip_files.visual(t).items()
    },
    "FSDP": lambda t: {
        "_fsdp_wrapped_module." + name.replace("resblocks.", "resblocks._fsdp_wrapped_module."): x
        for name, x in clip_files.visual(t).items()
    },
    "FairScale": lambda t: {
        name.replace("resblocks.0.", "resblocks.0._fpw_module."): x for name, x in clip_files.visual(t).items()
    },
    "a wrapper of one's own": lambda t: {
        name.replace("resblocks.0.", "resblocks.0.inner."): x for name, x in clip_files.visual(t).items()
    },
    "a list": lambda t: {"models": [clip_files.visual(t), {"lr": 1}]},
    "Lightning": lambda t: {
        "state_dict": prefixed("model.clip.", clip_files.visual(t)) | {"loss.scale": t["proj"]}, "global_step": 9
    },
    "the tower alone": lambda t: dict(t),
    "the tower alone, wrapped": lambda t: {"model": prefixed("backbone.", t), "args": {"lr": 1}},
    "an average beside it": lambda t: {
        "ema": clip_files.visual({name: x + 1 for name, x in t.items()}), "model": clip_files.visual(t)
    },
    "only an average": lambda t: {"state_dict_ema": clip_files.visual(t)},
    "dots in a key": lambda t: {"a.b": clip_files.visual(t)},
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
def test_a_wrapped_model_is_found_and_the_wrapping_is_said(how: str, tower: Tensors, tmp_path: Path) -> None:
    torch_files.write_state_dict(tmp_path / "epoch_3.pt", WRAPPED[how](tower))
    notes = check_same_encoder(tmp_path / "epoch_3.pt", tower, Kind.OPEN_CLIP)
    assert any("begin with" in note or "wrappers add" in note or "alone" in note for note in notes), notes


@pytest.mark.parametrize("prefix", ["model.", "vision_tower.", "a.module.b."])
def test_hugging_faces_names_below_any_prefix_are_found(prefix: str, tower: Tensors, tmp_path: Path) -> None:
    save_file(prefixed(prefix, clip_files.hugging_face_names(tower)), tmp_path / "file.safetensors")
    check_same_encoder(tmp_path / "file.safetensors", tower, Kind.HUGGING_FACE)


def test_an_official_model_below_any_name_is_found(golden: Tensors, tmp_path: Path) -> None:
    torch_files.write_state_dict(tmp_path / "iter9.ckpt", {"best_model": prefixed("module.", golden), "iteration": 9})
    source = read_source(tmp_path / "iter9.ckpt")
    assert source.kind == Kind.OFFICIAL and source.params.keys() >= {"encoder", "decoder", "reconstruction"}


@pytest.mark.parametrize("around", [{}, {"epoch": 3}])
def test_a_counter_beside_an_averaged_model_is_left_out_and_said(
    around: dict[str, Any], tower: Tensors, tmp_path: Path
) -> None:
    averaged = {"n_averaged": np.array(7)} | prefixed("module.", clip_files.visual(tower))
    torch_files.write_state_dict(tmp_path / "swa.pt", around | {"model": averaged} if around else averaged)
    notes = check_same_encoder(tmp_path / "swa.pt", tower, Kind.OPEN_CLIP)
    assert "n_averaged: single numbers of no known use, left out" in notes
    averaged["visual.gate"] = np.zeros(3, np.float32)
    torch_files.write_state_dict(tmp_path / "swa.pt", averaged)
    with pytest.raises(ValueError, match=r"visual\.gate"):  # more than one number may be a part of the model
        read_source(tmp_path / "swa.pt", activation="quick_gelu")


def test_several_models_in_a_file_are_refused_by_their_names(tower: Tensors, tmp_path: Path) -> None:
    torch_files.write_state_dict(tmp_path / "two.pt", {k: clip_files.visual(tower) for k in ("left", "right")})
    with pytest.raises(ValueError, match=r"two.pt: found 2 models, with the prefixes left\., right\.; save"):
        inspect_weights(tmp_path / "two.pt")


def test_names_that_differ_in_wrappers_alone_are_refused(tower: Tensors, tmp_path: Path) -> None:
    names = clip_files.visual(tower)
    torch_files.write_state_dict(tmp_path / "twice.pt", names | prefixed("module.", names))
    with pytest.raises(ValueError, match="names differ only in"):
        inspect_weights(tmp_path / "twice.pt")


@pytest.mark.parametrize("vision_model", ["vision_model.", ""])
def test_a_model_without_its_projection_names_the_class_that_has_it(
    vision_model: str, tower: Tensors, tmp_path: Path
) -> None:
    names = clip_files.hugging_face_names(tower)
    del names["visual_projection.weight"]
    names = {name.replace("vision_model.", vision_model): x for name, x in names.items()}
    save_file(names, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"without its projection visual_projection.weight; .*WithProjection"):
        inspect_weights(tmp_path)


def test_an_open_clip_tower_without_its_projection_is_named(tower: Tensors, tmp_path: Path) -> None:
    save_file(clip_files.visual({k: x for k, x in tower.items() if k != "proj"}), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"without its projection visual\.proj"):
        inspect_weights(tmp_path)


def test_other_models_are_recognised_below_a_prefix(tmp_path: Path) -> None:
    torch_files.write_state_dict(tmp_path / "file.pt", {"net": {"visual.trunk.norm.weight": np.ones(2, np.float32)}})
    with pytest.raises(ValueError, match="a timm tower"):
        inspect_weights(tmp_path / "file.pt")


# --- Parts ---


def write_parts(folder: Path, tower: Tensors, *, index: bool, count: int = 3) -> list[Path]:
    single = clip_files.write_hugging_face(folder, tower) / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    paths = [folder / f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
    names = sorted(tensors)
    for k, path in enumerate(paths):
        save_file({name: tensors[name] for name in names[k::count]}, path)
    if index:
        places = {name: paths[k % count].name for k, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {places}}}'.replace("'", '"'))
    return paths


@pytest.mark.parametrize("index", [True, False])
def test_a_part_by_itself_stands_for_the_whole_model(index: bool, tower: Tensors, tmp_path: Path) -> None:
    paths = write_parts(tmp_path / "model", tower, index=index)
    assert any("part of a model" in note for note in check_same_encoder(paths[1], tower, Kind.HUGGING_FACE))
    check_same_encoder(tmp_path / "model", tower, Kind.HUGGING_FACE)
    if index:
        check_same_encoder(tmp_path / "model" / "model.safetensors.index.json", tower, Kind.HUGGING_FACE)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("given", ["part", "folder"])
def test_a_model_without_all_its_parts_is_refused_by_their_names(
    index: bool, given: str, tower: Tensors, tmp_path: Path
) -> None:
    paths = write_parts(tmp_path / "model", tower, index=index)
    paths[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"3 parts, and model-00001-of-00003.safetensors are missing here"):
        inspect_weights(paths[1] if given == "part" else tmp_path / "model")


# --- Folders ---


def test_a_run_of_another_program_is_not_taken_for_one_of_ours(tower: Tensors, tmp_path: Path) -> None:
    checkpoints = tmp_path / "mine" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch_files.write_state_dict(checkpoints / "epoch_3.pt", {"state_dict": clip_files.visual(tower), "epoch": 3})
    (tmp_path / "mine" / "params.txt").write_text("model: ViT-B-32\n")
    assert not is_run(tmp_path / "mine")
    check_same_encoder(tmp_path / "mine", tower, Kind.OPEN_CLIP)
    call("import", tmp_path / "mine", "--output", tmp_path / "out", "--activation", "quick_gelu")
    assert is_run(tmp_path / "out")
    shutil.copy(checkpoints / "epoch_3.pt", checkpoints / "epoch_latest.pt")
    with pytest.raises(ValueError, match=r"\(checkpoints/epoch_3.pt, checkpoints/epoch_latest.pt\); give the file"):
        inspect_weights(tmp_path / "mine")


@pytest.mark.parametrize("name", ["checkpoint-500/model.safetensors", "version_0/epoch=3-step=9.ckpt"])
def test_the_only_model_in_a_folder_of_steps_is_taken(name: str, tower: Tensors, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir()
    if file.suffix == ".ckpt":
        torch_files.write_state_dict(file, {"state_dict": prefixed("model.", clip_files.visual(tower))})
    else:
        save_file(clip_files.visual(tower), file)
    check_same_encoder(tmp_path, tower, Kind.OPEN_CLIP)

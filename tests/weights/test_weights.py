"""Weights in and out: the same embeddings whatever the source, nothing lost on the way, and what is refused."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rice_jax
from configs import default
from data_pipeline.format.reader import open_dataset
from rice_jax import evaluate, train
from rice_jax.checkpoints.run_folder import write_config
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import to_json
from rice_jax.models.arrays import MEAN, STD, unit
from rice_jax.models.rice import build_model
from rice_jax.training import step
from rice_jax.weights import archives, exports, naming, writers
from rice_jax.weights.__main__ import main, parse
from rice_jax.weights.readers import _of_hugging_face, initialise, read_source, read_unused, write_safetensors
from rice_jax.weights.writers import official_tensors, write_huggingface
from tests import clip_files, official, torch_files
from tests.test_train import smoke_config

HERE = Path(__file__).parents[1]
PICTURES = np.random.default_rng(1).integers(0, 256, (3, 24, 24, 3), np.uint8)
NORMALISED = (PICTURES / 255 - np.array(MEAN)) / np.array(STD)


def call(*words: object) -> None:
    main(parse([str(word) for word in words]))


@pytest.fixture(scope="module")
def tower() -> clip_files.Tensors:
    return clip_files.vision_tower()


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """Tensors of an official model, from figures that the official code gave."""
    return {name: array.copy() for name, array in official.load(HERE / "golden/rice_w64.npz").group("param/").items()}


def gelu(z: np.ndarray) -> np.ndarray:
    return z * (1 + np.vectorize(math.erf)(z / 2**0.5)) / 2


# --- In: embeddings ---

WRITERS: dict[str, Callable[[Path, clip_files.Tensors], Path]] = {
    "openai": clip_files.write_openai,
    "hugging face, vision": clip_files.write_hugging_face,
    "hugging face, whole": lambda path, t: clip_files.write_hugging_face(path, t, whole=True),
    "open_clip": lambda path, t: clip_files.write_open_clip(path, t, quick_gelu=True),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_source_of_clip_gives_the_embeddings_of_the_plain_definition(
    writer: str, tower: clip_files.Tensors, tmp_path: Path
) -> None:
    call("import", WRITERS[writer](tmp_path / "source", tower), "--output", tmp_path / "out")
    loaded = rice_jax.load(tmp_path / "out")
    np.testing.assert_allclose(
        loaded.encode_images(PICTURES), clip_files.embed(tower, NORMALISED, heads=2), atol=2e-6, rtol=0
    )


def test_official_files_give_the_official_embeddings(tmp_path: Path) -> None:
    golden = official.load(HERE / "golden/rice_w64.npz")
    tensors = golden.group("param/")
    torch_files.write_state_dict(tmp_path / "rice_final.pth", tensors)
    # As several GPUs leave it (SPEC 15.1).
    torch_files.write_state_dict(tmp_path / "wrapped.pth", {f"module.{name}": x for name, x in tensors.items()})
    for name in ("rice_final", "wrapped"):
        call("import", tmp_path / f"{name}.pth", "--output", tmp_path / name)
    loaded = rice_jax.load(tmp_path / "rice_final")
    assert loaded.config.model.decoder_heads == 8 and loaded.config.loss.pmd and loaded.config.loss.pfr
    assert loaded.fingerprint == rice_jax.load(tmp_path / "wrapped").fingerprint
    encode = jax.jit(lambda params, images: loaded.net.apply({"params": params}, images, method="encode"))
    tokens, pooled = encode(loaded.params, golden.batch["image"])
    for ours, name in ((tokens, "image_tokens"), (unit(pooled), "image_embedding")):
        expected = golden.arrays[f"out/{name}"]
        assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


def test_heads_and_activation_are_read_from_hugging_faces_config(tower: clip_files.Tensors, tmp_path: Path) -> None:
    source = clip_files.write_hugging_face(tmp_path / "hf", tower, num_attention_heads=4, hidden_act="gelu")
    call("import", source, "--output", tmp_path / "out")
    expected = clip_files.embed(tower, NORMALISED, heads=4, activation=gelu)
    np.testing.assert_allclose(rice_jax.load(tmp_path / "out").encode_images(PICTURES), expected, atol=2e-6)


def test_what_hugging_faces_config_leaves_out_is_vit_b_32s(tmp_path: Path) -> None:
    config = {"model_type": "clip", "vision_config": {}, "projection_dim": 48}
    found = _of_hugging_face(config, tmp_path)
    assert found[0] == {
        "width": 768, "hidden": 3072, "layers": 12, "heads": 12, "image_size": 224, "patch_size": 32, "embedding": 48,
    }  # fmt: skip
    assert found[1] == "quick_gelu"


def test_heads_and_activation_are_read_from_open_clips_config(tower: clip_files.Tensors, tmp_path: Path) -> None:
    source = clip_files.write_open_clip(tmp_path / "oc", tower, quick_gelu=False, head_width=32)
    call("import", source, "--output", tmp_path / "out")
    expected = clip_files.embed(tower, NORMALISED, heads=4, activation=gelu)
    np.testing.assert_allclose(rice_jax.load(tmp_path / "out").encode_images(PICTURES), expected, atol=2e-6)


def test_an_activation_that_no_file_tells_must_be_said(tower: clip_files.Tensors, tmp_path: Path) -> None:
    save_file(clip_files.visual(tower), tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="activation: the file does not say; give --activation"):
        call("import", tmp_path / "clip.safetensors", "--output", tmp_path / "out")
    call("import", tmp_path / "clip.safetensors", "--output", tmp_path / "out", "--activation", "gelu")
    assert rice_jax.load(tmp_path / "out").config.model.activation == "gelu"
    clip_files.write_openai(tmp_path / "clip.pt", tower)
    with pytest.raises(ValueError, match="--activation gelu: the file says quick_gelu"):
        call("import", tmp_path / "clip.pt", "--output", tmp_path / "other", "--activation", "gelu")
    assert not (tmp_path / "other").exists()


def test_files_that_hugging_face_split_are_read_together(tower: clip_files.Tensors, tmp_path: Path) -> None:
    source = clip_files.write_hugging_face(tmp_path / "hf", tower)
    whole = load_file(source / "model.safetensors")
    names = sorted(whole)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, held in parts.items():
        save_file({name: whole[name] for name in held}, source / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "model.safetensors").unlink()
    assert read_source(source).params["encoder"]["proj"].shape == (128, 48)


def test_positions_are_resized_for_another_image_size_and_it_is_said(
    tower: clip_files.Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip_files.write_openai(tmp_path / "clip.pt", tower)
    call("import", tmp_path / "clip.pt", "--output", tmp_path / "out", "--image-size", 48)
    assert "resized (bicubic) from 3x3 patches to 6x6: 24 px to 48" in capsys.readouterr().out
    loaded = rice_jax.load(tmp_path / "out")
    assert loaded.config.data.image_size == 48 and loaded.config.data.resize == 48
    position = loaded.params["encoder"]["positional_embedding"]
    np.testing.assert_array_equal(position[0], tower["positional_embedding"][0])
    # A bicubic filter keeps a ramp's middle, and four places' mean.
    grid = np.asarray(position[1:]).reshape(6, 6, -1)
    old = tower["positional_embedding"][1:].reshape(3, 3, -1)
    np.testing.assert_allclose(grid[2:4, 2:4].mean((0, 1)), _bicubic_middle(old), atol=1e-5)
    assert loaded.encode_images(np.zeros((1, 48, 48, 3), np.uint8)).shape == (1, 48)


def _bicubic_middle(grid: np.ndarray) -> np.ndarray:
    """Mean of a 3x3 grid doubled, over the four places of its middle: Keys' cubic (a = -1/2) at a quarter either way.

    Taps beyond the border fall away, and the others' weights are made to sum to 1.
    """

    def cubic(x: float) -> float:
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    rows = []
    for centre in (0.75, 1.25):  # places 2 and 3 of six, on the scale of three
        weights_ = np.array([cubic(centre - tap) for tap in range(3)])
        rows.append(weights_ / weights_.sum())
    middle = np.mean(rows, axis=0)
    return np.einsum("i,j,ijd->d", middle, middle, grid)


# --- In: official heads, names, precision ---


def test_every_tensor_of_the_official_model_has_its_place_and_shape() -> None:
    """golden/parameters.csv: names and shapes of the full ViT-B/32 model."""
    config = default.get_config()
    shapes = jax.eval_shape(lambda: step.init_params(build_model(config), config, jax.random.key(0)))
    nothing = {path: np.broadcast_to(np.float32(0), x.shape) for path, x in naming.flattened(shapes).items()}
    ours = {name: array.shape for name, array in naming.invert(nothing).items()}
    lines = (HERE / "golden/parameters.csv").read_text().splitlines()[1:]
    theirs = {
        name: () if shape == "scalar" else tuple(int(side) for side in shape.split("x"))
        for name, shape in (line.split(",")[:2] for line in lines)
        if "embeddings." not in name and "norm_s" not in name
    }
    assert ours == theirs and len(theirs) == 185


def parts(golden: dict[str, np.ndarray], head: str) -> dict[str, np.ndarray]:
    """An official checkpoint of less than the full model (SPEC 3.4, 7.7)."""
    if head == "contrastive":
        kept = {name: array for name, array in golden.items() if name.startswith("image_encoder.")}
        scales = {"transformer.contrastive_norm.norm_s": np.array([3.5], np.float32)}
        return kept | scales | {"transformer.logit_scale": np.array(4, np.float32)}
    without = {"pmd": ("heads.rec",), "none": ("heads.",)}[head]
    return {name: array for name, array in golden.items() if not any(word in name for word in without)}


@pytest.mark.parametrize(
    ("head", "pmd", "pfr", "scale"), [("contrastive", 0, 0, 3.5), ("pmd", 1, 0, 4.0), ("none", 0, 0, 4.0)]
)
def test_official_files_of_every_stage_come_in_and_go_out_unchanged(
    head: str, pmd: float, pfr: float, scale: float, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    tensors = parts(golden, head)
    torch_files.write_state_dict(tmp_path / "rice_final.pth", tensors)
    call("import", tmp_path / "rice_final.pth", "--output", tmp_path / "run")
    loaded = rice_jax.load(tmp_path / "run")
    assert (loaded.config.loss.pmd, loaded.config.loss.pfr) == (pmd, pfr)
    assert float(loaded.params["logit_scale"]) == scale
    call("export", tmp_path / "run", "--format", "official", "--output", tmp_path / "out")
    again = load_file(tmp_path / "out/model.safetensors")
    assert again.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_an_export_of_an_imported_official_model_is_the_file_that_came(
    golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Its four unused decoder embeddings included (SPEC 5.8)."""
    torch_files.write_state_dict(tmp_path / "rice_final.pth", golden)
    call("import", tmp_path / "rice_final.pth", "--output", tmp_path / "run")
    call("export", tmp_path / "run", "--format", "official", "--output", tmp_path / "out")
    again = load_file(tmp_path / "out/model.safetensors")
    assert again.keys() == golden.keys() and sum("embeddings." in name for name in again) == 4
    for name, array in golden.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    call("import", tmp_path / "out", "--output", tmp_path / "second")
    assert rice_jax.load(tmp_path / "second").fingerprint == rice_jax.load(tmp_path / "run").fingerprint


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_are_converted_and_it_is_said(
    dtype: str, golden: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {name: array.astype(archives._dtype(dtype)) for name, array in golden.items()}
    torch_files.write_state_dict(tmp_path / "rice_final.pth", kept)
    call("import", tmp_path / "rice_final.pth", "--output", tmp_path / "run")
    assert f"tensors ({dtype}) converted to float32" in capsys.readouterr().out
    params = rice_jax.load(tmp_path / "run").params
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}
    np.testing.assert_array_equal(
        params["encoder"]["proj"], kept["image_encoder.model.proj"].astype(np.float32), err_msg=dtype
    )


# --- In: what is refused ---


def refused(source: Path, tmp_path: Path, *options: object) -> str:
    """The message; nothing must have been written."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r".+") as error:
        call("import", source, "--output", tmp_path / "refused", *options)
    assert sorted(tmp_path.iterdir()) == before
    return str(error.value)


def test_all_faults_of_a_file_are_told_together_and_nothing_is_written(
    golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    tensors = dict(golden)
    encoder = "image_encoder.model"
    del tensors[f"{encoder}.ln_pre.weight"]
    tensors["image_encoder.model.extra"] = np.zeros(3, np.float32)
    tensors[f"{encoder}.proj"] = tensors[f"{encoder}.proj"].T
    block = f"{encoder}.transformer.resblocks.1"
    tensors[f"{block}.mlp.c_fc.weight"] = tensors[f"{block}.mlp.c_fc.weight"].T
    tensors[f"{block}.ln_1.bias"] = np.zeros(64, np.int64)
    tensors[f"{block}.ln_2.bias"] = np.full(64, np.nan, np.float32)
    tensors[f"{block}.ln_2.weight"] = np.full(64, 1e300)
    torch_files.write_state_dict(tmp_path / "rice_final.pth", tensors)
    message = refused(tmp_path / "rice_final.pth", tmp_path)
    assert "(official RICE): 7 fault(s), nothing was converted" in message
    for fault in (
        f"{encoder}.ln_pre.weight: missing (shape (64,))",
        f"{encoder}.extra: no rule matches: unexpected (shape (3,))",
        f"{encoder}.proj: shape (32, 64), needs (64, 32)",
        f"{block}.mlp.c_fc.weight: shape (64, 256), needs (256, 64)",
        f"{block}.ln_1.bias: int64, needs one of float16",
        f"{block}.ln_2.bias: holds NaN or infinite numbers",
        f"{block}.ln_2.weight: holds NaN or infinite numbers",  # beyond float32
    ):
        assert fault in message


def test_a_missing_layer_is_told_tensor_by_tensor(tower: clip_files.Tensors, tmp_path: Path) -> None:
    kept = {name: array for name, array in tower.items() if "resblocks.1." not in name}
    message = refused(clip_files.write_openai(tmp_path / "clip.pt", kept), tmp_path)
    assert message.count(": missing") == 12 and "visual.transformer.resblocks.1.ln_1.weight: missing" in message
    source = clip_files.write_hugging_face(tmp_path / "hf", tower, num_hidden_layers=4)
    assert "layers: the JSON beside the file says 4, the tensors 3" in refused(source, tmp_path)


def test_one_of_q_k_v_missing_is_told(tower: clip_files.Tensors, tmp_path: Path) -> None:
    source = clip_files.write_hugging_face(tmp_path / "hf", tower)
    tensors = load_file(source / "model.safetensors")
    del tensors["vision_model.encoder.layers.2.self_attn.k_proj.bias"]
    save_file(tensors, source / "model.safetensors")
    assert "vision_model.encoder.layers.2.self_attn.k_proj.bias: missing (shape (128,))" in refused(source, tmp_path)


def test_a_tensor_that_two_rules_match_is_refused() -> None:
    with pytest.raises(ValueError, match="x: several rules match"):
        naming.find_rule("x", (naming.Rule("x", "a"), naming.Rule("**", None)))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"hidden_act": "gelu_new"}, "activation: the JSON beside the file says gelu_new, needs one of"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps: the JSON beside the file says 1e-06, needs 1e-05"),
        ({"num_attention_heads": 3}, "heads: 3 do not divide the width 128"),
        ({"hidden_size": 256}, "width: the JSON beside the file says 256, the tensors 128"),
        ({"patch_size": [8, 8]}, "patch_size: the JSON beside the file says [8, 8], needs a whole number"),
        ({"model_type": "siglip_vision_model"}, "found siglip_vision_model (says config.json)"),
    ],
)
def test_a_config_that_contradicts_the_tensors_or_our_model_is_refused(
    stated: dict[str, object], message: str, tower: clip_files.Tensors, tmp_path: Path
) -> None:
    assert message in refused(clip_files.write_hugging_face(tmp_path / "hf", tower, **stated), tmp_path)


def test_other_pixel_statistics_than_clips_are_refused(tower: clip_files.Tensors, tmp_path: Path) -> None:
    source = clip_files.write_hugging_face(tmp_path / "hf", tower)
    (source / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert "mean of pixels: the JSON beside the file says [0.5, 0.5, 0.5], needs CLIP's" in refused(source, tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["visual.layer1.0.conv1.weight", "visual.attnpool.k_proj.weight", "ln_final.weight"], "a ResNet CLIP"),
        (["text_model.embeddings.token_embedding.weight"], "a text model without a vision model"),
        (["transformer.resblocks.0.ln_1.weight", "token_embedding.weight"], "a text model without a vision model"),
        (["bert.embeddings.word_embeddings.weight"], "a text model without a vision model"),
        (["vision_model.embeddings.patch_embedding.bias", "vision_model.head.probe"], "SigLIP"),
        (["visual.trunk.blocks.0.attn.qkv.weight"], "a timm tower"),
        (["cls_token", "pos_embed", "blocks.0.attn.qkv.weight"], "a ViT by timm's or DINO's names"),
        (["embeddings.cls_token", "encoder.layer.0.norm1.weight"], "a ViT by timm's or DINO's names"),
        (["layer1.0.conv1.weight", "fc.weight"], "a ResNet"),
        (["visual.attn_pool.query", "visual.conv1.weight"], "CoCa"),
        (["image_encoder.model.proj", "transformer.transformer.transformer.layers.2.ln_1.bias"], "more than one pair"),
        (["something"], "no model that is known here (something, ...)"),
    ],
)
def test_other_models_are_told_apart_by_name(names: list[str], message: str, tmp_path: Path) -> None:
    save_file({name: np.zeros(2, np.float32) for name in names}, tmp_path / "model.safetensors")
    assert message in refused(tmp_path / "model.safetensors", tmp_path)


def test_an_output_that_holds_something_is_refused_and_left_alone(tower: clip_files.Tensors, tmp_path: Path) -> None:
    clip_files.write_openai(tmp_path / "clip.pt", tower)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    for command in (["import", tmp_path / "clip.pt"], ["export", tmp_path, "--format", "official"]):
        with pytest.raises(ValueError, match=r"needs an empty or new folder|is no run"):
            call(*command, "--output", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_command_ends_with_one_line_and_a_status(tmp_path: Path) -> None:
    (tmp_path / "cut.pt").write_bytes(b"PK\3\4")
    command = [sys.executable, "-m", "rice_jax.weights", "import", str(tmp_path / "cut.pt"), "--output"]
    found = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert found.returncode == 1 and found.stderr.count("\n") == 1 and "cut short" in found.stderr
    with pytest.raises(SystemExit, match="2"):
        parse(["import", str(tmp_path / "cut.pt")])


# --- The start of a run ---


def smoke_sized(data: Path, **changes: Any) -> Any:
    """The smoke config with an encoder of clip_files' size."""
    config = smoke_config(data, num_updates=3)
    config.data.image_size, config.data.resize = 24, 26
    config.model.update(
        {"patch_size": 8, "width": 128, "layers": 3, "heads": 2, "hidden": 512, "embedding": 48, "decoder_heads": 8}
    )
    config.update(changes)
    return config


def empty_state(config: Any, mesh: jax.sharding.Mesh) -> step.State:
    """A state of a config with ones everywhere, which no initialiser gives."""
    abstract = step.abstract_state(build_model(config), config, mesh)
    return jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), abstract)


def start(config: Any, workdir: Path) -> tuple[Any, list[str]]:
    workdir.mkdir(exist_ok=True)
    state, notes = initialise(empty_state(config, official.mesh_of(1, 1)), config, workdir)
    return jax.device_get(state.params), notes


def all_ones(tree: Any) -> bool:
    return all((x == 1).all() for x in jax.tree.leaves(tree))


def test_a_start_from_clip_is_the_papers_initial_model(tower: clip_files.Tensors, tmp_path: Path) -> None:
    """SPEC 5.8: encoder and both decoder layers from CLIP, all else as a new model has it."""
    clip_files.write_openai(tmp_path / "clip.pt", tower)
    config = smoke_sized(tmp_path, init_from=str(tmp_path / "clip.pt"))
    params, notes = start(config, tmp_path / "run")
    back = naming.invert(naming.flattened(params), naming.OPENAI)
    for name, array in tower.items():
        np.testing.assert_array_equal(back[f"visual.{name}"], array, err_msg=name)
    official_names = naming.invert(naming.flattened(params))
    for layer, block in ((0, 1), (1, 2)):
        names = [name for name in tower if f"resblocks.{block}." in name]
        assert len(names) == 12
        for name in names:
            ours = name.replace(f"resblocks.{block}", f"transformer.layers.{layer}")
            np.testing.assert_array_equal(official_names[f"transformer.{ours}"], tower[name])
    as_new = {name: params["decoder"][name] for name in ("pooler_norm", "dense", "match")}
    assert all_ones(as_new | {"scale": params["logit_scale"], "rec": params["reconstruction"]})
    assert any("decoder's layers start as the encoder's last two blocks" in note for note in notes)


def test_a_start_from_an_official_model_takes_all_of_it(golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    torch_files.write_state_dict(tmp_path / "rice_final.pth", golden)
    config = smoke_sized(tmp_path, init_from=str(tmp_path / "rice_final.pth"))
    config.data.image_size = 50
    config.model.update({"patch_size": 10, "width": 64, "heads": 1, "hidden": 256, "embedding": 32})
    params, _ = start(config, tmp_path / "run")
    again = naming.invert(naming.flattened(params))
    assert len(again) == len(golden) - 4
    for name in again:
        np.testing.assert_array_equal(again[name], golden[name], err_msg=name)
    kept = read_unused(tmp_path / "run")
    assert len(kept) == 4 and all("embeddings." in name for name in kept)

    config.model.decoder_heads = 4
    params, notes = start(config, tmp_path / "run")
    assert all_ones(params["reconstruction"]) and params["reconstruction"]["conv1_kernel"].shape == (4, 2)
    again = naming.invert(naming.flattened(params))
    np.testing.assert_array_equal(again["transformer.heads.vim.weight"], golden["transformer.heads.vim.weight"])
    assert "the rec head of PFR starts anew: model.decoder_heads is 8 there, 4 here" in notes


def test_a_start_with_other_sizes_names_every_field(tower: clip_files.Tensors, tmp_path: Path) -> None:
    clip_files.write_openai(tmp_path / "clip.pt", tower)
    config = smoke_config(tmp_path, init_from=str(tmp_path / "clip.pt"))
    config.model.activation = "gelu"
    fields = r"(?s)model.patch_size: 8 there, 16 here.*model.width: 128 there, 32 here.*model.layers: 3 there, 2 here"
    with pytest.raises(ValueError, match=rf"{fields}.*model.hidden.*model.embedding.*model.activation: 'quick_gelu'"):
        start(config, tmp_path / "run")


def test_a_start_with_another_image_size_resizes_positions(tower: clip_files.Tensors, tmp_path: Path) -> None:
    clip_files.write_openai(tmp_path / "clip.pt", tower)
    config = smoke_sized(tmp_path, init_from=str(tmp_path / "clip.pt"))
    config.data.image_size = 32
    params, notes = start(config, tmp_path / "run")
    assert params["encoder"]["positional_embedding"].shape == (17, 128)
    assert any("24 px to 32" in note for note in notes)


def test_an_average_starts_as_the_weights_and_in_a_buffer_of_its_own(tower: clip_files.Tensors, tmp_path: Path) -> None:
    clip_files.write_openai(tmp_path / "clip.pt", tower)
    config = smoke_sized(tmp_path, init_from=str(tmp_path / "clip.pt"))
    config.optimizer.ema_decay = 0.9
    started, _ = initialise(empty_state(config, official.mesh_of(2, 2)), config, tmp_path)
    for ours, average in zip(jax.tree.leaves(started.params), jax.tree.leaves(started.average), strict=True):
        np.testing.assert_array_equal(ours, average)
        assert ours is not average and ours.sharding == average.sharding
    kernel = started.params["encoder"]["resblocks"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 128, 256)  # sharded as before


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


def test_a_run_starts_from_imported_weights_and_goes_on_without_being_told_again(
    trained: tuple[Path, Path], converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported, run = trained
    # The first update has rate 0 (SPEC 7.4), and the second moves nothing by more than the rate and the decay.
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


# --- Out ---


def test_an_official_export_of_a_run_has_every_tensor_and_a_card(
    trained: tuple[Path, Path], converted: Path, tmp_path: Path
) -> None:
    imported, run = trained
    evaluate.evaluate(evaluate.parse(["--workdir", str(run), "--data", str(converted), "--split", "val"]))
    call("export", run, "--format", "official", "--output", tmp_path / "out")
    call("export", imported, "--format", "official", "--output", tmp_path / "start")
    found, started = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "start"))
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in started.items()}
    for name in started:  # the embeddings came through the training as they were
        assert np.array_equal(found[name], started[name]) == ("embeddings." in name), name
    assert read_source(tmp_path / "out").config.model == rice_jax.load(run).config.model
    card = (tmp_path / "out/README.md").read_text()
    assert open_dataset(converted).content_hash in card
    assert rice_jax.load(run).fingerprint in card
    assert "| evaluation-val | recall@1 |" in card and '"init_from"' in card and str(imported) in card
    assert "none: not trained here" in (tmp_path / "start/README.md").read_text()


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
    # What no tensor shows comes back from the config beside them.
    call("import", tmp_path / "out", "--output", tmp_path / "again")
    call("export", tmp_path / "run", "--format", "huggingface", "--output", tmp_path / "hf")
    call("import", tmp_path / "hf", "--output", tmp_path / "encoder")
    run, again, encoder = (rice_jax.load(tmp_path / name) for name in ("run", "again", "encoder"))
    assert run.fingerprint == again.fingerprint and run.config.model == again.config.model
    for name in ("heads", "activation", "hidden"):
        assert encoder.config.model[name] == run.config.model[name]
    jax.tree.map(np.testing.assert_array_equal, run.params["encoder"], encoder.params["encoder"])


def test_a_hugging_face_export_has_the_names_and_preparation_of_theirs(
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
    """The programs themselves are test_exports'."""
    monkeypatch.setattr(exports, "export_programs", lambda m, folder: (folder / "of").write_text(m.fingerprint))
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
    m = rice_jax.Model(config, net, params, official.mesh_of(1, 1), batch_size=8)
    with pytest.raises(ValueError, match=r"no place in the official code: encoder/stem"):
        official_tensors(m, {})
    with pytest.raises(ValueError, match=r"CLIP has no convolutional stem"):
        write_huggingface(m, {}, tmp_path)


def test_an_export_that_reads_back_otherwise_is_not_kept(
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


def test_a_pth_without_torch_is_a_hint(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"--format pth needs torch: pip install 'rice_jax\[torch\]'"):
        call("export", trained[0], "--format", "pth", "--output", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- What is there ---


def test_show_says_what_would_go_where(
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
        "import resource, sys; from rice_jax import weights; weights.main(weights.parse(sys.argv[1:]));"
        "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime, used.ru_maxrss)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, "import", tmp_path / "ViT-B-32.pt", "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, kilobytes = map(float, found.stdout.split()[-2:])
    assert seconds < 20  # of processor time: beside other work a clock tells of that work
    assert kilobytes * 1024 < 3e9

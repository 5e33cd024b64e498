"""Weights of every kind are read: the same embeddings whatever the file, and one message for all faults."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rice_jax
from rice_jax.models.arrays import MEAN, STD, apply, unit
from rice_jax.weights.model_config import hugging_face_model
from rice_jax.weights.readers import read_source
from tests import clip_files, official, torch_files
from tests.weights.conftest import GOLDEN, call

PICTURES = np.random.default_rng(1).integers(0, 256, (3, 24, 24, 3), np.uint8)
NORMALISED = (PICTURES / 255 - np.array(MEAN)) / np.array(STD)


def gelu(z: np.ndarray) -> np.ndarray:
    return z * (1 + np.vectorize(math.erf)(z / 2**0.5)) / 2


# --- Embeddings ---

WRITERS: dict[str, Callable[[Path, clip_files.Tensors], Path]] = {
    "openai": clip_files.write_openai,
    "hugging face, vision": clip_files.write_hugging_face,
    "hugging face, whole": lambda path, t: clip_files.write_hugging_face(path, t, whole=True),
    "open_clip": lambda path, t: clip_files.write_open_clip(path, t, quick_gelu=True),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_kind_of_clip_file_gives_the_embeddings_of_the_plain_definition(
    writer: str, tower: clip_files.Tensors, tmp_path: Path
) -> None:
    call("import", WRITERS[writer](tmp_path / "source", tower), "--output", tmp_path / "out")
    loaded = rice_jax.load(tmp_path / "out")
    np.testing.assert_allclose(
        loaded.encode_images(PICTURES), clip_files.embed(tower, NORMALISED, heads=2), atol=2e-6, rtol=0
    )


def test_official_files_give_the_official_embeddings(tmp_path: Path) -> None:
    golden = official.load(GOLDEN / "rice_w64.npz")
    tensors = golden.group("param/")
    torch_files.write_state_dict(tmp_path / "rice_final.pth", tensors)
    # A training on several GPUs saves the wrapper's names (docs/official.md 15.1).
    torch_files.write_state_dict(tmp_path / "wrapped.pth", {f"module.{name}": x for name, x in tensors.items()})
    for name in ("rice_final", "wrapped"):
        call("import", tmp_path / f"{name}.pth", "--output", tmp_path / name)
    loaded = rice_jax.load(tmp_path / "rice_final")
    assert loaded.config.model.decoder_heads == 8 and loaded.config.loss.pmd and loaded.config.loss.pfr
    assert loaded.fingerprint == rice_jax.load(tmp_path / "wrapped").fingerprint
    encode = jax.jit(lambda params, images: apply(loaded.net.encoder, params, images))
    tokens, pooled = encode(loaded.params["encoder"], golden.batch["image"])
    for ours, name in ((tokens, "image_tokens"), (unit(pooled), "image_embedding")):
        expected = golden.arrays[f"out/{name}"]
        assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


def test_heads_and_activation_are_read_from_hugging_faces_config(tower: clip_files.Tensors, tmp_path: Path) -> None:
    source = clip_files.write_hugging_face(tmp_path / "hf", tower, num_attention_heads=4, hidden_act="gelu")
    call("import", source, "--output", tmp_path / "out")
    expected = clip_files.embed(tower, NORMALISED, heads=4, activation=gelu)
    np.testing.assert_allclose(rice_jax.load(tmp_path / "out").encode_images(PICTURES), expected, atol=2e-6)


def test_fields_that_hugging_faces_config_leaves_out_are_vit_b_32s() -> None:
    config = {"model_type": "clip", "vision_config": {}, "projection_dim": 48}
    stated = hugging_face_model(config, {})
    assert stated.sizes == {
        "width": 768, "hidden": 3072, "layers": 12, "heads": 12, "image_size": 224, "patch_size": 32, "embedding": 48,
    }  # fmt: skip
    assert stated.activation == "quick_gelu"


def test_heads_and_activation_are_read_from_open_clips_config(tower: clip_files.Tensors, tmp_path: Path) -> None:
    source = clip_files.write_open_clip(tmp_path / "oc", tower, quick_gelu=False, head_width=32)
    call("import", source, "--output", tmp_path / "out")
    expected = clip_files.embed(tower, NORMALISED, heads=4, activation=gelu)
    np.testing.assert_allclose(rice_jax.load(tmp_path / "out").encode_images(PICTURES), expected, atol=2e-6)


def test_an_activation_that_no_file_states_must_be_given(tower: clip_files.Tensors, tmp_path: Path) -> None:
    save_file(clip_files.visual(tower), tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="activation: the file does not say; import it with --activation"):
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


def test_positions_are_resized_for_another_image_size_with_a_note(
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
    """Returns the mean of the four middle places of a 3x3 grid that Keys' cubic filter (a = -1/2) doubled.

    Taps beyond the border are left out, and the weights of the others are scaled to sum to 1.
    """

    def cubic(x: float) -> float:
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    rows = []
    for centre in (0.75, 1.25):  # places 2 and 3 of six, on the scale of three
        taps = np.array([cubic(centre - tap) for tap in range(3)])
        rows.append(taps / taps.sum())
    middle = np.mean(rows, axis=0)
    return np.einsum("i,j,ijd->d", middle, middle, grid)


# --- Official heads, names, precision ---


def parts(golden: dict[str, np.ndarray], head: str) -> dict[str, np.ndarray]:
    """Returns the official checkpoint of a model with other heads (docs/official.md 3.4, 7.7)."""
    if head == "contrastive":
        kept = {name: array for name, array in golden.items() if name.startswith("image_encoder.")}
        scales = {"transformer.contrastive_norm.norm_s": np.array([3.5], np.float32)}
        return kept | scales | {"transformer.logit_scale": np.array(4, np.float32)}
    without = {"pmd": ("heads.rec",), "none": ("heads.",)}[head]
    return {name: array for name, array in golden.items() if not any(word in name for word in without)}


@pytest.mark.parametrize(
    ("head", "pmd", "pfr", "scale"), [("contrastive", 0, 0, 3.5), ("pmd", 1, 0, 4.0), ("none", 0, 0, 4.0)]
)
def test_official_files_of_every_stage_are_imported_and_exported_unchanged(
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


def test_the_export_of_an_imported_official_model_equals_the_imported_file(
    golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The four unused decoder embeddings are compared too (docs/official.md 5.8)."""
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
def test_other_precisions_are_converted_with_a_note(
    dtype: str, golden: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {name: array.astype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)) for name, array in golden.items()}
    torch_files.write_state_dict(tmp_path / "rice_final.pth", kept)
    call("import", tmp_path / "rice_final.pth", "--output", tmp_path / "run")
    assert f"tensors ({dtype}) converted to float32" in capsys.readouterr().out
    params = rice_jax.load(tmp_path / "run").params
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}
    np.testing.assert_array_equal(
        params["encoder"]["proj"], kept["image_encoder.model.proj"].astype(np.float32), err_msg=dtype
    )


# --- Refused files ---


def refused(source: Path, tmp_path: Path, *options: object) -> str:
    """Returns the error message of an import, which must not write anything."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r".+") as error:
        call("import", source, "--output", tmp_path / "refused", *options)
    assert sorted(tmp_path.iterdir()) == before
    return str(error.value)


def test_all_faults_of_a_file_are_reported_together_and_nothing_is_written(
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
    assert "(official RICE): found 7 faults, and nothing was converted; correct the file" in message
    for fault in (
        f"{encoder}.ln_pre.weight: missing (shape (64,))",
        f"{encoder}.extra: no rule matches: unexpected (shape (3,))",
        f"{encoder}.proj: shape (32, 64), needs (64, 32)",
        f"{block}.mlp.c_fc.weight: shape (64, 256), needs (256, 64)",
        f"{block}.ln_1.bias: int64, needs one of float16",
        f"{block}.ln_2.bias: contains NaN or infinite numbers",
        f"{block}.ln_2.weight: contains NaN or infinite numbers",  # beyond float32
    ):
        assert fault in message


def test_a_missing_layer_is_reported_tensor_by_tensor(tower: clip_files.Tensors, tmp_path: Path) -> None:
    kept = {name: array for name, array in tower.items() if "resblocks.1." not in name}
    message = refused(clip_files.write_openai(tmp_path / "clip.pt", kept), tmp_path)
    assert message.count(": missing") == 12 and "visual.transformer.resblocks.1.ln_1.weight: missing" in message
    source = clip_files.write_hugging_face(tmp_path / "hf", tower, num_hidden_layers=4)
    assert "layers: the JSON beside the file says 4, the tensors 3" in refused(source, tmp_path)


def test_a_missing_k_projection_is_reported(tower: clip_files.Tensors, tmp_path: Path) -> None:
    source = clip_files.write_hugging_face(tmp_path / "hf", tower)
    tensors = load_file(source / "model.safetensors")
    del tensors["vision_model.encoder.layers.2.self_attn.k_proj.bias"]
    save_file(tensors, source / "model.safetensors")
    assert "vision_model.encoder.layers.2.self_attn.k_proj.bias: missing (shape (128,))" in refused(source, tmp_path)


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
def test_other_models_are_recognised_by_their_tensors_names(names: list[str], message: str, tmp_path: Path) -> None:
    save_file({name: np.zeros(2, np.float32) for name in names}, tmp_path / "model.safetensors")
    assert message in refused(tmp_path / "model.safetensors", tmp_path)

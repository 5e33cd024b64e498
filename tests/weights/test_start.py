"""A new run starts from the weights of a file."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rice_jax.models.rice import build_model
from rice_jax.training import step
from rice_jax.weights import naming
from rice_jax.weights.readers import read_unused
from rice_jax.weights.start import initialise
from tests import clip_files, official, torch_files
from tests.test_train import smoke_config


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
    """Returns a state with ones everywhere, which no initialiser makes."""
    abstract = step.abstract_state(build_model(config), config, mesh)
    return jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), abstract)


def start(config: Any, workdir: Path) -> tuple[Any, list[str]]:
    workdir.mkdir(exist_ok=True)
    state, notes = initialise(empty_state(config, official.mesh_of(1, 1)), config, workdir)
    return jax.device_get(state.params), notes


def all_ones(tree: Any) -> bool:
    return all((x == 1).all() for x in jax.tree.leaves(tree))


def test_a_start_from_clip_is_the_papers_initial_model(tower: clip_files.Tensors, tmp_path: Path) -> None:
    """Encoder and both decoder layers are CLIP's, all else is a new model's (docs/official.md 5.8)."""
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

"""Matching at test time against a plain loop of whole decoder passes, one pair at a time (docs/official.md 10.4)."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from data_pipeline.format.reader import Split, open_dataset
from data_pipeline.input.batches import clip_batches, image_batches
from rice_jax import evaluate
from rice_jax.checkpoints.run_folder import write_config
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import to_json
from rice_jax.models.arrays import normalise
from rice_jax.models.rice import Rice, build_model
from rice_jax.parallel.mesh import path_name
from rice_jax.retrieval import evaluation, galleries, inference, matching, recall
from rice_jax.retrieval.embeddings import EmbeddingStore
from rice_jax.retrieval.model import Model, _on_mesh, frame_options, load
from rice_jax.training import step
from tests import official


def random_model(mesh: jax.sharding.Mesh, *, batch_size: int = 8, **changes: Any) -> Model:
    """Returns the smoke model with large random weights, norms and biases; initial ones give nearly equal scores."""
    config = smoke.get_config()
    config.unlock()
    config.update_from_flattened_dict(changes)
    net, rng = build_model(config), np.random.default_rng(0)

    def draw(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        about_one = path_name(path).endswith("/scale")
        return jax.device_put((about_one + 0.3 * rng.standard_normal(x.shape)).astype(x.dtype), x.sharding)

    params = jax.tree_util.tree_map_with_path(draw, step.abstract_state(net, config, mesh).params)
    return Model(config, net, params, mesh, batch_size=batch_size)


def save_run(model: Model, workdir: Path) -> Path:
    """Writes the model as a run without updates, and returns its folder."""
    write_config(workdir, to_json(model.config))
    abstract = step.abstract_state(model.net, model.config, model.mesh)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    with Checkpoints(workdir, kept=1) as checkpoints:
        checkpoints.save(0, state._replace(params=model.params), {})
    return workdir


@functools.partial(jax.jit, static_argnums=(0, 1))
def plain_score(net: Rice, raw: bool, params: Any, frames: jax.Array, mask: jax.Array, image: jax.Array) -> Any:
    """One pair: all T queries through self and cross layer, then docs/official.md 5.5, 5.6 and 10.4 to the letter."""
    encode = lambda pictures: net.encoder.apply({"params": params["encoder"]}, pictures)[0]
    image_tokens, clip_tokens = encode(normalise(image[None])), encode(normalise(frames, mask))
    clip_tokens = clip_tokens.reshape(1, -1, clip_tokens.shape[-1])
    key_mask = jnp.repeat(mask > 0, image_tokens.shape[1])[None]
    decoder = functools.partial(net.decoder.apply, {"params": params["decoder"]})
    if not raw:
        return decoder(image_tokens, clip_tokens, key_mask)[0][0] / 10
    x, keys_values = decoder(image_tokens, method="image_tokens"), decoder(clip_tokens, method="keys_values")
    weights = jax.nn.softmax(decoder(x, keys_values, key_mask, method="scores"), axis=-1)
    h = decoder(decoder(x, weights, keys_values, method="cross_tokens"), method="pooled")[0, 0]
    return jnp.sum(h * params["decoder"]["match"])


@dataclasses.dataclass
class Shop:
    """The test split's pictures, and the gallery of each clip."""

    split: Split
    frames: np.ndarray
    mask: np.ndarray
    images: np.ndarray
    galleries: list[np.ndarray]
    gallery_of: np.ndarray


@pytest.fixture(scope="module")
def shop(converted: Path) -> Shop:
    split = open_dataset(converted).split("test")
    options = frame_options(smoke.get_config().data, train=False)
    names = sorted(split.galleries)
    with (
        clip_batches(split, range(split.num_clips), options, split.num_clips, threads=0) as clips,
        image_batches(split, range(split.num_images), options, split.num_images, threads=0) as images,
    ):
        batch, pictures = next(clips), next(images)["image"]
    return Shop(
        split,
        batch["frames"],
        batch["mask"],
        pictures,
        [np.asarray(split.galleries[name]) for name in names],
        np.array([names.index(split.gallery_name(row)) for row in range(split.num_clips)]),
    )


def scores_of(model: Model, shop: Shop, *, raw: bool = False, store: Path | None = None) -> np.ndarray:
    return matching.score_galleries(
        model, shop.split, np.arange(shop.split.num_clips), np.arange(shop.split.num_images), galleries=shop.galleries,
        gallery_of=shop.gallery_of, raw=raw, store=EmbeddingStore(store), show_progress=False,
    )[2]  # fmt: skip


@pytest.mark.parametrize("raw", [False, True])
def test_scores_equal_a_plain_loop_over_whole_decoder_passes(shop: Shop, raw: bool) -> None:
    model = random_model(official.mesh_of(1, 1), batch_size=2)  # three clips: the last batch is half full
    scores = scores_of(model, shop, raw=raw)
    spread = []
    for clip, gallery in enumerate(shop.gallery_of):
        expected = [
            float(plain_score(model.net, raw, model.params, shop.frames[clip], shop.mask[clip], shop.images[row]))
            for row in shop.galleries[gallery]
        ]
        size = len(expected)
        np.testing.assert_allclose(scores[clip, :size], expected, atol=1e-5, rtol=1e-5)
        assert np.isneginf(scores[clip, size:]).all()
        spread.append(np.ptp(expected))
    assert min(spread) > 1e-2  # the scores differ
    assert len(shop.galleries) == 2 and 0 < shop.mask.sum() < shop.mask.size  # several livestreams, padding frames


def test_scores_are_the_same_in_several_steps(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(official.mesh_of(1, 1), batch_size=4)
    whole = scores_of(model, shop)
    monkeypatch.setattr(galleries, "AT_ONCE", 2)  # galleries of two and three
    steps = scores_of(model, shop)
    assert whole.shape[1] == steps.shape[1] == 4
    np.testing.assert_allclose(steps, whole, atol=1e-6)


def test_scores_are_the_same_on_a_mesh_that_splits_batch_and_parameters(shop: Shop) -> None:
    one, many = (scores_of(random_model(mesh), shop) for mesh in (official.mesh_of(1, 1), official.mesh_of(2, 4)))
    np.testing.assert_allclose(many, one, atol=1e-6)


def test_match_in_python_scores_every_clip_against_every_image(shop: Shop) -> None:
    model = random_model(official.mesh_of(2, 1), batch_size=2)
    scores = model.match(shop.frames, shop.mask, shop.images)
    assert scores.shape == (3, len(shop.images)) and scores.dtype == np.float32
    by_gallery = scores_of(model, shop)
    for clip, gallery in enumerate(shop.gallery_of):
        rows = shop.galleries[gallery]
        np.testing.assert_allclose(by_gallery[clip, : len(rows)], scores[clip, rows], atol=1e-6)
    raw = model.match(shop.frames[:1], shop.mask[:1], shop.images[:1], raw=True)
    expected = plain_score(model.net, True, model.params, shop.frames[0], shop.mask[0], shop.images[0])
    np.testing.assert_allclose(raw, [[expected]], atol=1e-5, rtol=1e-5)
    assert model.match(shop.frames[:0], shop.mask[:0], shop.images).shape == (0, len(shop.images))
    assert model.match(shop.frames, shop.mask, shop.images[:0]).shape == (3, 0)


def test_padding_frames_do_not_matter(shop: Shop) -> None:
    model = random_model(official.mesh_of(1, 1))
    noise = np.random.default_rng(0).integers(0, 256, shop.frames.shape, np.uint8)
    noisy = np.where(shop.mask[..., None, None, None] > 0, shop.frames, noise)
    assert (noisy != shop.frames).any()
    for encode in (model.match, lambda frames, mask, _: model.encode_clips(frames, mask)):
        np.testing.assert_array_equal(*(encode(f, shop.mask, shop.images) for f in (shop.frames, noisy)))


def test_official_logits_are_ten_times_the_cosine_of_positives_and_mined_clips(golden_file: Path) -> None:
    golden = official.load(golden_file)
    if "out/pmd_logits" not in golden.arrays:
        pytest.skip("this golden file holds no matching logits")
    clips = golden.arrays["out/pmd_negative_clips"]
    clips = np.concatenate([np.arange(len(clips))[:, None], clips], axis=1)
    match = jax.jit(inference.score_all_pairs, static_argnums=(0, 1))
    inputs = (golden.params, golden.batch["frames"], golden.batch["mask"], golden.batch["image"])
    cosine, raw = (np.asarray(match(golden.net, raw, *inputs)) for raw in (False, True))
    images = np.arange(len(clips))[:, None]
    logits = golden.arrays["out/pmd_logits"]
    np.testing.assert_allclose(10 * cosine[clips, images], logits, atol=1e-4 * np.abs(logits).max(), rtol=0)
    if "out/pmd_pooled" in golden.arrays:
        expected = golden.arrays["out/pmd_pooled"] @ golden.arrays["param/transformer.heads.vim.weight"][0]
        np.testing.assert_allclose(raw[clips, images], expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without updates, with random weights."""
    model = random_model(official.mesh_of(8, 1), **{"data.path": str(converted)})
    return save_run(model, tmp_path_factory.mktemp("run"))


def call(run: Path, data: Path, *more: str) -> None:
    evaluate.evaluate(evaluate.parse(["--workdir", str(run), "--data", str(data), *more]))


@pytest.mark.parametrize("score", ["matching", "raw-matching"])
def test_matching_and_the_sum_are_reported_beside_the_embedding(
    run: Path, shop: Shop, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], score: str
) -> None:
    call(run, converted, "--output", str(tmp_path / "embedding"))
    capsys.readouterr()
    call(run, converted, "--output", str(tmp_path / "both"), "--score", score)
    table = capsys.readouterr().out
    alone, both = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("embedding", "both"))
    assert (alone.pop("score"), both["score"]) == ("embedding", score)
    assert alone.pop("rankings") != both["rankings"]
    assert {name: both[name] for name in alone} == alone

    # The same figures from Model's own methods and a sort.
    model = load(run)
    matches = model.match(shop.frames, shop.mask, shop.images, raw=score == "raw-matching")
    cosines = model.encode_clips(shop.frames, shop.mask) @ model.encode_images(shop.images).T
    truth = shop.split.truth_by_clip
    lines = [json.loads(line) for line in (tmp_path / "both" / "rankings.jsonl").read_text().splitlines()]
    for prefix, title, scores in (
        ("", "embedding", cosines),
        ("matching_", "matching", matches),
        ("sum_", "their sum", matches + cosines),
    ):
        hits = 0
        for clip, line in enumerate(lines):
            rows = shop.galleries[shop.gallery_of[clip]]
            rows = rows[np.argsort(-scores[clip, rows], kind="stable")]
            assert [name for name, _ in line[f"{prefix}top"]] == [shop.split.image_ids[row] for row in rows]
            np.testing.assert_allclose([x for _, x in line[f"{prefix}top"]], scores[clip, rows], atol=2e-5)
            is_true = [shop.split.image_ids[row] in truth[line["clip"]] for row in rows]
            assert line[f"{prefix}rank"] == 1 + is_true.index(True)
            hits += is_true[0]
        assert both[f"{prefix}recall@1"] == pytest.approx(100 * hits / 3)
        low, high = recall.wilson_interval(100 * hits / 3, 3)
        assert (both[f"{prefix}recall@1_low"], both[f"{prefix}recall@1_high"]) == pytest.approx((low, high))
        (row,) = (row for row in table.splitlines() if row.strip().startswith(title))
        assert f"{100 * hits / 3:.2f}" in row and f"{low:.1f} to {high:.1f}" in row


def test_an_interrupted_matching_continues_with_the_missing_blocks(
    run: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(run, converted, "--output", str(tmp_path / "whole"), "--score", "matching")
    monkeypatch.setattr(EmbeddingStore, "BLOCK", 1)
    once = EmbeddingStore._write

    def interrupted(self: Any, kinds: Any, arrays: Any, block: slice) -> None:
        if "matches" in kinds and block.start == 2:
            raise KeyboardInterrupt
        once(self, kinds, arrays, block)

    arguments = (run, converted, "--output", str(tmp_path / "blocks"), "--score", "matching")
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingStore, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(*arguments)
    assert not (tmp_path / "blocks" / "metrics.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "blocks" / "embeddings").glob("*/*.npy")}
    assert sum(path.name.startswith("matches") for path in kept) == 2
    call(*arguments)  # one of three clips is missing
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole, pieces = ((tmp_path / name / "metrics.json").read_text() for name in ("whole", "blocks"))
    assert whole == pieces
    call(*arguments[:-2])  # the blocks of matching suffice for the embedding
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_matching_compiles_once_for_all_batches_and_galleries(shop: Shop) -> None:
    model = random_model(official.mesh_of(1, 1), batch_size=1)
    _on_mesh.clear_cache()  # of programs that another test of this process compiled
    scores_of(model, shop)
    assert _on_mesh._cache_size() == 2  # images, and clips


def test_a_model_of_icl_alone_is_refused_before_anything_is_encoded(shop: Shop, tmp_path: Path) -> None:
    model = random_model(official.mesh_of(1, 1), **{"loss.pmd": 0.0, "loss.pfr": 0.0})
    with pytest.raises(ValueError, match="this model has no decoder"):
        evaluation.evaluate_split(model, shop.split, score="matching", store=EmbeddingStore(tmp_path))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="this model has no decoder"):
        model.match(shop.frames, shop.mask, shop.images)
    model = random_model(official.mesh_of(1, 1), **{"loss.pmd": 0.0})  # its decoder was trained by PFR alone
    with pytest.raises(ValueError, match=r"this model has not learned it \(loss.pmd is 0 in its config\)"):
        evaluation.evaluate_split(model, shop.split, score="matching")
    with pytest.raises(ValueError, match="needs one of embedding, matching, raw-matching"):
        evaluation.evaluate_split(model, shop.split, score="cosine")

"""Against torch and transformers themselves, at ViT-B/32 size; both are optional."""

import collections
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import rice_jax
from configs import default
from data_pipeline.input.decode import centre_crop, resize
from rice_jax.checkpoints.run_folder import write_config
from rice_jax.checkpoints.store import Checkpoints
from rice_jax.config import to_json
from rice_jax.models import arrays
from rice_jax.models.arrays import normalise
from rice_jax.models.rice import build_model
from rice_jax.retrieval.model import frame_options
from rice_jax.training import step
from rice_jax.weights import archives
from rice_jax.weights.readers import read_source, resize_positions
from rice_jax.weights.writers import preparation
from tests import official
from tests.weights.conftest import call

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed: pip install 'rice_jax[torch]'"
)
if importlib.util.find_spec("torch") is not None:
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(0)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install transformers"
)
MEAN, STD = np.array(arrays.MEAN), np.array(arrays.STD)
D, E, LAYERS, PATCH, PX, DECODER_HEADS = 768, 512, 12, 32, 224, 8


def quick_gelu(x: Any) -> Any:
    return x * torch.sigmoid(1.702 * x)


def block(heads: int, eps: float = 1e-5) -> Any:
    """Returns a block with CLIP's names; the functions below call its parts one by one."""
    mlp = collections.OrderedDict(c_fc=nn.Linear(D, 4 * D), c_proj=nn.Linear(4 * D, D))
    parts = {
        "ln_1": nn.LayerNorm(D, eps),
        "attn": nn.MultiheadAttention(D, heads, batch_first=True),
        "ln_2": nn.LayerNorm(D, eps),
        "mlp": nn.Sequential(mlp),
    }
    return nn.ModuleDict(parts)


def feed(layer: Any, x: Any) -> Any:
    return x + layer["mlp"].c_proj(quick_gelu(layer["mlp"].c_fc(layer["ln_2"](x))))


def tower(tokens: int) -> Any:
    module = nn.Module()
    module.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)
    module.positional_embedding = nn.Parameter(torch.randn(tokens, D) * 0.1)
    module.proj = nn.Parameter(torch.randn(D, E) * D**-0.5)
    module.conv1 = nn.Conv2d(3, D, PATCH, PATCH, bias=False)
    module.ln_pre, module.ln_post = nn.LayerNorm(D), nn.LayerNorm(D)
    module.transformer = nn.Module()
    module.transformer.resblocks = nn.ModuleList(block(D // 64) for _ in range(LAYERS))
    return module


def official_model() -> Any:
    """Returns a random module with the full official model's names (docs/official.md 15.1, golden/parameters.csv)."""
    tokens = (PX // PATCH) ** 2 + 1
    module = nn.Module()
    module.image_encoder = nn.Module()
    module.image_encoder.model = tower(tokens)
    module.transformer = nn.Module()
    module.transformer.logit_scale = nn.Parameter(torch.tensor(3.9))
    module.transformer.heads = nn.Module()
    module.transformer.heads.vim = nn.Linear(D, 1, bias=False)
    module.transformer.heads.rec = nn.Sequential(
        nn.Conv2d(DECODER_HEADS, DECODER_HEADS // 2, 1), nn.ReLU(), nn.Conv2d(DECODER_HEADS // 2, 1, 1), nn.ReLU()
    )
    cross = module.transformer.transformer = nn.Module()
    cross.embeddings = nn.Module()
    cross.embeddings.class_embedding = nn.Parameter(torch.randn(D))
    cross.embeddings.position_embedding = nn.Embedding(tokens, D)
    cross.embeddings.layer_norm = nn.LayerNorm(D)
    cross.transformer = nn.Module()
    cross.transformer.layers = nn.ModuleList([block(DECODER_HEADS, 1e-12), block(DECODER_HEADS)])
    cross.pooler = nn.Module()
    cross.pooler.layer_norm, cross.pooler.dense = nn.LayerNorm(D), nn.Linear(D, D, bias=False)
    for name, parameter in module.named_parameters():  # torch starts norms and biases at ones and zeros
        if parameter.ndim == 1 and "class_embedding" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def encode(module: Any, pictures: Any) -> tuple[Any, Any]:
    """Returns tokens and pooled vectors of normalised pictures [n, 3, px, px] (docs/official.md 2)."""
    x = module.conv1(pictures).flatten(2).transpose(1, 2)
    x = torch.cat([module.class_embedding.expand(len(x), 1, D), x], 1) + module.positional_embedding
    x = module.ln_pre(x)
    for layer in module.transformer.resblocks:
        y = layer["ln_1"](x)
        x = feed(layer, x + layer["attn"](y, y, y, need_weights=False)[0])
    return x, module.ln_post(x[:, 0]) @ module.proj


def forward(module: Any, clips: Any, mask: Any, images: Any) -> dict[str, np.ndarray]:
    """Returns the same as Rice.__call__, computed with torch's own attention (docs/official.md 2 to 6)."""
    n, slots = mask.shape
    with torch.no_grad():
        image_tokens, image_pooled = encode(module.image_encoder.model, images)
        frame_tokens, frame_pooled = encode(module.image_encoder.model, clips.flatten(0, 1))
        pooled = (frame_pooled.reshape(n, slots, -1) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        self_layer, cross_layer = module.transformer.transformer.transformer.layers
        y = self_layer["ln_1"](image_tokens)
        x = feed(self_layer, image_tokens + self_layer["attn"](y, y, y, need_weights=False)[0])
        tokens = image_tokens.shape[1]
        clip = frame_tokens.reshape(n, slots * tokens, D)
        padding = (mask == 0).repeat_interleave(tokens, 1)
        mixed, attention = cross_layer["attn"](
            cross_layer["ln_1"](x), clip, clip, key_padding_mask=padding, average_attn_weights=False
        )
        x = feed(cross_layer, x + mixed)
        pooler = module.transformer.transformer.pooler
        h = torch.relu(pooler.dense(pooler.layer_norm(x)[:, 0]))
        w = module.transformer.heads.vim.weight
        scaled = attention * (D // DECODER_HEADS) ** 0.5
        return {
            "image_embedding": functional.normalize(image_pooled, dim=-1).numpy(),
            "clip_embedding": functional.normalize(pooled, dim=-1).numpy(),
            "match_logit": 10 * functional.cosine_similarity(h, w).numpy(),
            "coefficients": module.transformer.heads.rec(scaled)[:, 0].softmax(-1).numpy(),
        }


Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # frames, mask, images


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Noise, a padding frame included."""
    rng = np.random.default_rng(0)
    clips, images = (rng.integers(0, 256, (2, *slots, PX, PX, 3), np.uint8) for slots in ((2,), ()))
    return clips, np.array([[1, 1], [1, 0]], np.int32), images


def normalised(pictures: np.ndarray) -> Any:
    return torch.from_numpy(np.moveaxis((pictures / 255 - MEAN) / STD, -1, -3).astype(np.float32))


def theirs(module: Any, batch: Batch) -> dict[str, np.ndarray]:
    clips, mask, images = batch
    seen = torch.from_numpy(mask)
    return forward(module, normalised(clips) * seen[..., None, None, None], seen, normalised(images))


def ours(run: Path, batch: Batch) -> dict[str, np.ndarray]:
    m = rice_jax.load(run, mesh=official.mesh_of(1, 1))
    return jax.device_get(jax.jit(m.net.apply)({"params": m.params}, *map(jnp.asarray, batch)))


def check(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        gap = np.abs(found[name] - array).max() / np.abs(array).max()
        assert gap < 1e-4, f"{name}: {gap}"  # docs/official.md 13.2


def test_the_official_model_comes_in_and_goes_out_and_computes_the_same(batch: Batch, tmp_path: Path) -> None:
    module = official_model()
    state = module.state_dict()
    assert len(state) == 189 and sum(x.numel() for x in state.values()) == 102_657_834  # golden/parameters.csv
    torch.save(collections.OrderedDict((f"module.{k}", v) for k, v in state.items()), tmp_path / "rice_final.pth")
    call("import", tmp_path / "rice_final.pth", "--output", tmp_path / "run")
    expected = theirs(module, batch)
    check(ours(tmp_path / "run", batch), expected)

    call("export", tmp_path / "run", "--format", "pth", "--output", tmp_path / "out")
    loaded = torch.load(tmp_path / "out/rice_final.pth", weights_only=True)
    second = official_model()
    second.load_state_dict(loaded, strict=True)
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name
    check(theirs(second, batch), expected)


def test_a_run_of_ours_goes_out_and_computes_the_same_in_torch(batch: Batch, tmp_path: Path) -> None:
    """Random weights of our own initialisation, at step 5, with fresh unused embeddings."""
    config = default.get_config()
    net = build_model(config)
    params = jax.jit(lambda: step.init_params(net, config, jax.random.key(0)))()
    write_config(tmp_path / "run", to_json(config))
    with Checkpoints(tmp_path / "run", kept=1) as checkpoints:
        checkpoints.save(5, step.State(np.int32(5), params, {}, {}), {})
    call("export", tmp_path / "run", "--format", "pth", "--output", tmp_path / "out")
    module = official_model()
    module.load_state_dict(torch.load(tmp_path / "out/rice_final.pth", weights_only=True), strict=True)
    check(ours(tmp_path / "run", batch), theirs(module, batch))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_clip_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    """torch.jit.save of a tower in half precision, as OpenAI's files."""

    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = tower(50).half()
            self.input_resolution = nn.Parameter(torch.tensor(PX), requires_grad=False)
            self.logit_scale = nn.Parameter(torch.tensor(4.6))
            self.heads = [1, 2, 3]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.logit_scale

    module = Clip()
    torch.jit.save(torch.jit.script(module), tmp_path / "clip.pt")
    source = read_source(tmp_path / "clip.pt")
    assert source.kind == "OpenAI CLIP" and source.config.model.activation == "quick_gelu"
    found = archives.read(tmp_path / "clip.pt").tensors
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(found[name].read(), tensor.float().numpy() if tensor.is_floating_point() else PX)


def test_positions_are_resized_as_open_clip_does_it() -> None:
    config = default.get_config()
    position = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    params = {"encoder": {"positional_embedding": position}}
    for size in (128, 336):
        resized, _ = resize_positions(params, config.copy_and_resolve_references(), size)
        grid = torch.from_numpy(position[1:]).reshape(1, 7, 7, 16).permute(0, 3, 1, 2)
        side = size // 32
        expected = functional.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
        expected = expected.permute(0, 2, 3, 1).reshape(-1, 16).numpy()
        np.testing.assert_allclose(resized["encoder"]["positional_embedding"][1:], expected, atol=1e-5)


@needs_transformers
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_opens_our_export_and_we_open_its_files(activation: str, batch: Batch, tmp_path: Path) -> None:
    import transformers

    config = transformers.CLIPVisionConfig(hidden_act=activation)  # ViT-B/32
    original = transformers.CLIPVisionModelWithProjection(config).eval()
    for parameter in original.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    original.save_pretrained(tmp_path / "theirs")
    call("import", tmp_path / "theirs", "--output", tmp_path / "run")
    call("export", tmp_path / "run", "--format", "huggingface", "--output", tmp_path / "out")
    again, report = transformers.CLIPVisionModelWithProjection.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pictures = normalised(batch[2])
    with torch.no_grad():
        expected, found = (module.eval()(pixel_values=pictures).image_embeds.numpy() for module in (original, again))
    np.testing.assert_array_equal(found, expected)
    m = rice_jax.load(tmp_path / "run", mesh=official.mesh_of(1, 1))
    encode = jax.jit(lambda params, x: arrays.apply(m.net.encoder, params, normalise(x))[1])
    pooled = encode(m.params["encoder"], jnp.asarray(batch[2]))
    check({"pooled": np.asarray(pooled)}, {"pooled": expected})


@needs_transformers
@pytest.mark.parametrize("mode", ["stretch", "keep_ratio"])
def test_the_exported_preparation_is_our_pipelines(mode: str) -> None:
    from transformers import CLIPImageProcessor

    data = default.get_config().data
    data.resize_mode = mode
    picture = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    found = CLIPImageProcessor(**preparation(data))(Image.fromarray(picture), return_tensors="np")
    options = frame_options(data, train=False)
    expected = normalised(centre_crop(resize(picture, options), options)).numpy()
    gap = np.abs(found["pixel_values"][0] - expected) * 255 * STD.min()
    assert gap.max() < 1.1  # a level, for a resize that rounds otherwise
    assert gap.mean() < 0.1

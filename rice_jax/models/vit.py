"""The network of RICE, read bottom-up: Block, VisionTransformer, MatchingDecoder, PatchReconstruction, Rice.

Letters of the shapes are SPEC 1's: n pictures or pairs, N frame slots, T tokens a picture (class token first),
D width, E embedding width, H decoder heads, S = N*T decoder keys, r image rows that query one clip.
Names of the parts are CLIP's. Parameters are plain dicts; the blocks of the encoder are stacked on a leading axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, UInt8

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's pixel statistics, SPEC 9.5
STD = (0.26862954, 0.26130258, 0.27577711)

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keeps matmuls, recomputes the rest
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _as(x: Array, row: Array) -> Array:
    """`row` repeated to x's shape; said, since tests refuse broadcasts that nobody wrote down."""
    return jnp.broadcast_to(row, x.shape).astype(x.dtype)


def normalise(
    pictures: UInt8[Array, "*n px px 3"] | Float[Array, "*n px px 3"], mask: Int[Array, "*n"] | None = None
) -> Float[Array, "*n px px 3"]:
    """Levels 0..255 to CLIP's normalised floats; pictures whose mask is 0 become zero AFTER that (SPEC 2.1).

    Floating pictures are taken as normalised already.
    """
    x = pictures
    if pictures.dtype == jnp.uint8:
        x = pictures.astype(jnp.float32) / 255
        x = (x - _as(x, jnp.array(MEAN))) / _as(x, jnp.array(STD))
    return x if mask is None else jnp.where(mask[..., None, None, None] > 0, x, 0)


def call(module: nn.Module | None, params: Any, *inputs: Any, method: str | None = None) -> Any:
    """A module, or one of its methods, on its own part of the parameters."""
    assert module is not None
    return module.apply({"params": params}, *inputs, method=method)


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """x / max(||x||, 1e-12) along the last axis (SPEC 2.5), with gradient zero, not NaN, at x = 0."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def cosines(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Products of unit vectors, each with each, float32 at the highest precision whatever the config's.

    bfloat16 products near 1 come in steps of 4e-3: coarse logits, and ties of near-equal negatives (SPEC 11, row 36).
    """
    return jnp.einsum("nd,md->nm", a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def clip_embedding(pooled: Float[Array, "n N E"], mask: Int[Array, "n N"]) -> Float[Array, "n E"]:
    """Unit vector of the mean of the real frames' raw pooled vectors (SPEC 2.5)."""
    weight = mask[..., None].astype(pooled.dtype)
    # max: a clip without a real frame cannot leave the pipeline, but 0/0 would spoil the whole batch.
    return unit((pooled * weight).sum(axis=-2) / jnp.maximum(weight.sum(axis=-2), 1))


HE = nn.initializers.variance_scaling(2.0, "fan_in", "normal", in_axis=(0, 1, 2), out_axis=3)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda z: z * jax.nn.sigmoid(1.702 * z),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


class LayerNorm(nn.Module):
    """Statistics in float32 with biased variance, output in x's dtype (SPEC 2.3).

    Two passes, unlike flax's default: E[x^2] - E[x]^2 loses what an epsilon of 1e-12 is there for.
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return (y * _as(y, scale) + _as(y, bias)).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention in parts, so that keys and values are projected once and used by many queries.

    in_proj's columns are q, k, v; heads are contiguous blocks of channels (SPEC 2.3). Softmax in float32.
    """

    width: int
    heads: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        init = nn.initializers.normal(self.width**-0.5)
        self.in_proj_kernel = self.param("in_proj_kernel", init, (self.width, 3 * self.width))
        self.in_proj_bias = self.param("in_proj_bias", nn.initializers.zeros, (3 * self.width,))
        self.out_proj = nn.Dense(self.width, dtype=self.dtype, kernel_init=init)

    def project(self, x: Float[Array, "*n D"], start: int, stop: int) -> Float[Array, "*n c"]:
        """Parts start..stop of (q, k, v), side by side."""
        columns = slice(start * self.width, stop * self.width)
        out = x @ self.in_proj_kernel[:, columns].astype(self.dtype)
        return out + _as(out, self.in_proj_bias[columns])

    def split_heads(self, x: Float[Array, "n t D"]) -> Float[Array, "n t heads d"]:
        return x.reshape(*x.shape[:-1], self.heads, self.width // self.heads)

    def scores(self, q_btd: Float[Array, "n t D"], k_bsd: Float[Array, "n S D"]) -> Float[Array, "n heads t S"]:
        """q k^T / sqrt(head width), float32."""
        q_bthd, k_bshd = self.split_heads(q_btd), self.split_heads(k_bsd)
        scale = (self.width // self.heads) ** -0.5
        return jnp.einsum("bthd,bshd->bhts", q_bthd * scale, k_bshd, preferred_element_type=jnp.float32)

    def mix(self, weights: Float[Array, "n heads t S"], v_bsd: Float[Array, "n S D"]) -> Float[Array, "n t D"]:
        """Weighted values of all heads, through out_proj."""
        x_bthd = jnp.einsum("bhts,bshd->bthd", weights.astype(self.dtype), self.split_heads(v_bsd))
        return self.out_proj(x_bthd.reshape(*x_bthd.shape[:2], self.width))

    def __call__(self, x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        q, k, v = jnp.split(self.project(x, 0, 3), 3, axis=-1)
        return self.mix(jax.nn.softmax(self.scores(q, k), axis=-1), v)


class Mlp(nn.Module):
    """c_proj(activation(c_fc(x))), hidden width as given (CLIP: four times the width)."""

    hidden: int
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        width = x.shape[-1]
        hidden = nn.Dense(
            self.hidden, dtype=self.dtype, kernel_init=nn.initializers.normal((2 * width) ** -0.5), name="c_fc"
        )(x)
        out = nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.normal(width**-0.5 / 2), name="c_proj")
        return out(ACTIVATIONS[self.activation](hidden))


class Block(nn.Module):
    """Pre-norm transformer block (SPEC 2.3; 5.3 with eps 1e-12 and other heads).

    `ln_1`, `attn`, `ln_2`, `mlp` are attributes, so that the decoder's cross layer can call them one by one.
    """

    width: int
    heads: int
    hidden: int
    activation: str
    eps: float = 1e-5
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.ln_1, self.ln_2 = LayerNorm(self.eps), LayerNorm(self.eps)
        self.attn = Attention(self.width, self.heads, self.dtype)
        self.mlp = Mlp(self.hidden, self.activation, self.dtype)

    def __call__(self, x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PatchEmbedding(nn.Module):
    """CLIP's `conv1`: a convolution whose stride is its size, hence one matmul over patches (SPEC 2.2).

    Pixels at the right and the bottom that fill no patch are left out, as a convolution does.
    """

    patch_size: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "n px px 3"]) -> Float[Array, "n g g D"]:
        p, side = self.patch_size, x.shape[1] // self.patch_size
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1, 2))
        kernel = self.param("kernel", init, (p, p, 3, self.width))
        patches = x[:, : side * p, : side * p].reshape(-1, side, p, side, p, 3)
        return jnp.einsum("ngphqc,pqcd->nghd", patches, kernel.astype(self.dtype))


class Convolution(nn.Module):
    """A 3x3 convolution of standardised kernels (mean 0, norm sqrt 2), with a gain and a bias a channel.

    Kernels are normed rather than what they give. So nothing depends on the batch, and a picture keeps what a norm over
    its pixels takes away: its contrast, and how its channels differ. A shade that all of them share is lost.
    """

    channels: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 d"]:
        kernel = self.param("kernel", HE, (3, 3, x.shape[-1], self.channels))
        scale = self.param("scale", nn.initializers.ones, (self.channels,))
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        kernel = kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)
        norm = jnp.sqrt(jnp.square(kernel).sum(axis=(0, 1, 2), keepdims=True) / 2 + 1e-8)
        y = convolve(x, (kernel / norm * _as(kernel, scale)).astype(self.dtype), self.stride)
        return y + _as(y, bias)


def convolve(x: Float[Array, "n h w c"], kernel: Float[Array, "3 3 c d"], stride: int) -> Float[Array, "n h2 w2 d"]:
    """One pixel of zeros around x. With a stride as one matmul: XLA's gradient of it is twice as fast so on a CPU."""
    if stride == 1:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
    _, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    views = [x[:, i : i + h : stride, j : j + w : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(views, axis=-1) @ kernel.reshape(9 * c, -1)


class ConvStem(nn.Module):
    """3x3 convolutions and ReLU in place of one large patch: learns far faster from few pictures.

    A convolution of stride 2 for each halving, each followed by its number of residual blocks: two convolutions of
    stride 1, what they add scaled by a learnt number a channel, small at first. Then a linear map to the width.
    """

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "n px px 3"]) -> Float[Array, "n g g D"]:
        def convolution(name: str, stride: int) -> Convolution:
            return Convolution(channels, stride, self.dtype, name=name)

        for i, (channels, blocks) in enumerate(zip(self.channels, self.blocks, strict=True)):
            x = nn.relu(convolution(f"conv_{i}", 2)(x))
            for block in range(blocks):
                name = f"{i}_{block}"
                y = convolution(f"conv_{name}_b", 1)(nn.relu(convolution(f"conv_{name}_a", 1)(x)))
                x = x + y * _as(y, self.param(f"block_{name}_scale", nn.initializers.constant(0.3), (channels,)))
        return nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="to_width")(x)


class VisionTransformer(nn.Module):
    """CLIP's ViT, shared by shop images and frames (SPEC 2.2-2.4)."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    hidden: int
    embedding: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    remat: str = "none"
    stem_channels: tuple[int, ...] = ()  # empty: CLIP's patch embedding
    stem_blocks: tuple[int, ...] = ()
    pool: str = "class_token"  # or "mean" of all tokens: what the embedding is made of
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, pictures: Float[Array, "n px px 3"], kept: Int[Array, "n k"] | None = None
    ) -> tuple[Float[Array, "n T D"], Float[Array, "n E"]]:
        """Normalised pictures to tokens (before ln_post, class token first) and pooled vectors (float32, not unit).

        `kept`: the patches of each picture that are encoded, T = 1 + k; all of them unless given.
        """
        n, width = pictures.shape[0], self.width
        small = nn.initializers.normal(width**-0.5)
        x = pictures.astype(self.dtype)
        if self.stem_channels:
            x = ConvStem(self.stem_channels, self.stem_blocks, width, self.dtype, name="stem")(x)
        else:
            x = PatchEmbedding(self.patch_size, width, self.dtype, name="conv1")(x)
        x = x.reshape(n, -1, width)
        position = self.param("positional_embedding", small, (x.shape[1] + 1, width)).astype(self.dtype)
        x = x + _as(x, position[1:])
        if kept is not None:
            x = jnp.take_along_axis(x, kept[:, :, None], axis=1)
        class_token = self.param("class_embedding", small, (width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(class_token + position[0], (n, 1, width)), x], axis=1)
        tokens = self.resblocks(LayerNorm(self.eps, name="ln_pre")(x))
        summary = tokens[:, 0] if self.pool == "class_token" else tokens.mean(axis=1)
        pooled = LayerNorm(self.eps, name="ln_post")(summary)
        proj = self.param("proj", small, (width, self.embedding))
        return tokens, (pooled @ proj.astype(self.dtype)).astype(jnp.float32)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def resblocks(self, x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        """All blocks as one scan: compiled once, parameters stacked on a leading axis."""

        def layer(block: Block, x: Array, _: None) -> tuple[Array, None]:
            return block(x), None

        if self.remat != "none":
            layer = nn.remat(layer, policy=REMAT[self.remat], prevent_cse=False)
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        block = Block(self.width, self.heads, self.hidden, self.activation, self.eps, self.dtype, name="resblocks")
        return stack(block, x, None)[0]


class MatchingDecoder(nn.Module):
    """Pairwise matching decoder with one self and one cross layer (SPEC 5), in parts.

    The logit of (image, clip) needs of the image only its class token after the self layer, and of the clip its
    keys and values, so each is made once and meets many partners (pairs.py). Called whole, it is SPEC 5's plain form.
    """

    width: int
    heads: int
    hidden: int
    activation: str = "quick_gelu"
    self_eps: float = 1e-12  # official; 1e-5 everywhere else (SPEC 11, row 6)
    kv_norm: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        block = functools.partial(Block, self.width, self.heads, self.hidden, self.activation, dtype=self.dtype)
        self.self_layer, self.cross_layer = block(eps=self.self_eps), block()
        self.pooler_norm = LayerNorm()
        self.dense = nn.Dense(self.width, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02))
        bound = self.width**-0.5
        self.match = self.param(
            "match", lambda k, s: jax.random.uniform(k, s, minval=-bound, maxval=bound), (self.width,)
        )

    def image_tokens(self, tokens: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        """The self layer: all that happens to an image before it meets a clip (5.3)."""
        return self.self_layer(tokens)

    def keys_values(self, tokens: Float[Array, "n S D"]) -> Float[Array, "n S 2*D"]:
        """A clip's keys and values side by side, of raw tokens unless kv_norm (5.4; SPEC 11, row 4)."""
        tokens = self.cross_layer.ln_1(tokens) if self.kv_norm else tokens
        return self.cross_layer.attn.project(tokens, 1, 3)

    def scores(
        self, x: Float[Array, "n r D"], keys_values: Float[Array, "n S 2*D"], key_mask: Bool[Array, "n S"]
    ) -> Float[Array, "n H r S"]:
        """q k^T / sqrt(D/H), float32, the most negative number at padding: its softmax weight is exactly 0."""
        query = self.cross_layer.attn.project(self.cross_layer.ln_1(x), 0, 1)
        scores = self.cross_layer.attn.scores(query, keys_values[..., : self.width])
        return jnp.where(key_mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)

    def cross_tokens(
        self, x: Float[Array, "n r D"], weights: Float[Array, "n H r S"], keys_values: Float[Array, "n S 2*D"]
    ) -> Float[Array, "n r D"]:
        """The cross layer after its softmax (5.4)."""
        x = x + self.cross_layer.attn.mix(weights, keys_values[..., self.width :])
        return x + self.cross_layer.mlp(self.cross_layer.ln_2(x))

    def pooled(self, x: Float[Array, "n r D"]) -> Float[Array, "n r D"]:
        """h of class tokens after the cross layer, float32 (5.5)."""
        return jax.nn.relu(self.dense(self.pooler_norm(x))).astype(jnp.float32)

    def logit(
        self, x: Float[Array, "n r D"], weights: Float[Array, "n H r S"], keys_values: Float[Array, "n S 2*D"]
    ) -> Float[Array, "n r"]:
        """10 cos(h, w) of image class tokens x against the clip (5.6)."""
        pooled = self.pooled(self.cross_tokens(x, weights, keys_values))
        return 10 * unit(pooled) @ unit(self.match)

    def __call__(
        self, image_tokens: Float[Array, "n T D"], clip_tokens: Float[Array, "n S D"], key_mask: Bool[Array, "n S"]
    ) -> tuple[Float[Array, "n"], Float[Array, "n H T S"]]:
        """Matching logit and masked scores of n (image, clip) pairs, without dropout."""
        x, keys_values = self.image_tokens(image_tokens), self.keys_values(clip_tokens)
        scores = self.scores(x, keys_values, key_mask)
        return self.logit(x[:, :1], jax.nn.softmax(scores[:, :, :1], axis=-1), keys_values)[:, 0], scores


class PatchReconstruction(nn.Module):
    """Attention of all heads to the coefficients that rebuild image tokens from clip tokens (SPEC 6.2-6.4)."""

    heads: int
    head_width: int
    attention: str = "prob_scaled"  # or "prob", "score": what of the cross layer is read (SPEC 11, row 2)
    mask_padding: bool = False  # row 1
    with_class_token: bool = True  # row 29: False leaves patches only, as rows and as sources

    def setup(self) -> None:
        hidden = max(1, self.heads // 2)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        self.conv1_kernel = self.param("conv1_kernel", ones, (self.heads, hidden))
        self.conv1_bias = self.param("conv1_bias", zeros, (hidden,))
        self.conv2_kernel = self.param("conv2_kernel", ones, (hidden,))
        self.conv2_bias = self.param("conv2_bias", zeros, (1,))

    def read(self, scores: Float[Array, "n H T S"], key_mask: Bool[Array, "n S"]) -> Float[Array, "n H T S"]:
        """R: what of the cross layer's masked scores is read, 0 at padding."""
        if self.attention == "score":
            return jnp.where(key_mask[:, None, None, :], scores, 0)
        weights = jax.nn.softmax(scores, axis=-1)
        return weights * self.head_width**0.5 if self.attention == "prob_scaled" else weights

    def mix(self, attention: Float[Array, "n H T S"]) -> Float[Array, "n T S"]:
        """Q >= 0: two 1x1 convolutions over the heads."""
        # jax.nn.relu has derivative 0 at 0, as SPEC 6.3 wants; jnp.maximum has 1/2.
        hidden = jnp.einsum("nhts,hk->nkts", attention, self.conv1_kernel) + self.conv1_bias[None, :, None, None]
        return jax.nn.relu(jnp.einsum("nkts,k->nts", jax.nn.relu(hidden), self.conv2_kernel) + self.conv2_bias[0])

    def __call__(self, scores: Float[Array, "n H T S"], key_mask: Bool[Array, "n S"]) -> Float[Array, "n R S"]:
        """W, from the cross layer's masked scores: rows sum to 1; R = T rows, or T-1 without the class token's."""
        tokens = scores.shape[2]
        mixed = self.mix(self.read(scores, key_mask))
        if self.mask_padding:
            mixed = jnp.where(key_mask[:, None, :], mixed, -jnp.inf)
        if not self.with_class_token:
            patch = jnp.arange(scores.shape[3]) % tokens != 0  # sources are frame-major, class token first
            mixed = jnp.where(patch[None, None, :], mixed, -jnp.inf)[:, 1:]
        return jax.nn.softmax(mixed, axis=-1)


class Rice(nn.Module):
    """Encoder, matching decoder and patch reconstruction; a model for ICL alone has neither of the last two."""

    encoder: VisionTransformer
    decoder: MatchingDecoder | None
    reconstruction: PatchReconstruction | None
    scale_init: float = 4.0
    bias_init: float | None = None  # of ICL's sigmoid form; the softmax has no bias

    def setup(self) -> None:
        # Used plain and on both sides, so logits are scale^2 cos; CLIP's logit_scale is a logarithm (SPEC 3.1).
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.scale_init), ())
        if self.bias_init is not None:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(self.bias_init), ())

    def encode(self, pictures: Float[Array, "n px px 3"]) -> tuple[Float[Array, "n T D"], Float[Array, "n E"]]:
        return self.encoder(pictures)

    def __call__(
        self,
        frames: UInt8[Array, "n N px px 3"],
        mask: Int[Array, "n N"],
        image: UInt8[Array, "n px px 3"],
        *,
        train: bool = False,
        debug: bool = False,
    ) -> dict[str, Array]:
        """Embeddings, matching logits and reconstruction coefficients of n (clip, image) pairs, all tokens, no dropout.

        `train` and `debug` are what Scenic's trainers pass; nothing here depends on them.
        """
        del train, debug
        n, slots = mask.shape
        image_tokens, image_pooled = self.encode(normalise(image))
        frame_tokens, frame_pooled = self.encode(normalise(frames, mask).reshape(n * slots, *frames.shape[2:]))
        out = {
            "image_embedding": unit(image_pooled),
            "clip_embedding": clip_embedding(frame_pooled.reshape(n, slots, -1), mask),
            "logit_scale": self.logit_scale,
        }
        if self.decoder is not None:
            tokens, width = frame_tokens.shape[1:]
            key_mask = jnp.repeat(mask > 0, tokens, axis=1)
            clip_tokens = frame_tokens.reshape(n, slots * tokens, width)
            out["match_logit"], scores = self.decoder(image_tokens, clip_tokens, key_mask)
            if self.reconstruction is not None:
                out["coefficients"] = self.reconstruction(scores, key_mask)
        return out


def build(config: Any) -> Rice:
    """The model of a config's `model` and `loss` sections (configs/default.py says what each field means)."""
    c, dtype = config.model, jnp.dtype(config.model.dtype)
    encoder = VisionTransformer(
        image_size=config.data.image_size,
        patch_size=c.patch_size,
        width=c.width,
        layers=c.layers,
        heads=c.heads,
        hidden=c.hidden,
        embedding=c.embedding,
        activation=c.activation,
        remat=c.remat,
        stem_channels=c.stem_channels,
        stem_blocks=c.stem_blocks,
        pool=c.pool,
        dtype=dtype,
    )
    decoder = reconstruction = None
    if config.loss.pmd or config.loss.pfr:
        decoder = MatchingDecoder(
            width=c.width,
            heads=c.decoder_heads,
            hidden=c.hidden,
            activation=c.activation,
            self_eps=c.decoder_self_eps,
            kv_norm=c.cross_kv_norm,
            dtype=dtype,
        )
    if config.loss.pfr:
        reconstruction = PatchReconstruction(
            heads=c.decoder_heads,
            head_width=c.width // c.decoder_heads,
            attention=config.loss.pfr_attention,
            mask_padding=config.loss.pfr_mask_padding,
            with_class_token=config.loss.pfr_with_class_token,
        )
    return Rice(
        encoder=encoder,
        decoder=decoder,
        reconstruction=reconstruction,
        scale_init=c.logit_scale_init,
        bias_init=c.logit_bias_init if config.loss.icl_form == "sigmoid" else None,
    )

"""A stem of 3x3 convolutions that can replace CLIP's patch embedding, for small data sets and random weights."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rice_jax.models.arrays import expand_to

HE = nn.initializers.variance_scaling(2.0, "fan_in", "normal", in_axis=(0, 1, 2), out_axis=3)


class Convolution(nn.Module):
    """A 3x3 convolution with standardised kernels (mean 0, norm sqrt 2), then a gain and a bias for each channel.

    Weight standardisation replaces activation normalisation: no batch statistics, and per-image contrast and channel
    differences survive. A constant that all input channels share is removed.
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
        y = convolve(x, (kernel / norm * scale).astype(self.dtype), self.stride)
        return y + expand_to(bias, y)


def convolve(x: Float[Array, "n h w c"], kernel: Float[Array, "3 3 c d"], stride: int) -> Float[Array, "n h2 w2 d"]:
    """Returns x, padded with one pixel of zeros, convolved; h2 = ceil(h / stride), w2 = ceil(w / stride).

    With a stride above 1 it is one matmul over the nine shifted views: XLA's gradient of that is twice as fast on CPUs.
    """
    if stride == 1:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
    _, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    views = [x[:, i : i + h : stride, j : j + w : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(views, axis=-1) @ kernel.reshape(9 * c, -1)


class ConvStem(nn.Module):
    """3x3 convolutions and ReLU instead of one large patch, which learns far faster from few pictures.

    Stage i is a convolution of stride 2 to channels[i], then blocks[i] residual blocks: each adds two convolutions of
    stride 1, times a learnt number for each channel, 0.3 at first. A linear map to `width` ends the stem.
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
                scale = self.param(f"block_{name}_scale", nn.initializers.constant(0.3), (channels,))
                x = x + y * expand_to(scale, y)
        return nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="to_width")(x)

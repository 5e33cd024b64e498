"""A stem of small convolutions in place of CLIP's patch embedding, for small sets and random weights."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rice_jax.models.arrays import repeat_to

HE = nn.initializers.variance_scaling(2.0, "fan_in", "normal", in_axis=(0, 1, 2), out_axis=3)


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
        y = convolve(x, (kernel / norm * repeat_to(kernel, scale)).astype(self.dtype), self.stride)
        return y + repeat_to(y, bias)


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
                x = x + y * repeat_to(y, self.param(f"block_{name}_scale", nn.initializers.constant(0.3), (channels,)))
        return nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="to_width")(x)

"""The official optimiser (docs/official.md 7): groups of parameters, old Hugging Face's AdamW, warm-up and cosine."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from rice_jax.config import Config
from rice_jax.parallel.mesh import path_name


def schedule(config: Config) -> optax.Schedule:
    """Returns a function of the update u = 0, 1, ... that returns the learning rate, a scalar (docs/official.md 7.4).

    It rises linearly from 0 to the peak, then follows a cosine to 0 at num_updates. (1 + cos 2x) / 2 is written as
    sin^2(pi/2 - x): 1 + cos cancels in float32 near 0. Relative error at most 3e-7; with jax's x64, 1e-12.
    """
    peak, warmup, total = config.optimizer.learning_rate, config.optimizer.warmup_updates, config.num_updates

    def rate(update: Any) -> Array:
        u = jnp.asarray(update, float)
        falling = jnp.square(jnp.sin(jnp.pi / 2 * jnp.clip((total - u) / (total - warmup), 0, 1)))
        return peak * jnp.where(u < warmup, u / max(1, warmup), falling)

    return rate


def lr_multiplier(name: str, config: Config) -> float:
    """Returns the lr's factor of that parameter: 1.0 in the encoder, else logit_scale_ or decoder_lr_multiplier."""
    if name in ("logit_scale", "logit_bias"):
        return config.optimizer.logit_scale_lr_multiplier
    return 1.0 if name.startswith("encoder/") else config.optimizer.decoder_lr_multiplier


def decays(name: str, ndim: int, config: Config) -> bool:
    """Returns whether weight decay applies to the parameter of that path, of `ndim` axes (docs/official.md 7.2).

    "official" exempts biases only, since its other exemption matches no parameter; "no_1d" exempts vectors and scalars,
    not counting the axis of stacked blocks, which a path with "resblocks" has.
    """
    if config.optimizer.decay_rule == "no_1d":
        return ndim - ("resblocks" in name) > 1  # stacked blocks have one axis more
    return not name.endswith("bias")


def one_minus_power(b: float, count: Int[Array, ""]) -> Float[Array, ""]:
    """Returns 1 - b^count, float32, with a relative error of 2e-7; computed directly, 1 - 0.999 has 1e-5."""
    return -jnp.expm1(count.astype(float) * (math.log(b) if b else -math.inf))


def scale_by_uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns Adam with eps added to the uncorrected sqrt(v), as in transformers 4.10 (docs/official.md 7.3).

    It equals Adam with an eps of eps / sqrt(1 - b2^t), so early steps are smaller. It does not negate or scale by lr.
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def update(grads: optax.Updates, state: Any, params: Any = None) -> tuple[optax.Updates, Any]:
        _, state = adam.update(grads, state, params)
        correction = jnp.sqrt(one_minus_power(b2, state.count)) / one_minus_power(b1, state.count)
        return jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + eps), state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, update)


class ScheduleState(NamedTuple):
    updates: Int[Array, ""]  # done


def step_then_decay(config: Config) -> optax.GradientTransformation:
    """Returns theta <- theta - lr u, then theta <- theta - lr wd theta, as a transformation (docs/official.md 7.3).

    It maps u to theta's change. lr: the schedule's rate times lr_multiplier. wd: weight_decay, or 0 unless `decays`.
    """
    rate = schedule(config)

    def init(params: optax.Params) -> ScheduleState:
        del params
        return ScheduleState(jnp.zeros([], jnp.int32))

    def update(updates: optax.Updates, state: ScheduleState, params: Any = None) -> tuple[optax.Updates, ScheduleState]:
        lr = rate(state.updates)

        def one(path: tuple[Any, ...], u: Array, theta: Array) -> Array:
            name = path_name(path)
            step = lr * lr_multiplier(name, config)
            decay = step * config.optimizer.weight_decay if decays(name, theta.ndim, config) else 0.0
            return -step * u - decay * (theta - step * u)

        updates = jax.tree_util.tree_map_with_path(one, updates, params)
        return updates, ScheduleState(optax.safe_increment(state.updates))

    return optax.GradientTransformation(init, update)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns the optimiser of a config, which clips unless clip_norm is 0: from gradients to changes to be added."""
    o = config.optimizer
    adam = {"uncorrected": scale_by_uncorrected_adam, "corrected": optax.scale_by_adam}[o.eps_placing]
    clip = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm else []
    return optax.chain(*clip, adam(o.b1, o.b2, o.eps), step_then_decay(config))

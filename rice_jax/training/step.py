"""The training state and the jitted step that maps (state, batch) to (state, metrics)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, UInt32

from rice_jax.losses import global_batch
from rice_jax.models.rice import Rice
from rice_jax.parallel.mesh import P, parameter_specs, state_shardings
from rice_jax.training.optimizer import learning_rate, make_optimizer

Metrics = dict[str, Array]


class State(NamedTuple):
    """All that a run carries from step to step; plain dicts and arrays."""

    step: Int[Array, ""]  # updates done, hence the position in the data
    params: Any
    opt_state: Any
    average: Any  # moving average of the parameters; empty when the config asks for none


def random_key(seed: int) -> Array:
    """Threefry always: other generators give other numbers on another mesh, or the same ones under vmap."""
    return jax.random.key(seed, impl="threefry2x32")


def init_params(model: Rice, config: Any, key: Array) -> Any:
    side = config.data.image_size
    picture = jnp.zeros((1, side, side, 3), jnp.uint8)
    return model.init(key, picture[:, None], jnp.ones((1, 1), jnp.int32), picture)["params"]


def abstract_state(model: Rice, config: Any, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the state, without making it."""
    shapes = jax.eval_shape(lambda: _init(model, config))
    shardings = state_shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def init_state(model: Rice, config: Any, abstract: State) -> State:
    """The state at step 0, born sharded: no device, no host ever holds more than its part."""
    return jax.jit(lambda: _init(model, config), out_shardings=_shardings(abstract))()


def _init(model: Rice, config: Any) -> State:
    params = init_params(model, config, random_key(config.seed))
    average = params if config.optimizer.ema_decay else {}
    return State(jnp.zeros([], jnp.int32), params, make_optimizer(config).init(params), average)


def _shardings(abstract: State) -> State:
    return jax.tree.map(lambda x: x.sharding, abstract)


def ledger(index: Int[Array, " G"]) -> UInt32[Array, "2"]:
    """Two position-weighted sums (uint32) of a global batch's rows: the same on every host, another for any swap."""
    row, place = index.astype(jnp.uint32), jnp.arange(index.shape[0], dtype=jnp.uint32)
    first = jnp.sum((row + 1) * (2 * place + 1), dtype=jnp.uint32)
    return jnp.stack([first, jnp.sum((row + 7) * (row + 11) * (place + 13), dtype=jnp.uint32)])


def make_train_step(
    model: Rice, config: Any, mesh: Mesh, abstract: State, *, make_loss: Callable[..., Any] = global_batch.make_loss
) -> Callable[[State, dict[str, Array]], tuple[State, Metrics]]:
    """The jitted update; donates its state. Losses are of the global batch, before the update (SPEC 6.8).

    make_loss: another formulation, for comparison.
    """
    optimizer = make_optimizer(config)
    loss = make_loss(model, config.loss, mesh, parameter_specs(abstract.params, mesh))
    decay = config.optimizer.ema_decay

    def train_step(state: State, batch: dict[str, Array]) -> tuple[State, Metrics]:
        key = jax.random.fold_in(random_key(config.seed), state.step)
        (total, parts), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if decay:
            # A short average at first: the start's random weights should not weigh for long.
            d = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
            average = jax.tree.map(lambda a, p: d * a + (1 - d) * p, average, params)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)

        def advance(new: Array, old: Array) -> Array:  # counters go on, so that the position in the data is the step
            return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

        old = (state.params, state.opt_state, state.average)
        params, opt_state, average = jax.tree.map(advance, (params, opt_state, average), old)
        metrics = {
            "loss": total,
            **parts,
            "grad_norm": norm,
            "gradient_norms": jnp.stack([optax.tree.norm(g) for g in jax.tree.leaves(grads)]),  # what `norm` is made of
            "finite": finite,
            "learning_rate": learning_rate(config, state.step),
            "logit_scale": state.params["logit_scale"],
            "ledger": ledger(batch["index"]),
        }
        return State(state.step + 1, params, opt_state, average), metrics

    # out_shardings: without them XLA may lay the state out anew, and the second call compiles again.
    replicated = NamedSharding(mesh, P())
    return jax.jit(train_step, donate_argnums=0, out_shardings=(_shardings(abstract), replicated))

"""The training state, and the jitted step that maps (state, batch) to (state, metrics)."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from rice_jax.config import Config
from rice_jax.losses import global_batch
from rice_jax.models.rice import Rice, matmul_precision
from rice_jax.parallel.mesh import P, parameter_specs, state_shardings
from rice_jax.training.ledger import batch_digest
from rice_jax.training.optimizer import make_optimizer, schedule

Metrics = dict[str, Array]
LOOKING = ("jax_debug_nans", "jax_debug_infs")  # jax's switches that copy values to the host
REFUSED = {  # and those with which no model trains
    "jax_disable_jit": "updates need compiling, as one of a small model takes over three minutes without",
    "jax_enable_x64": "training computes in float32 or bfloat16 (model.dtype)",
}


class State(NamedTuple):
    """All that a run carries from one update to the next: plain dicts and arrays."""

    step: Int[Array, ""]  # updates done, hence the position in the data
    params: Any
    opt_state: Any
    average: Any  # moving average of the parameters; {} if optimizer.ema_decay is 0


def random_key(seed: int) -> Array:
    """Returns a typed key, shape [], of Threefry: other generators depend on the mesh, or repeat numbers under vmap."""
    return jax.random.key(seed, impl="threefry2x32")


def init_params(model: Rice, config: Config, key: Array) -> Any:
    """Returns random parameters, float32 arrays in nested dicts. The pictures' size is data.image_size."""
    side = config.data.image_size
    picture = jnp.zeros((1, side, side, 3), jnp.uint8)
    return model.init(key, picture[:, None], jnp.ones((1, 1), jnp.int32), picture)["params"]


def abstract_state(model: Rice, config: Config, mesh: Mesh) -> State:
    """Returns the state as ShapeDtypeStructs with shardings. Raises ValueError if no rule fits a parameter."""
    shapes = jax.eval_shape(lambda: _init(model, config))
    shardings = state_shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def init_state(model: Rice, config: Config, abstract: State) -> State:
    """Returns the random state at step 0, created sharded as `abstract`: no device and no host ever holds all of it."""
    return jax.jit(lambda: _init(model, config), out_shardings=_shardings(abstract))()


def _init(model: Rice, config: Config) -> State:
    params = init_params(model, config, random_key(config.seed))
    average = params if config.optimizer.ema_decay else {}
    return State(jnp.zeros([], jnp.int32), params, make_optimizer(config).init(params), average)


def _shardings(abstract: State) -> State:
    return jax.tree.map(lambda x: x.sharding, abstract)


def make_train_step(
    model: Rice, config: Config, mesh: Mesh, abstract: State, *, make_loss: Callable[..., Any] = global_batch.make_loss
) -> Callable[[State, dict[str, Array]], tuple[State, Metrics]]:
    """Returns the jitted update, (state, batch) to (state, metrics); it donates its state.

    With one of jax's switches in LOOKING it donates nothing, which takes more memory.

    `abstract` is from abstract_state; benchmarks replace make_loss. Metrics are scalars, except gradient_norms, one for
    each parameter in the order of the tree, and ledger, uint32 [2] from batch_digest. The losses are of the global
    batch before the update (docs/official.md 6.8). If loss or gradient is not finite, `finite` is false, and
    parameters, moments and average stay as they were; the counters go on.
    """
    optimizer = make_optimizer(config)
    loss = make_loss(model, config.loss, mesh, parameter_specs(abstract.params, mesh))
    decay = config.optimizer.ema_decay

    def train_step(state: State, batch: dict[str, Array]) -> tuple[State, Metrics]:
        key = jax.random.fold_in(random_key(config.seed), state.step)
        with matmul_precision(model):
            (total, parts), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if decay:
            # The average is short at first, so that the initial weights do not count for long.
            d = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
            average = jax.tree.map(lambda a, p: d * a + (1 - d) * p, average, params)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)

        def advance(new: Array, old: Array) -> Array:  # integers are counters: the step is the position in the data
            return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

        old = (state.params, state.opt_state, state.average)
        params, opt_state, average = jax.tree.map(advance, (params, opt_state, average), old)
        metrics = {
            "loss": total,
            **parts,
            "grad_norm": norm,
            "gradient_norms": jnp.stack([optax.tree.norm(g) for g in jax.tree.leaves(grads)]),
            "finite": finite,
            "learning_rate": schedule(config)(state.step),
            "logit_scale": state.params["logit_scale"],
            "ledger": batch_digest(batch["index"], jnp),
        }
        return State(state.step + 1, params, opt_state, average), metrics

    # out_shardings: without them XLA may choose other shardings for the state, and the second call compiles again.
    replicated = NamedSharding(mesh, P())
    donated = () if is_looked_at() else 0  # to name the operation, jax calls the update again with the same state
    return jax.jit(train_step, donate_argnums=donated, out_shardings=(_shardings(abstract), replicated))


def is_looked_at() -> bool:
    """Returns whether one of jax's switches in LOOKING is on, as by JAX_DEBUG_NANS=1."""
    return any(getattr(jax.config, name) for name in LOOKING)


@contextmanager
def guarded() -> Iterator[None]:
    """Context of an update, in which a hidden copy between host and device is an error.

    It is none while one of jax's switches looks at the values.
    """
    with ExitStack() as stack:
        stack.enter_context(jax.transfer_guard("allow" if is_looked_at() else "disallow"))
        # A thread in which jax has turned a switch off for a moment, as it does itself, no longer looks: on again.
        for name, switch in (("jax_debug_nans", jax.debug_nans), ("jax_debug_infs", jax.debug_infs)):
            if getattr(jax.config, name):
                stack.enter_context(switch(True))
        yield


@contextmanager
def own_switches() -> Iterator[None]:
    """Context, or decorator, in which switches of jax that are meant for other code change nothing.

    They are the guards of copies between host and device, and those of promotion to another rank or dtype.
    """
    with jax.transfer_guard("allow"), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def check_switches() -> None:
    """Raises ValueError if a switch of jax is on with which no model trains."""
    for name, reason in REFUSED.items():
        if getattr(jax.config, name):
            raise ValueError(f"{name.upper()}: {reason}; unset it.")

"""The mesh and the rules that say how every parameter lies on it: the only file that names a mesh axis.

A batch is split over both axes. Parameters and the optimiser's moments are split over `fsdp` alone, by RULES.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

P = PartitionSpec
BATCH = ("data", "fsdp")

# First match on the parameter's path wins. A stack of blocks has its layers on the first axis.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # pattern on the path                                   axes of the array
    (r"resblocks/.*(in_proj_kernel|c_fc/kernel)$", P(None, None, "fsdp")),
    (r"resblocks/.*(out_proj|c_proj)/kernel$", P(None, "fsdp", None)),
    (r"(in_proj_kernel|c_fc/kernel)$", P(None, "fsdp")),
    (r"(out_proj|c_proj|dense)/kernel$", P("fsdp", None)),
    (r"conv1/kernel$", P(None, None, None, "fsdp")),
    (r"stem/\w+/kernel$", P()),
    # Small, hence whole everywhere: but named, so that a new parameter cannot slip in without a decision.
    (r"(class_embedding|positional_embedding|/proj|match|logit_scale)$", P()),
    (r"(^|/|_)(bias|scale)$", P()),
    (r"reconstruction/conv\d_kernel$", P()),
)


def make_mesh(*, data: int, fsdp: int, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of axes (data, fsdp); one size may be -1, which takes what is left.

    Raises:
      ValueError: the sizes do not use up the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp}
    unknown = [axis for axis, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(unknown) > 1 or known < 1:
        raise ValueError(
            f"mesh (data={data}, fsdp={fsdp}): sizes are positive, and at most one may be -1 (what is left)."
        )
    if unknown and len(devices) % known == 0:
        sizes[unknown[0]] = len(devices) // known
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise ValueError(
            f"mesh (data={data}, fsdp={fsdp}) does not cover {len(devices)} device(s); "
            "set mesh.data and mesh.fsdp to sizes whose product is that number, or one of them to -1."
        )
    # Auto axes: make_mesh's default, Explicit, is refused by Linen modules and by shard_map on unsharded inputs.
    return jax.make_mesh(tuple(sizes.values()), BATCH, devices=devices, axis_types=(AxisType.Auto,) * 2)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as 'encoder/resblocks/ln_1/scale'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of one parameter, or of a moment whose path ends in the parameter's.

    Raises:
      ValueError: no rule matches, the rule has another rank, or a dimension does not divide by its mesh axis.
    """
    spec = next((spec for pattern, spec in RULES if re.search(pattern, name)), None)
    if spec is None:
        raise ValueError(f"parameter {name} of shape {shape} matches no rule; add one to sharding.RULES.")
    if len(spec) > len(shape):
        raise ValueError(f"parameter {name} of shape {shape} has fewer axes than its rule {spec}; mend sharding.RULES.")
    for dim, axis in enumerate(spec):
        if axis is not None and shape[dim] % mesh.shape[axis]:
            raise ValueError(
                f"parameter {name}: axis {dim} of shape {shape} does not divide by mesh axis "
                f"{axis}={mesh.shape[axis]}; choose an {axis} that divides {shape[dim]}."
            )
    return spec


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """NamedShardings in the shape of `state`: RULES for what has a parameter's path, whole for counters and scalars."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        spec = parameter_spec(path_name(path), leaf.shape, mesh) if leaf.ndim else P()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def parameter_specs(params: Any, mesh: Mesh) -> Any:
    """PartitionSpecs in the shape of `params`, as shard_map's in_specs take them."""
    return jax.tree.map(lambda sharding: sharding.spec, state_shardings(params, mesh))


def parameter_table(state: Any, params: Any) -> str:
    """Every parameter with its shape, how it is split and the bytes of it, its moments and averages on one device.

    Args:
      state: arrays or ShapeDtypeStructs with shardings; whatever has a parameter's path in it belongs to it.
      params: the part of `state` that the model computes with.
    """

    def on_a_device(leaf: Any) -> int:
        return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize

    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    rows = [("parameter", "shape", "split over", "with moments, MB a device")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, spec = path_name(path), leaf.sharding.spec
        held = sum(on_a_device(other) for at, other in leaves.items() if f"/{at}".endswith(f"/{name}"))
        split = [f"{axis} (axis {dim})" for dim, axis in enumerate(spec) if axis and leaf.sharding.mesh.shape[axis] > 1]
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        rows.append((name, shape, ", ".join(split) or "-", f"{held / 1e6:.3f}"))
    total, in_all = (
        sum(map(size, leaves.values())) / 1e6 for size in (on_a_device, lambda x: x.size * x.dtype.itemsize)
    )
    rows.append(("all", "", "", f"{total:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {split:<{widths[2]}}  {size:>{widths[3]}}"
        for name, shape, split, size in rows
    ]
    return "\n".join([*lines, f"the state is {in_all:.1f} MB in all; the batch is split over {' and '.join(BATCH)}"])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over the whole mesh."""
    return NamedSharding(mesh, P(BATCH))


def check_batches(mesh: Mesh, **sizes: int) -> None:
    """Raises ValueError, naming the config's field, when a global batch cannot be split over the mesh."""
    for name, size in sizes.items():
        if size % mesh.size:
            raise ValueError(
                f"{name} {size} does not divide by the mesh's {mesh.size} devices {dict(mesh.shape)}; "
                f"set {name} to {max(1, round(size / mesh.size)) * mesh.size}, or take fewer devices."
            )


def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Positions in the global batch that this process feeds, in the order in which its devices want them: int64 [b].

    They need not be contiguous: on a torus neighbouring devices of a process are not neighbours of the batch.
    """
    if batch_size % mesh.size:
        raise ValueError(
            f"batch_size {batch_size} does not divide by the mesh's {mesh.size} devices {dict(mesh.shape)}."
        )
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    starts = sorted({index[0].indices(batch_size)[:2] for index in slices if index is not None})
    return np.concatenate([np.arange(start, stop) for start, stop in starts])


def to_global(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch (NumPy) as arrays of the global batch, on the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def on_host(x: jax.Array) -> np.ndarray:
    """The whole of an array; all processes must ask, since its parts may lie on devices of several."""
    if isinstance(x.sharding, NamedSharding) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)
    return np.asarray(x)


# --- inside shard_map: what crosses devices ---------------------------------------------------------------------------


def varying(x: Any) -> Any:
    """Marks a replicated value as one that may differ between devices, so that its gradient is summed once, here."""
    return jax.lax.pcast(x, BATCH, to="varying")


def gather_rows(x: jax.Array) -> jax.Array:
    """This device's rows to those of the global batch, in its order: [B, ...] -> [G, ...]."""
    return jax.lax.all_gather(x, BATCH, axis=0, tiled=True)


def scatter_sum_rows(x: jax.Array) -> jax.Array:
    """The sum over devices of [G, ...], this device's rows of it: [B, ...]."""
    return jax.lax.psum_scatter(x, BATCH, scatter_dimension=0, tiled=True)


def mean_over_devices(x: Any) -> Any:
    return jax.lax.pmean(x, BATCH)


def sum_over_devices(x: Any) -> Any:
    return jax.lax.psum(x, BATCH)


def max_over_devices(x: Any) -> Any:
    return jax.lax.pmax(x, BATCH)


def first_row(local_rows: int) -> jax.Array:
    """Position in the global batch of this device's row 0."""
    return jax.lax.axis_index(BATCH) * local_rows


def all_gather_parameter(shard: jax.Array, spec: PartitionSpec) -> jax.Array:
    """A parameter's shard to the whole of it, varying over the mesh; once a step, outside every loop.

    Its transpose is one reduce-scatter a tensor. Were the value left unvarying, each micro-batch would reduce its
    gradient.
    """
    split = [axis for axis, name in enumerate(spec) if name == "fsdp"]
    if not split:
        return varying(shard)
    shard = jax.lax.pcast(shard, "data", to="varying")
    return jax.lax.all_gather(shard, "fsdp", axis=split[0], tiled=True)

"""The device mesh, and the rules by which every parameter is sharded: the only file that names a mesh axis.

A batch is sharded over both axes. Parameters and the optimiser's moments are sharded over `fsdp` alone, by RULES.
"""

import collections
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rice_jax.parallel.devices import find_devices

P = PartitionSpec
BATCH = ("data", "fsdp")

# The first pattern that matches a parameter's path decides. A stack of blocks has its layers on the first axis.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # pattern on the path                                   axes of the array
    (r"resblocks/.*(in_proj_kernel|c_fc/kernel)$", P(None, None, "fsdp")),
    (r"resblocks/.*(out_proj|c_proj)/kernel$", P(None, "fsdp", None)),
    (r"(in_proj_kernel|c_fc/kernel)$", P(None, "fsdp")),
    (r"(out_proj|c_proj|dense)/kernel$", P("fsdp", None)),
    (r"conv1/kernel$", P(None, None, None, "fsdp")),
    (r"stem/\w+/kernel$", P()),
    # Small, hence replicated; but named here, so that nobody adds a parameter without a decision.
    (r"(class_embedding|positional_embedding|/proj|match|logit_scale)$", P()),
    (r"(^|/|_)(bias|scale)$", P()),
    (r"reconstruction/conv\d_kernel$", P()),
)


def make_mesh(*, data: int, fsdp: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with axes (data, fsdp) of the given sizes; one may be -1, which takes the remaining devices.

    devices: None takes find_devices(). A slice is a group of devices with fast links: a host's GPUs, or a TPU slice.
    With several of them each group of `fsdp` devices lies in one slice, and `data` goes first over the devices of a
    slice, then over the slices. Raises ValueError for other sizes, a product that is not the number of devices, slices
    of different sizes, or an fsdp that does not divide a slice.
    """
    devices = find_devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp}
    unknown = [axis for axis, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(unknown) > 1 or known < 1:
        raise ValueError(
            f"mesh (data={data}, fsdp={fsdp}): sizes are positive, and at most one may be -1 (the remaining devices); "
            "set mesh.data to -1 and mesh.fsdp to 1."
        )
    if unknown and len(devices) % known == 0:
        sizes[unknown[0]] = len(devices) // known
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise ValueError(
            f"mesh (data={data}, fsdp={fsdp}) does not cover {len(devices)} device(s); "
            "set mesh.data and mesh.fsdp to sizes whose product is that number, or one of them to -1."
        )
    # jax.make_mesh refuses several slices, and shapes for which a TPU's torus must be cut.
    slices = slice_sizes(devices)
    shape = (sizes["data"] // len(slices), sizes["fsdp"])
    if len(slices) == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        _check_slices(slices, sizes["fsdp"])
        over_slices = (len(slices), 1)
        grid = mesh_utils.create_hybrid_device_mesh(shape, over_slices, devices, allow_split_physical_axes=True)
    # Linen modules, and shard_map of unsharded inputs, refuse the other type of axes, Explicit.
    return Mesh(grid, BATCH, axis_types=(AxisType.Auto,) * 2)


def slice_sizes(devices: Iterable[Any]) -> list[int]:
    """Returns the number of devices of each slice; one slice if the devices name none, as CPUs."""
    return list(collections.Counter(getattr(device, "slice_index", 0) for device in devices).values())


def _check_slices(slices: list[int], fsdp: int) -> None:
    """Raises ValueError unless all slices have the same number of devices, and `fsdp` divides it."""
    found = f"{len(slices)} slices (hosts with GPUs, or TPU slices)"
    if len(set(slices)) > 1:
        raise ValueError(f"found {found} of {', '.join(map(str, slices))} devices; give slices of one size.")
    if slices[0] % fsdp:
        fitting = [str(size) for size in range(1, slices[0] + 1) if slices[0] % size == 0]
        raise ValueError(
            f"mesh.fsdp {fsdp} does not divide the {slices[0]} devices of a slice: found {found}, and parameters are "
            f"split inside a slice only; set mesh.fsdp to {' or '.join(fitting)}, and mesh.data to -1."
        )


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a key path of jax.tree_util as 'encoder/resblocks/ln_1/scale'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the spec of a parameter or moment by its path. Raises ValueError if no rule fits path, shape and mesh."""
    spec = next((spec for pattern, spec in RULES if re.search(pattern, name)), None)
    if spec is None:
        raise ValueError(f"parameter {name} of shape {shape} matches no rule; add one to RULES in parallel/mesh.py.")
    if len(spec) > len(shape):
        raise ValueError(f"parameter {name} of shape {shape} has fewer axes than its rule {spec}; correct RULES.")
    for dim, axis in enumerate(spec):
        if axis is not None and shape[dim] % mesh.shape[axis]:
            raise ValueError(
                f"parameter {name}: axis {dim} of shape {shape} does not divide by mesh axis "
                f"{axis}={mesh.shape[axis]}; set mesh.{axis} to a divisor of {shape[dim]}."
            )
    return spec


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Returns a tree like `state` of NamedShardings: by RULES, scalars whole. Raises ValueError if no rule fits."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(path_name(path), leaf.shape, mesh) if leaf.ndim else P())

    return jax.tree_util.tree_map_with_path(sharding, state)


def parameter_specs(params: Any, mesh: Mesh) -> Any:
    """Returns a tree like `params` of PartitionSpecs, for in_specs. Raises ValueError if no rule fits a parameter."""
    return jax.tree.map(lambda sharding: sharding.spec, state_shardings(params, mesh))


def parameter_table(state: Any, params: Any) -> str:
    """Returns a table of text: each parameter's shape, its sharding, and its MB a device with moments and average.

    state: arrays or ShapeDtypeStructs with shardings; a leaf belongs to the parameter in which its path ends.
    params: the part of `state` that the model computes with.
    """

    def bytes_a_device(leaf: Any) -> int:
        return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize

    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    rows = [("parameter", "shape", "split over", "with moments, MB a device")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, spec = path_name(path), leaf.sharding.spec
        size = sum(bytes_a_device(leaves[at]) for at in leaves if f"/{at}".endswith(f"/{name}"))
        split = [f"{axis} (axis {dim})" for dim, axis in enumerate(spec) if axis and leaf.sharding.mesh.shape[axis] > 1]
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        rows.append((name, shape, ", ".join(split) or "-", f"{size / 1e6:.3f}"))
    rows.append(("all", "", "", f"{sum(map(bytes_a_device, leaves.values())) / 1e6:.1f}"))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values()) / 1e6
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {split:<{widths[2]}}  {size:>{widths[3]}}"
        for name, shape, split, size in rows
    ]
    return "\n".join([*lines, f"the state is {total:.1f} MB in all; the batch is split over {' and '.join(BATCH)}"])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, P(BATCH))


def check_batches(mesh: Mesh, **sizes: int) -> None:
    """Raises ValueError if a global batch does not divide by the number of devices. `sizes`: config field and size."""
    for name, size in sizes.items():
        if size % mesh.size:
            kept = " (a run that has begun keeps its own)" if name == "batch_size" else ""
            raise ValueError(
                f"{name} {size} does not divide by the mesh's {mesh.size} devices {dict(mesh.shape)}; set {name} to "
                f"{max(1, round(size / mesh.size)) * mesh.size}{kept}, or take a number of devices that divides it."
            )


def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Returns the positions in the global batch that this process provides, ascending: int64 [b].

    They may have gaps, as on a torus. Raises ValueError if batch_size does not divide by the number of devices.
    """
    check_batches(mesh, batch_size=batch_size)
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    starts = sorted({index[0].indices(batch_size)[:2] for index in slices if index is not None})
    return np.concatenate([np.arange(start, stop) for start, stop in starts])


def to_global(batch: Any, mesh: Mesh) -> Any:
    """Returns the global batch [G, ...] on the devices, a tree like `batch`, this process's rows [b, ...] in NumPy."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def on_host(x: jax.Array) -> np.ndarray:
    """Returns the whole array as NumPy. All processes must call it: each may have shards of it."""
    if isinstance(x.sharding, NamedSharding) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = replicate(x, x.sharding.mesh)
    return np.asarray(x)


@functools.partial(jax.jit, static_argnums=1)
def replicate(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Returns the array with a whole copy on each device of the mesh; compiled once for each shape and sharding."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))


# --- inside shard_map: exchanges between devices ----------------------------------------------------------------------


def varying(x: Any) -> Any:
    """Returns a replicated value marked as varying over the mesh: its gradient is then summed over devices here."""
    return jax.lax.pcast(x, BATCH, to="varying")


def gather_rows(x: jax.Array) -> jax.Array:
    """Returns the rows of all devices, in the order of the global batch: [B, ...] -> [G, ...]."""
    return jax.lax.all_gather(x, BATCH, axis=0, tiled=True)


def scatter_sum_rows(x: jax.Array) -> jax.Array:
    """Returns this device's rows of the sum over devices: [G, ...] -> [B, ...]."""
    return jax.lax.psum_scatter(x, BATCH, scatter_dimension=0, tiled=True)


mean_over_devices = functools.partial(jax.lax.pmean, axis_name=BATCH)
sum_over_devices = functools.partial(jax.lax.psum, axis_name=BATCH)
max_over_devices = functools.partial(jax.lax.pmax, axis_name=BATCH)


def first_row(local_rows: int) -> jax.Array:
    """Returns the position, int32 [], of this device's row 0 in the global batch of `local_rows` a device."""
    return jax.lax.axis_index(BATCH) * local_rows


def all_gather_parameter(shard: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Returns the whole parameter of which `shard` is this device's part, as a value that varies over the mesh.

    Call it once a step, outside loops: its transpose is one reduce-scatter, else each micro-batch would have one.
    """
    split = [axis for axis, name in enumerate(spec) if name == "fsdp"]
    if not split:
        return varying(shard)
    shard = jax.lax.pcast(shard, "data", to="varying")
    return jax.lax.all_gather(shard, "fsdp", axis=split[0], tiled=True)

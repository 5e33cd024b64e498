"""Meshes over several slices (hosts with GPUs, joined TPU slices), on devices that stand in for those."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from rice_jax.parallel.mesh import Mesh, batch_sharding, make_mesh, process_rows, slice_sizes, to_global
from tests import official


@dataclasses.dataclass(frozen=True)
class Client:
    own: int

    def process_index(self) -> int:
        return self.own


@dataclasses.dataclass(frozen=True)
class Device:
    """Has the attributes of jax's devices by which meshes and shardings go."""

    id: int
    process_index: int
    slice_index: int
    platform: str
    device_kind: str
    client: Client
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def gpus(hosts: int, *, each: int = 8, a_process: int = 8, own: int = 0) -> list[Any]:
    """Returns the GPUs of some hosts, `a_process` in each process, as process `own` sees them."""
    return [
        Device(i, i // a_process, i // each, "gpu", "NVIDIA H100 80GB HBM3", Client(own)) for i in range(hosts * each)
    ]


def tpus(slices: int, *, own: int = 0) -> list[Any]:
    """Returns the chips of some v5e slices of 2x2, each slice of one process."""
    places = [(x, y, 0) for y in range(2) for x in range(2)]
    return [
        Device(4 * s + i, s, s, "tpu", "TPU v5 lite", Client(own), coords=place)
        for s in range(slices)
        for i, place in enumerate(places)
    ]


DEVICES = {"1 host": gpus(1), "2 hosts": gpus(2), "3 hosts": gpus(3), "2 slices": tpus(2), "1 slice": tpus(1)}


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", DEVICES)
def test_parameters_are_split_inside_a_slice_or_the_mesh_is_refused(name: str, fsdp: int) -> None:
    devices = DEVICES[name]
    (size,) = set(slice_sizes(devices))
    if size % fsdp:
        with pytest.raises(ValueError, match=rf"fsdp.*{fsdp}") as refusal:
            make_mesh(data=-1, fsdp=fsdp, devices=devices)
        assert "\n" not in str(refusal.value)
        return
    mesh = make_mesh(data=-1, fsdp=fsdp, devices=devices)
    assert dict(mesh.shape) == {"data": len(devices) // fsdp, "fsdp": fsdp}
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices == slices[:, :1]).all()  # a row of the mesh shares parameters
    assert slices[:, 0].tolist() == sorted(slices[:, 0])  # the devices of a slice are neighbours along data


def test_an_fsdp_over_two_slices_is_refused_with_those_that_fit() -> None:
    found, do = "found 2 slices .*", r"set mesh.fsdp to 1 or 2 or 4 or 8, and mesh.data to -1\."
    with pytest.raises(ValueError, match=f"^mesh.fsdp 16 does not divide the 8 devices of a slice: {found}; {do}$"):
        make_mesh(data=1, fsdp=-1, devices=gpus(2))


def test_slices_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found 2 slices .* of 8, 4 devices; give slices of one size"):
        make_mesh(data=-1, fsdp=1, devices=gpus(2)[:12])


@pytest.mark.parametrize(("hosts", "a_process"), [(2, 8), (2, 1), (2, 4), (3, 2)])
@pytest.mark.parametrize("fsdp", [1, 2, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_each_row_of_a_batch_comes_from_one_process_and_its_place_depends_on_no_slice(
    hosts: int, a_process: int, fsdp: int, shuffled: bool
) -> None:
    """Device k of the mesh, data first, has rows 3 k to 3 k + 2 of the global batch, whatever slice it is of."""
    size, seen = 3 * hosts * 8, []
    for process in range(hosts * 8 // a_process):
        devices = gpus(hosts, a_process=a_process, own=process)
        if shuffled:  # jax lists the devices of one process after another, which need not be their slices' order
            devices = [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]
        mesh = make_mesh(data=-1, fsdp=fsdp, devices=devices)
        indices = batch_sharding(mesh).devices_indices_map((size,))
        for k, device in enumerate(mesh.devices.flat):
            assert indices[device][0].indices(size)[:2] == (3 * k, 3 * k + 3)
        rows = process_rows(size, mesh)
        own = [k for k, device in enumerate(mesh.devices.flat) if device.process_index == process]
        assert rows.tolist() == [row for k in own for row in range(3 * k, 3 * k + 3)]
        seen += rows.tolist()
    assert sorted(seen) == list(range(size))


def test_a_global_batch_has_its_rows_in_order_on_devices_in_another_order() -> None:
    """Real devices in an order that slices can give: those of the second slice first, each slice's own reversed."""
    devices = np.array(jax.devices())[[7, 6, 5, 4, 3, 2, 1, 0]].reshape(4, 2)
    mesh = Mesh(devices, ("data", "fsdp"), axis_types=official.mesh_of(4, 2).axis_types)
    rows = process_rows(16, mesh)
    assert np.asarray(to_global(rows, mesh)).tolist() == list(range(16))

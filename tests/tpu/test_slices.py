"""The table of slices: its three names agree, and its counts are those that libtpu and the cloud's pages give."""

import os
import subprocess
import sys

import pytest

from jaxrlhf.tpu.slices import GENERATIONS, Slice, find_slice, slices, table

# by hand: name, topology, chips, devices, hosts, chips a host
KNOWN = [
    ("v4-32", "v4:2x2x4", 16, 16, 4, 4),
    ("v5litepod-1", "v5e:1x1", 1, 1, 1, 1),
    ("v5litepod-8", "v5e:2x4", 8, 8, 1, 8),
    ("v5litepod-16", "v5e:4x4", 16, 16, 4, 4),
    ("v5litepod-256", "v5e:16x16", 256, 256, 64, 4),
    ("v5p-8", "v5p:2x2x1", 4, 4, 1, 4),
    ("v5p-128", "v5p:4x4x4", 64, 64, 16, 4),
    ("v6e-64", "v6e:8x8", 64, 64, 16, 4),
    ("tpu7x-8", "tpu7x:2x2x1", 4, 8, 1, 4),
    ("tpu7x-128", "tpu7x:4x4x4", 64, 128, 16, 4),
]


@pytest.mark.parametrize(("name", "topology", "chips", "devices", "hosts", "each"), KNOWN)
def test_a_slice_is_what_the_pages_say(name, topology, chips, devices, hosts, each):
    found = find_slice(name)
    assert (found.accelerator_type, found.topology) == (name, topology)
    assert (found.chips, found.devices, found.hosts, found.chips_per_host) == (chips, devices, hosts, each)
    assert find_slice(topology) == found


def test_every_name_leads_back_and_sizes_rise():
    for row in GENERATIONS.values():
        rows = slices(row)
        assert [each.chips for each in rows] == sorted({each.chips for each in rows})
        for each in rows:
            assert find_slice(each.accelerator_type) == find_slice(each.topology) == each
            assert each.hosts * each.chips_per_host == each.chips


def test_short_and_long_names_are_one():
    assert find_slice("v5e-16") == find_slice("v5litepod-16") == find_slice("v5e:4x4")
    assert find_slice("v5p:4x4x12").accelerator_type == "v5p-384"  # unusual, and still a box of whole hosts


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p-100", "v5p-100: no slice of this size, which counts 2 cores a chip; nearest: v5p-128; choices: v5p-8,"),
        ("v6e-0", "v6e-0: no slice of this size; nearest: v6e-1;"),
        ("v6e", "v6e: no slice of this size; nearest: v6e-1;"),
        ("v5e:4x4x4", "v5e:4x4x4: expected 2 sizes in chips, as in v5e:16x16"),
        ("v5e:2x8", "v5e:2x8: no slice of this layout; nearest: v5e:"),
        ("v5p:3x3x3", "v5p:3x3x3: no slice of this layout; nearest: v5p:"),
        ("v5p:32x32x32", "v5p:32x32x32: no slice of this layout; nearest: v5p:"),
        (
            "v5litpod-16",
            "v5litpod-16: no TPU slice, expected one such as v5litepod-8 or v5e:2x4; nearest: v5litepod-16",
        ),
        ("h100:8", "h100:8: no TPU slice, expected one such as v5litepod-8 or v5e:2x4; generations: v4, v5e, v5p,"),
        ("gpu", "gpu: no TPU slice, expected one such as v5litepod-8 or v5e:2x4; generations: v4, v5e, v5p,"),
    ],
)
def test_another_name_is_one_line_with_the_nearest(name, said):
    with pytest.raises(ValueError) as error:
        find_slice(name)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_the_table_is_printed():
    rows = table().splitlines()
    assert len(rows) == 2 + sum(len(row.layouts) for row in GENERATIONS.values())
    assert "| `v5p-128` | `v5p:4x4x4` | 64 | 64 | 16 | 6080 | `tpu-v5p-slice`, `4x4x4` |" in rows


COUNT = """
from jax.experimental import topologies
import sys
for name, options in [("v4:2x2x2", {"chip_config_name": "megacore"}), ("v5e:4x4", {}), ("v5p:2x2x2", {}),
                      ("v6e:4x8", {}), ("tpu7x:2x2x2", {})]:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    print(name, len(devices), len({device.process_index for device in devices}))
"""


def test_libtpu_counts_the_same():
    pytest.importorskip("libtpu")
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env={**os.environ, **settings}, capture_output=True, text=True, check=True
    )
    for line in done.stdout.splitlines():
        name, devices, hosts = line.split()
        found: Slice = find_slice(name)
        assert (found.devices, found.hosts) == (int(devices), int(hosts))
    assert len(done.stdout.splitlines()) == 5

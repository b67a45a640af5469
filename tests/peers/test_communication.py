"""The counting behind docs/communication.json: a program whose collectives are known, and a small network."""

from functools import partial

import communication
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resnet50
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

SMALL = {"stages": (1,), "width": 4}
FEATURES = (4, 4, 4, 16, 16)  # of the small network's normalizations


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()), ("data",))


def test_places_and_bytes(mesh):
    @partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P(), check_vma=False)
    def program(x, rounds, flag):
        def pooled(value):
            return lax.psum(value, "data")

        def body(_, value):
            value = pooled(value * x[:6])
            return lax.cond(value[0] > 3, lambda: value * pooled(value[:5]).sum(), lambda: value)

        branch = lax.cond(flag, lambda: pooled(x[:7]), lambda: x[:7])
        return pooled(x[:3]).sum() + lax.all_gather(x[:2], "data").sum() + branch.sum(), lax.fori_loop(
            0, rounds, body, x[:6]
        )

    text = jax.jit(program).lower(jnp.zeros(64), 3, True).compile().as_text()
    assert sorted((found.kind, found.place, found.bytes) for found in hlo.collectives(text)) == [
        ("all-gather", "once", 2 * 4),
        ("all-reduce", "branch", 5 * 4),
        ("all-reduce", "branch", 7 * 4),
        ("all-reduce", "loop", 6 * 4),
        ("all-reduce", "once", 3 * 4),
    ]


def test_asynchronous_pairs_and_memory_on_the_chip():
    """As the TPU compiler writes them: sums in one tuple, a copy into memory space 1, layouts with brackets."""
    text = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: bf16[4,8], y: f32[5]) -> f32[5] {
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[5]{0:T(128)} parameter(1)
  %near = (f32[5]{0:T(128)S(1)}, f32[5]{0:T(128)}, u32[]{:S(2)}) copy-start(%y)
  %y.1 = f32[5]{0:T(128)S(1)} copy-done(%near)
  %start = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[5]{0:T(128)S(1)}) all-reduce-start(%x, %y.1), to_apply=%add
  %done = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[5]{0:T(128)S(1)}) all-reduce-done(%start)
  ROOT %part = f32[5]{0:T(128)S(1)} get-tuple-element(%done), index=1
}
"""
    (found,) = hlo.collectives(text)
    assert (found.kind, found.place, found.bytes) == ("all-reduce", "once", 4 * 8 * 2 + 5 * 4)
    assert hlo.traffic(text) == {"once": 5 * 4 + 4 * 8 * 2, "loop": 0, "branch": 0}


def test_a_ring():
    assert hlo.sent("all-reduce", 80, 8) == 140 and hlo.sent("all-gather", 10, 8) == 70


@pytest.mark.parametrize("mode", communication.MODES)
def test_a_small_network(mesh, mode):
    counted = {}
    for norm in ("jbn", "flax fast"):
        kind = resnet50.NORMS[norm]
        arguments = resnet50.inputs(kind, mesh, batch=2, size=16, **SMALL)
        compiled = resnet50.make_step(kind, mesh, mode, **SMALL).lower(*arguments).compile()
        counted[norm] = communication.count(compiled.as_text(), mesh.size)
    jbn, flax = counted["jbn"], counted["flax fast"]
    # Where a mean is far from 0, on CPU: both sums about it forward, and one backward.
    rare = 4 * sum(3 * size for size in FEATURES) if mode == "jit" else 0
    looped = 4 * sum(2 * size + 1 for size in FEATURES) if mode == "shard_map" else 0
    assert (jbn["norm_bytes"]["branch"], jbn["norm_bytes"]["loop"]) == (rare, looped)
    assert jbn["norm_bytes"]["once"] + looped <= flax["norm_bytes"]["once"]
    assert jbn["other_bytes"] == flax["other_bytes"]

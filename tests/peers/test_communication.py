"""The counting behind docs/communication.json: a program whose collectives are known, and small networks."""

from functools import partial

import communication
import example
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resnet50
import six_layers
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P


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


def test_branches_and_kernels():
    """As compilers write them: a loop around a fusion, a conditional, arithmetic on scalars, a message and a copy."""
    text = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[5]) -> f32[5] {
  %p = f32[5]{0} parameter(0)
  %sine = f32[5]{0} sine(%p)
  ROOT %twice = f32[5]{0} add(%sine, %sine)
}

%body (q: f32[5]) -> f32[5] {
  %q = f32[5]{0} parameter(0)
  ROOT %moved = f32[5]{0} fusion(%q), kind=kLoop, calls=%fused
}

%goes_on (r: f32[5]) -> pred[] {
  %r = f32[5]{0} parameter(0)
  %total = f32[] reduce(%r), dimensions={0}, to_apply=%add
  ROOT %less = pred[] compare(%total, %total), direction=LT
}

%kept (s: f32[5]) -> f32[5] {
  ROOT %s = f32[5]{0} parameter(0)
}

%turned (t: f32[5]) -> f32[5] {
  %t = f32[5]{0} parameter(0)
  ROOT %minus = f32[5]{0} negate(%t)
}

ENTRY %main (x: f32[5], flag: pred[]) -> f32[5] {
  %x = f32[5]{0} parameter(0)
  %flag = pred[] parameter(1)
  %loop = f32[5]{0} while(%x), condition=%goes_on, body=%body
  %choice = f32[5]{0} conditional(%flag, %loop, %loop), true_computation=%kept, false_computation=%turned
  %near = (f32[5]{0:S(1)}, f32[5]{0}, u32[]) copy-start(%choice)
  %near.1 = f32[5]{0:S(1)} copy-done(%near)
  %pooled = f32[5]{0} all-reduce(%near.1), to_apply=%add
  ROOT %solved = (f32[5]{0}, u8[0]{0}) custom-call(%pooled), custom_call_target="solve"
}
"""
    assert hlo.branches(text) == 2
    assert hlo.kernels(text) == {"fusion": 1, "reduce": 1, "negate": 1, "custom-call": 1}


def test_a_ring():
    assert hlo.sent("all-reduce", 80, 8) == 140 and hlo.sent("all-gather", 10, 8) == 70


# Its step and the step's inputs, for a norm, a mesh and a mode; its params and state.
SMALL = {"stages": (1,), "width": 4}
NETWORKS = {
    "ResNet": (
        lambda norm, mesh, mode: resnet50.make_step(norm, mesh, mode, **SMALL),
        lambda norm, mesh: resnet50.inputs(norm, mesh, batch=2, size=16, **SMALL),
        partial(resnet50.init, **SMALL),
    ),
    "six layers": (
        six_layers.make_step,
        lambda norm, mesh: six_layers.inputs(norm, mesh, batch=2, size=4),
        six_layers.init,
    ),
    "six layers, silu": (
        partial(six_layers.make_step, activation=jax.nn.silu),
        lambda norm, mesh: six_layers.inputs(norm, mesh, batch=2, size=4),
        six_layers.init,
    ),
}


@pytest.mark.parametrize(("make_step", "inputs", "init"), NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("mode", communication.MODES)
def test_a_small_network(mesh, mode, make_step, inputs, init):
    counted = {}
    for name in ("jbn", "flax fast"):
        norm = resnet50.NORMS[name]
        compiled = make_step(norm, mesh, mode).lower(*inputs(norm, mesh)).compile()
        counted[name] = communication.count(compiled.as_text(), mesh.size, communication.besides_norms(init))
    jbn, flax = counted["jbn"], counted["flax fast"]
    assert jbn["branches"] == 0
    assert jbn["collectives"].total() <= flax["collectives"].total()
    assert 0 < jbn["norm_bytes"] <= flax["norm_bytes"]
    assert jbn["other_bytes"] == flax["other_bytes"]


def test_the_examples_step(mesh):
    small = {"width": 4}
    init = partial(example.init, **small)
    others = 3 + 16 * (32 * 32 * 3 + 1) - example.FIXED  # as in `communication.NETWORKS`, for 16 images
    counted = {}
    for name in ("jbn", "jbn, relu behind", "flax fast"):
        norm = resnet50.NORMS[name]
        step = example.make_step(norm, mesh, batch=16)
        text = step.lower(*example.inputs(norm, mesh, batch=16, **small)).compile().as_text()
        counted[name] = communication.count(text, mesh.size, communication.besides_norms(init, others))
    assert counted["jbn"]["branches"] == counted["flax fast"]["branches"]  # the loops of random numbers on a CPU
    jbn, flax = counted["jbn"], counted["flax fast"]
    assert 0 < jbn["norm_bytes"] == counted["jbn, relu behind"]["norm_bytes"] <= flax["norm_bytes"]
    assert jbn["other_bytes"] == flax["other_bytes"]

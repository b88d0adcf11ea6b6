"""Collectives read out of HLO: on a module written by hand, and on what XLA makes for eight fake devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf.plan.hlo import Collective, collectives, group_size
from jaxrlhf.sharding import MeshConfig, make_mesh

# a loop of 3 (its condition says so) around a loop of 5 (XLA says so), a fused gather printed three times under one
# channel, one of its steps in the inner loop, an asynchronous gather whose shape names its operand too, and a sum of
# two arrays
MODULE = """HloModule jit_f, entry_computation_layout={()->f32[]}

%fused_start (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %ag.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
}

%fused_done (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %ag.2 = bf16[8,8]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
}

%fused_step (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %ag.3 = bf16[8,8]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
}

%inner (s: (s32[], f32[16])) -> (s32[], f32[16]) {
  %f3 = bf16[8,8]{1,0} fusion(%a), kind=kCustom, calls=%fused_step
  %rs = f32[4]{0} reduce-scatter(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}

%five (s: (s32[], f32[16])) -> pred[] {
  %n = s32[] constant(9)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (s: (s32[], f32[16])) -> (s32[], f32[16]) {
  %two = (s32[], f32[16]) while(%t), condition=%five, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %f1 = bf16[8,8]{1,0} fusion(%a), kind=kCustom, calls=%fused_start
  %f2 = bf16[8,8]{1,0} fusion(%a), kind=kCustom, calls=%fused_done
}

%cond (s: (s32[], f32[16])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  %lt = pred[] compare(%i, %n), direction=LT
  ROOT %and = pred[] and(%lt, %go)
}

%endless (s: (s32[])) -> pred[] {
  ROOT %go = pred[] custom-call(%s)
}

%endless_body (s: (s32[])) -> (s32[]) {
  %cp = f32[10]{0} collective-permute(%x), channel_id=4, source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (a: f32[16]) -> f32[] {
  %loop = (s32[], f32[16]{0}) while(%t), condition=%cond, body=%body
  %forever = (s32[]) while(%u), condition=%endless, body=%endless_body
  %ags = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%a), channel_id=2, replica_groups=mesh['x'=2,'y'=4] {'y'}
  %agd = f32[8,4]{1,0} all-gather-done(%ags)
  ROOT %ar = (f32[], bf16[100]{0}) all-reduce(%a, %b), channel_id=3, replica_groups={{0,1}}, to_apply=%add
}
"""


def test_a_module_written_by_hand():
    found = {one.kind: one for one in collectives(MODULE)}
    assert list(found) == ["all-gather", "all-reduce", "reduce-scatter", "collective-permute"]
    gathered = 3 * 8 * 8 * 2 + 8 * 4 * 4
    assert found["all-gather"] == Collective("all-gather", 3 + 1, gathered, 3 * 64 + 96, False)
    assert found["all-reduce"] == Collective("all-reduce", 1, 4 + 200, 204, False)
    assert found["reduce-scatter"] == Collective("reduce-scatter", 15, 15 * 64, 15 * 48, False)
    assert found["collective-permute"] == Collective("collective-permute", 1, 40, 40, True)


# what is written by hand has one channel: two gathers beside each other, two sums that keep a part, two gathers that
# are fused, one of them with a step in a loop of 5
MANUAL = """HloModule jit_f, entry_computation_layout={()->f32[]}

%first.1 (p: bf16[4]) -> bf16[8] {
  ROOT %ag.1 = bf16[8]{0} all-gather(%p), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
}

%second.1 (p: bf16[4]) -> bf16[8] {
  ROOT %ag.2 = bf16[8]{0} all-gather(%p), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
}

%async_collective_fusion.3 (p: bf16[4]) -> bf16[8] {
  ROOT %ag.3 = bf16[8]{0} all-gather(%p), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
}

%last.1 (p: bf16[4]) -> bf16[8] {
  ROOT %ag.4 = bf16[8]{0} all-gather(%p), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
}

%all-reduce-scatter.1 (p: f32[4]) -> f32[2] {
  %ar.1 = f32[4]{0} all-reduce(%p), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add
}

%all-reduce-scatter.2 (p: f32[4]) -> f32[2] {
  %ar.2 = f32[4]{0} all-reduce(%p), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add
}

%body (s: (s32[])) -> (s32[]) {
  %fusion.3 = bf16[8]{0} fusion(%b), kind=kCustom, calls=%async_collective_fusion.3
}

ENTRY %main (a: bf16[4]) -> f32[] {
  %ag.5 = bf16[8]{0} all-gather(%a), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
  %ag.6 = bf16[8]{0} all-gather(%b), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
  %async-collective-start.1 = bf16[8]{0} fusion(%a), kind=kCustom, calls=%first.1
  %loop = (s32[]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %async-collective-done.1 = bf16[8]{0} fusion(%a), kind=kCustom, calls=%last.1
  %async-collective-start = bf16[8]{0} fusion(%a), kind=kCustom, calls=%second.1
  %f.1 = f32[2]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %f.2 = f32[2]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.2
}
"""


def test_what_has_one_channel_is_counted_one_by_one():
    found = {one.kind: one for one in collectives(MANUAL)}
    assert list(found) == ["all-gather", "reduce-scatter"]
    assert found["all-gather"] == Collective("all-gather", 4, 4 * 16, 4 * 8, False)
    assert found["reduce-scatter"] == Collective("reduce-scatter", 2, 2 * 16, 2 * 8, False)


def test_a_condition_says_as_much_where_it_is_fused():
    name, inside = "%cond (s: (s32[], f32[16])) -> pred[] {", "%both (i: s32[], go: pred[]) -> pred[] {"
    call = "  ROOT %fusion = pred[] fusion(%i, %go), kind=kLoop, calls=%both\n}\n"
    fused = MODULE.replace(name, inside).replace("%endless (s:", f"{name}\n{call}\n%endless (s:", 1)
    assert fused.count("%both") == 2 and collectives(fused) == collectives(MODULE)


@pytest.mark.parametrize(
    "attributes, size",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=2,'b'=3,'c'=4] {'a','c'}, x", 8),
        ("source_target_pairs={{0,1}}", 2),
    ],
)
def test_group_sizes(attributes, size):
    assert group_size(attributes) == size


def test_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("HloModule nothing")


def test_what_xla_makes_of_a_scan_over_sharded_weights():
    """Each of 6 layers' weights [16, 16] is gathered from 4 devices: XLA's own text, counted through its loop."""
    mesh = make_mesh(MeshConfig(2, 4, 1), jax.devices()[:8])
    with jax.set_mesh(mesh):

        def layer(x, weight):
            whole = jax.sharding.reshard(weight, P(None, None))
            return jnp.tanh(jnp.einsum("bd,de->be", x, whole, out_sharding=P(("data", "fsdp"), None))), None

        shape = lambda dims, spec: jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, spec))
        x, weights = shape((8, 16), P(("data", "fsdp"), None)), shape((6, 16, 16), P(None, "fsdp", None))
        program = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0]).lower(x, weights).compile()
    found = {one.kind: one for one in collectives(program.as_text() or "")}
    assert found["all-gather"] == Collective("all-gather", 6, 6 * 16 * 16 * 4, 6 * 16 * 16 * 3, False)

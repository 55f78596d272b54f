"""Compiled programs: collectives and their links, memory traffic, what is held at the peak."""

import dataclasses
import math
import types

import numpy as np
import pytest

from jaxmodels.training.plan import buffers, traffic
from jaxmodels.training.plan.collectives import Collective, Network, collectives, group

HLO = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(44)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%start.1 (q: bf16[3,32]) -> (bf16[3,32], bf16[3,128]) {
  %ag.1 = bf16[3,128]{1,0:T(8,128)} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}
}

%done.1 (q: bf16[3,32]) -> bf16[3,128] {
  %ag.2 = bf16[3,128]{1,0:T(8,128)} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (bf16[3,32], bf16[3,128]) fusion(%q), kind=kCustom, calls=%start.1
  %d = bf16[3,128] fusion(%s), kind=kCustom, calls=%done.1
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%condition.1, body=%body.1
  %ar = f32[25]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3,4}}, to_apply=%add
  %rs = f32[6] reduce-scatter(%x), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, to_apply=%add
  %cp = (bf16[10], bf16[10]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_are_counted_by_kind_and_loop_iteration():
    found = {collective.kind: (collective.count, collective.moved) for collective in collectives(HLO)}
    assert found == {
        "all-gather": (44, 44 * 3 * 128 * 2 * 3 / 4),  # once, though its start and its end both name it
        "all-reduce": (1, 2 * 25 * 4 * 4 / 5),
        "reduce-scatter": (1, 6 * 4 * 1),
        "collective-permute": (1, 10 * 2),
    }


def moved(line: str, n: int = 4) -> float:
    """Bytes that each of n devices sends for a program of one line."""
    groups = f"channel_id=1, replica_groups={{{{{','.join(map(str, range(n)))}}}}}"
    (found,) = collectives(f"ENTRY %main.1 (x: f32[8]) -> f32[8] {{\n  %c = {line}, {groups}\n}}\n")
    return found.moved


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # several gradients in one, as XLA's combiner writes it
        ("(f32[25]{0:T(128)}, bf16[3,5]{1,0:T(8,128)(2,1)}, f32[]) all-reduce(%x, %y, /*index=2*/%z)", 2 * 134 * 3 / 4),
        ("(f32[25]{0}, bf16[3,5]{1,0}) all-reduce-start(%x, %y)", 2 * 130 * 3 / 4),
        ("((f32[25]{0}), f32[25]{0}, s32[]) all-reduce-start(%x)", 2 * 100 * 3 / 4),
        ("(bf16[3,5]{1,0:T(8,128)(2,1)}, bf16[3,20]{1,0:T(8,128)(2,1)}) all-gather-start(%x)", 120 * 3 / 4),
        ("((f32[7]{0}, f32[2]{0}), (f32[28]{0}, f32[8]{0})) all-gather-start(%x, %y)", 144 * 3 / 4),
        ("(bf16[5]{0}, bf16[5]{0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)", 10),
        ("((f32[5], s8[3]), (f32[5], s8[3]), u32[], u32[]) collective-permute-start(%x, %y)", 23),
        ("((f32[28]{0}), f32[7]{0}, s32[]) reduce-scatter-start(%x)", 28 * 3),
        ("(f32[7]{0}, f32[2]{0}) reduce-scatter(%x, %y)", 36 * 3),
        ("(s8[6]{0}, s8[6]{0}, s8[6]{0}, s8[6]{0}) all-to-all(%a, %b, %c, %d)", 24 * 3 / 4),
    ],
)
def test_a_collective_of_several_arrays_moves_each_once(line, expected):
    assert moved(line) == expected


RING = """
%cond_rs.1 (p.1: (bf16[192,6], u32[])) -> pred[] {
  %constant.7 = u32[]{:T(128)} constant(16), metadata={op_name="dot_general"}
  %p.1 = (bf16[192,6]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=1
  ROOT %compare.6 = pred[]{:T(512)} compare(%i.1, %constant.7), direction=LT
}

%body_rs.1 (p.2: (bf16[192,6], u32[])) -> (bf16[192,6], u32[]) {
  %two..sunk = u32[]{:T(128)} constant(2)
  %p.2 = (bf16[192,6]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %i.2 = u32[]{:T(128)} get-tuple-element(%p.2), index=1
  %permute.1 = bf16[192,6]{1,0} collective-permute(%a), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %permute.2 = bf16[192,6]{1,0} collective-permute(%permute.1), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %ag.2 = bf16[3,20]{1,0} all-gather(%q), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={1}
  %add.9 = u32[]{:T(128)} add(%i.2, %two..sunk), metadata={op_name="dot_general"}
  ROOT %tuple.5 = (bf16[192,6]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%permute.2, /*index=1*/%add.9)
}

ENTRY %main (x: bf16[192,6]) -> bf16[192,6] {
  %ag.1 = bf16[3,20]{1,0} all-gather(%q), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={1}
  %w = (bf16[192,6], u32[]) while(%t), condition=%cond_rs.1, body=%body_rs.1
}
"""


def test_a_ring_around_a_product_has_an_unsigned_counter_and_two_unrolled_iterations():
    ring = Collective("collective-permute", 16, 16 * 192 * 6 * 2)
    overlapped = Collective(
        "all-gather", 1, 3 * 20 * 2 * 3 / 4
    )  # starts before the loop, and is done in its iterations
    assert collectives(RING) == [ring, overlapped]


TPU_REDUCE_SCATTER = """
%all-reduce-scatter.3 (input.7: f32[28,5]) -> f32[7,5] {
  %input.7 = f32[28,5]{1,0:T(8,128)} parameter(0)
  %all-reduce.4 = f32[28,5]{1,0:T(8,128)} all-reduce(%input.7), channel_id=5, replica_groups={{0,2,4,6},{1,3,5,7}}
  ROOT %dynamic-slice.9 = f32[7,5]{1,0:T(8,128)} dynamic-slice(%all-reduce.4, %i, %j), dynamic_slice_sizes={7,5}
}

ENTRY %main (x: f32[28,5]) -> f32[7,5] {
  ROOT %f = f32[7,5]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_a_tpus_fused_reduce_scatter_is_not_counted_as_an_all_reduce():
    assert collectives(TPU_REDUCE_SCATTER) == [Collective("reduce-scatter", 1, 28 * 5 * 4 * 3 / 4)]


@dataclasses.dataclass(frozen=True)
class Chip:
    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"


def network(kind: str, grid: tuple[int, int, int], shape: tuple[int, ...], axes: tuple[str, ...]) -> Network:
    """Network of a mesh whose devices are in the order of their coordinates."""
    devices = np.empty(math.prod(grid), object)
    devices[:] = [Chip(place, kind) for place in np.ndindex(grid)]
    return Network(types.SimpleNamespace(shape=dict(zip(axes, shape, strict=True)), devices=devices.reshape(shape)))


@pytest.mark.parametrize(
    ("line", "members"),
    [
        ("replica_groups={{1,3},{0,2}}", [1, 3]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=3,'c'=2] {'a','c'}", [0, 1, 6, 7]),
        ("source_target_pairs={{0,2},{2,5},{5,0},{1,3},{3,1}}", [0, 2, 5]),
    ],
)
def test_the_devices_of_a_group_are_read_in_each_notation(line, members):
    assert group(line) == members


def test_a_group_has_the_links_of_the_physical_axes_that_it_lies_along():
    link = 200e9 / 4
    wide = network("TPU v5 lite", (2, 4, 1), (4, 2), ("fsdp", "tensor"))
    assert wide.axes([0, 2, 4, 6]) == "fsdp"
    assert wide.axes([0, 1]) == "tensor"
    assert wide.axes(range(8)) == "fsdp·tensor"
    assert wide.bandwidth([0, 1]) == link  # neighbors on an axis that is not closed
    assert wide.bandwidth(range(8)) == 2 * link
    assert wide.bandwidth([0, 2]) == link / 2  # two groups alternate along one axis
    pod = network("TPU v5 lite", (16, 16, 1), (16, 16), ("fsdp", "tensor"))
    assert pod.bandwidth(range(16)) == 2 * link  # 16 chips of v5e are a ring
    cube = network("TPU v4", (4, 4, 4), (64,), ("fsdp",))
    assert cube.bandwidth(range(64)) == 6 * 300e9 / 6
    flat = network("TPU v4", (2, 2, 1), (4,), ("fsdp",))
    assert flat.bandwidth(range(4)) == 2 * 300e9 / 6


def test_collectives_are_told_apart_by_axis_and_timed():
    chips_ = network("TPU v5 lite", (2, 4, 1), (4, 2), ("fsdp", "tensor"))
    devices = np.array([[Chip(chips_.coordinates[2 * i + j], chips_.kind) for j in range(2)] for i in range(4)])
    mesh = types.SimpleNamespace(shape=chips_.shape, devices=devices)
    found = {(each.kind, each.axes): each for each in collectives(HLO, mesh)}
    moved = 44 * 3 * 128 * 2 * 3 / 4
    gather = found["all-gather", "fsdp"]
    assert (gather.count, gather.moved) == (44, moved)
    assert gather.seconds == pytest.approx(moved / chips_.bandwidth([0, 2, 4, 6]))
    assert ("reduce-scatter", "tensor") in found


TRAFFIC = """
%fused_slice (a: f32[44,5], i: s32[]) -> f32[1,5] {
  %a = f32[44,5]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %ds = f32[1,5]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,5}
}

%fused_update (b: f32[44,5], u: f32[1,5], j: s32[]) -> f32[44,5] {
  %b = f32[44,5]{1,0} parameter(0)
  %u = f32[1,5]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %dus = f32[44,5]{1,0} dynamic-update-slice(%b, %u, %j, %j)
}

%async_collective_fusion.1 (g: bf16[6,5], h: bf16[24,5], c: f32[3,2]) -> (f32[3,2], bf16[6,5], bf16[24,5]) {
  %g = bf16[6,5]{1,0} parameter(0)
  %h = bf16[24,5]{1,0} parameter(1)
  %c = f32[3,2]{1,0} parameter(2)
  %m = f32[3,2]{1,0} multiply(%c, %c)
  %ag = bf16[24,5]{1,0} all-gather(%g), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %out = (f32[3,2]{1,0}, bf16[6,5]{1,0}, bf16[24,5]{1,0}) tuple(%m, %g, %ag)
}

%cond (p: (s32[], f32[44,5])) -> pred[] {
  %bound = s32[]{:T(128)S(6)} constant(44)
  %n = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:S(6)} compare(%n, %bound), direction=LT
}

%body (p: (s32[], f32[44,5])) -> (s32[], f32[44,5]) {
  %x = f32[44,5]{1,0} get-tuple-element(%p), index=1
  %k = s32[]{:S(6)} get-tuple-element(%p), index=0
  %f.1 = f32[1,5]{1,0:T(8,128)S(1)} fusion(%x, %k), kind=kLoop, calls=%fused_slice
  %f.2 = f32[44,5]{1,0:T(8,128)} fusion(%x, %f.1, %k), kind=kLoop, calls=%fused_update
  ROOT %t = (s32[], f32[44,5]) tuple(%k, %f.2)
}

ENTRY %main (x: f32[44,5]) -> f32[44,5] {
  %y = f32[44,5]{1,0} parameter(0)
  %w = (s32[], f32[44,5]) while(%t0), condition=%cond, body=%body
  %g0 = bf16[6,5]{1,0:S(1)} get-tuple-element(%w), index=2
  %h0 = bf16[24,5]{1,0} get-tuple-element(%w), index=3
  %c0 = f32[3,2]{1,0} get-tuple-element(%w), index=4
  %fc = (f32[3,2]{1,0}, bf16[6,5]{1,0}, bf16[24,5]{1,0}) fusion(%g0, %h0, %c0), calls=%async_collective_fusion.1
  %cs = (bf16[7,3]{1,0:S(1)}, bf16[7,3]{1,0}, u32[]{:S(2)}) copy-start(%z), cross_program_prefetch_index=0
  %ss = ((f32[44,5]{1,0}), f32[3,5]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%y), slice={[0:3], [0:5]}
  ROOT %neg = f32[44,5]{1,0} negate(%y)
}
"""


def test_memory_traffic_counts_slices_and_updates_in_each_iteration_and_nothing_in_vmem():
    row, array = 5 * 4, 44 * 5 * 4
    assert (
        traffic.accessed(TRAFFIC) == 44 * (row + row) + 7 * 3 * 2 + 3 * row + 2 * array + 2 * 3 * 2 * 4
    )  # and what the all-gather runs beside


REPORT = {
    "": """
ENTRY %main (a: f32[10,6]) -> f32[10,6] {
  %param.1 = f32[10,6]{1,0} parameter(0), metadata={op_name="state.params['w']"}
  %param.2 = f32[10,6]{1,0} parameter(1), metadata={op_name="state.optimizer[0].mu['w']"}
  %all-gather.1 = bf16[40,6]{1,0} all-gather(%param.1), replica_groups={{0,1,2,3}}, dimensions={0}
  %save.1 = f32[5,7,6]{2,1,0} broadcast(%param.1), metadata={op_name="jit(step)/jvp()/tanh"}
  %logits.1 = f32[7,97]{1,0} fusion(%all-gather.1), metadata={op_name="jit(step)/jvp()/dot_general"}
  %grad.1 = f32[10,6]{1,0} fusion(%logits.1), metadata={op_name="jit(step)/transpose(jvp())/dot_general"}
  %heads.1 = bf16[7,2,8]{2,1,0} fusion(%logits.1), metadata={op_name="jit(step)/transpose(jvp())/mul"}
}
""",
    "-buffer-assignment": """
allocation 0: size 512, parameter 0, shape |f32[10,6]| at ShapeIndex {}, maybe-live-out:
 value: <9 later.1 @0> (size=512,offset=0): f32[10,6]{1,0}
 value: <1 param.1 @0> (size=512,offset=0): f32[10,6]{1,0}
allocation 1: size 1024, parameter 1, shape |f32[10,6]| at ShapeIndex {}:
 value: <2 param.2 @0> (size=1024,offset=0): f32[10,6]{1,0}
allocation 2: size 16, constant:
 value: <3 c.1 @0> (size=16,offset=0): f32[]
allocation 3: size 10000, preallocated-temp:
 value: <4 all-gather.1 @0> (size=1000,offset=0): bf16[40,6]{1,0}
 value: <5 save.1 @0> (size=2000,offset=1000): f32[5,7,6]{2,1,0}
 value: <6 logits.1 @0> (size=4000,offset=3000): f32[7,97]{1,0}
 value: <7 grad.1 @0> (size=1500,offset=7000): f32[10,6]{1,0}
 value: <8 same.1 @0> (size=1500,offset=7000): f32[10,6]{1,0}
 value: <11 heads.1 @0> (size=300,offset=8500): bf16[7,2,8]{2,1,0}
 value: <12 odd.1 @0> (size=30,offset=8800): bf16[15]{0}
allocation 4: size 9999, color 1, preallocated-temp:
 value: <10 vmem.1 @1> (size=9999,offset=0): f32[7,97]{1,0:S(1)}
""",
    "-live-range": """
  BufferLiveRange:
    all-gather.1{}:3-6
    save.1{}:4-9
    logits.1{}:5-6
    grad.1{}:6-8
    same.1{}:6-8
    heads.1{}:6-7
    odd.1{}:5-7
    vmem.1{}:3-9
""",
}


def test_the_buffer_report_names_what_is_held_at_the_peak(tmp_path):
    shapes = buffers.Shapes.of([((40, 6), (10, 6))], [97], tokens=14)
    assert buffers.parts_at_peak(tmp_path, shapes) == {}
    for end, text in REPORT.items():
        (tmp_path / f"module_0001.jit_step.after_optimizations{end}.txt").write_text(text)
    assert buffers.parts_at_peak(tmp_path, shapes) == {
        "parameters": 512,
        "optimizer": 1024,
        "gathered weights": 1000,
        "saved activations": 2000,
        "logits": 4000,
        "gradients": 1500,
        "activations": 300,
        "other": 46,
    }

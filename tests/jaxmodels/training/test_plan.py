"""The planner: collectives, FLOPs, memory, errors."""

import importlib.util
import re
import subprocess

import pytest

from jaxmodels.training.experiment import EXPERIMENTS, experiment_class
from jaxmodels.training.plan import command, hlo
from jaxmodels.training.plan.flops import count
from tests.train_common import ROOT, start

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
    found = {collective.kind: (collective.count, collective.moved) for collective in hlo.collectives(HLO)}
    assert found == {
        "all-gather": (44, 44 * 3 * 128 * 2 * 3 / 4),  # once, though its start and its end both name it
        "all-reduce": (1, 2 * 25 * 4 * 4 / 5),
        "reduce-scatter": (1, 6 * 4 * 1),
        "collective-permute": (1, 10 * 2),
    }


def moved(line: str, n: int = 4) -> float:
    """Bytes that each of n devices sends for a program of one line."""
    groups = f"channel_id=1, replica_groups={{{{{','.join(map(str, range(n)))}}}}}"
    (found,) = hlo.collectives(f"ENTRY %main.1 (x: f32[8]) -> f32[8] {{\n  %c = {line}, {groups}\n}}\n")
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
    ring = hlo.Collective("collective-permute", 16, 16 * 192 * 6 * 2)
    overlapped = hlo.Collective(
        "all-gather", 1, 3 * 20 * 2 * 3 / 4
    )  # starts before the loop, and is done in its iterations
    assert hlo.collectives(RING) == [ring, overlapped]


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
    assert hlo.collectives(TPU_REDUCE_SCATTER) == [hlo.Collective("reduce-scatter", 1, 28 * 5 * 4 * 3 / 4)]


def test_matrix_products_are_counted_per_loop_iteration():
    import jax
    import jax.numpy as jnp

    def f(x, w):
        x, _ = jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x.T @ x, lambda x: x, x)

    expected = 11 * 2 * 3 * 5 * 5 + 2 * 3 * 3 * 5 + 2 * 3 * 3 * 5
    assert count(f, jnp.ones((3, 5)), jnp.ones((11, 5, 5))) == expected


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_listed_script_has_an_experiment_with_presets(name):
    kind = experiment_class(name)
    assert kind.__module__ == EXPERIMENTS[name]
    described = kind.config_class.describe_presets()
    for preset in kind.config_class.PRESETS:
        assert f"{preset}: " in described
        experiment = kind(kind.config_class.of_preset(preset))
        assert type(experiment.config) is kind.config_class


def test_every_script_that_trains_is_listed():
    scripts = {f"train.{file.stem}" for file in (ROOT / "train").glob("*.py") if "EXPERIMENT = " in file.read_text()}
    assert scripts == set(EXPERIMENTS.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "^experiment is missing.*rope"),
        (["unheard"], "^experiment='unheard'.*rope"),
        (["unheard.of"], "^experiment='unheard.of'"),
        (["jaxmodels.text"], "^jaxmodels.text has EXPERIMENT=None"),
        (["rope", "--topology", "v3:2x2"], "topology='v3:2x2'.*v4, v5e, v5p, v6e"),
        (["rope", "--topology", "v5e:axb"], "topology='v5e:axb'.*v5e:2x4"),
        (["rope", "--topology", "v5e:2x"], "topology='v5e:2x'.*v5e:2x4"),
        (["rope", "--preset", "huge"], "preset='huge'.*small, original"),
        (["rope", "--n-vocab", "0"], "n_vocab=0 must be at least 1"),
    ],
)
def test_bad_input_is_a_value_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        command.plan(arguments)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (extra plan)"
)
SMALL = ["--n-layers", 1, "--seq-len", 32, "--d-ff", 128, "--heads", 2, "--batch-size", 16]


def planned(experiment: str, *flags: object) -> subprocess.Popen:
    return start("train.plan", experiment, *flags)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiments_step_compiles_for_a_v5e(experiment):
    process = planned(experiment, *SMALL, "--topology", "v5e:2x4", "--mesh", "fsdp=4,tensor=2")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "8 × TPU v5 lite: data 1, fsdp 4, tensor 2" in out
    assert re.search(r"memory per device +0\.\d+ of 15.75 GiB", out)
    assert re.search(r"all-(gather|reduce) +\d+ a step, [\d.e-]+ GiB sent per device", out)
    assert re.search(r"a step takes at least +[\d.e-]+ ms, bound by", out)
    assert out.rstrip().endswith("fits")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("topology", "kind"), [("v5p:2x2x1", "4 × TPU v5: "), ("v6e:1x1", "1 × TPU v6 lite: ")])
def test_other_generations_compile(topology, kind):
    process = planned("rope", *SMALL, "--topology", topology)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert kind in out


@pytest.mark.slow
@needs_libtpu
def test_a_step_that_does_not_fit_is_refused_with_suggestions():
    flags = ["--n-layers", 1, "--seq-len", 256, "--batch-size", 16_384, "--topology", "v5e:1x1"]
    process = planned("rope", *flags)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert re.fullmatch(
        r"python -m train.plan: does not fit: it needs [\d.]+ GiB of memory per device, available 15.75 GiB; "
        r"parameters and optimizer take [\d.e-]+ GiB of it, activations the rest: try remat=layers, .*\n",
        err,
    )


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_before_an_experiment_lists_them(flag, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([flag], prog="jaxmodels plan")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: jaxmodels plan ")
    assert all(name in shown for name in EXPERIMENTS)

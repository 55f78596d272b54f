"""The planner: FLOPs, topologies, errors, and plans of every experiment."""

import importlib.util
import re
import subprocess

import pytest

from jaxmodels.training.experiment import EXPERIMENTS, experiment_class
from jaxmodels.training.plan import command
from jaxmodels.training.plan.flops import count
from jaxmodels.training.plan.topology import accelerators, chips, parse_topology
from tests.train_common import ROOT, start


def test_matrix_products_are_counted_per_loop_iteration():
    import jax
    import jax.numpy as jnp

    def f(x, w):
        x, _ = jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x.T @ x, lambda x: x, x)

    expected = 11 * 2 * 3 * 5 * 5 + 2 * 3 * 3 * 5 + 2 * 3 * 3 * 5
    assert count(f, jnp.ones((3, 5)), jnp.ones((11, 5, 5))) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e:2x4", ("v5e", "2x4")),
        ("v5e-8", ("v5e", "2x4")),
        ("v5litepod-16", ("v5e", "4x4")),
        ("v6e-256", ("v6e", "16x16")),
        ("v4-8", ("v4", "2x2x1")),  # the number counts TensorCores
        ("v5p-8", ("v5p", "2x2x1")),
        ("v5p-128", ("v5p", "4x4x4")),
    ],
)
def test_topologies_have_the_names_of_google_cloud(name, expected):
    assert parse_topology(name) == expected


def test_an_accelerators_number_counts_chips_or_tensor_cores():
    for generation, per_chip in {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}.items():
        for name, shape in accelerators(generation).items():
            assert int(name.partition("-")[2]) == per_chip * chips(shape)


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
        (["rope", "--topology", "v5e-7"], "topology='v5e-7'.*v5e:4x8.*v5e-4, v5e-8, v5e-16"),
        (["rope", "--topology", "v4-4"], "topology='v4-4'.*v4-8.*TensorCores"),
        (["rope", "--topology", "v7x-8"], "topology='v7x-8'.*v4, v5e, v5p, v6e"),
        (["rope", "--topology", "v5litepod:2x4"], "topology='v5litepod:2x4'"),
        (["rope", "--topology", ""], "topology=''.*v5e-8"),
        (["rope", "--preset", "huge"], "preset='huge'.*small, original"),
        (["rope", "--n-vocab", "0"], "n_vocab=0 must be at least 1"),
        (["rope", "--n-layers", "1000000000"], "n_layers=1000000000 must be at most 2,000"),
        (["rope", "--n-vocab", "1000000000000"], "n_vocab=1000000000000 must be .*at most 1,048,576"),
        (["rope", "--n-vocab", "2147483647"], "n_vocab=2147483647 must be .*at most 1,048,576"),
        (["rope", "--seq-len", "2147483647"], "seq_len=2147483647 must be at most 1,048,576"),
        (["rope", "--d-model", "1048580"], "d_model=1048580 must be at most 1,048,576"),
        (["rope", "--steps", "2147483648"], "steps=2147483648 must be at most 2,147,483,647"),
        (["rope", "--batch-size", "1048577"], "batch_size=1048577 must be at most 1,048,576"),
        (["retro", "--encoder-layers", "2001"], "encoder_layers=2001 must be at most 2,000"),
        (["retro", "--passes", "101"], "passes=101 must be at most 100"),
        (["retro", "--neighbors", "1001"], "neighbors=1001 must be at most 1,000"),
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
    assert re.search(r"all-(gather|reduce) over (fsdp|tensor) +\d+ a step, [\d.e-]+ GiB sent per device", out)
    assert re.search(r" optimizer +[\d.e-]+ GiB", out)
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
        r"python -m train.plan: does not fit: it needs [\d.]+ GiB of memory per device \(\w[^)]*\), "
        r"available 15.75 GiB; "
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

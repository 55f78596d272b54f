"""Optimizers and schedules against closed forms and PyTorch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels.training.optimizers import (
    adafactor,
    adam,
    adamw,
    clip_by_norm,
    lion,
    make_optimizer,
    make_schedule,
    muon,
    muon_axes,
    noam,
    scale_by_adam,
)

D, WARMUP, STEPS = 13, 7, 29
EPS = 0.1  # large, so that its place matters


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def gradients(seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"a": rng.normal(size=(3, 5)), "b": rng.normal(size=2) * 0.01} for _ in range(STEPS)]


def apply(transformation: optax.GradientTransformation, gradients: list, begun: dict | None = None) -> dict:
    """Parameters after one update per gradient, from zero unless given."""
    parameters = jax.tree.map(jnp.zeros_like, gradients[0]) if begun is None else begun
    state = transformation.init(parameters)
    for gradient in gradients:
        updates, state = transformation.update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return parameters


def test_noam_rises_to_its_peak_and_falls_with_the_root():
    schedule = noam(2.0, D, WARMUP)
    t = np.arange(1, 31)
    expected = 2.0 * D**-0.5 * np.minimum(t**-0.5, t * WARMUP**-1.5)
    np.testing.assert_allclose([schedule(jnp.int32(count)) for count in t - 1], expected, rtol=1e-6)
    assert expected.argmax() == WARMUP - 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["original", "torch"])
def test_adam_closed_form(form):
    b1, b2 = 0.8, 0.95
    expected = {name: np.zeros_like(g) for name, g in gradients()[0].items()}
    for name, parameter in expected.items():
        m = v = 0.0
        for t, gradient in enumerate(gradients(), start=1):
            g = gradient[name]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            if form == "original":
                parameter -= np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + EPS)
            else:
                parameter -= m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + EPS)
    got = apply(optax.chain(scale_by_adam(form, b1, b2, EPS), optax.scale(-1)), gradients())
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [0.03, 5.0])  # below the clip's norm in most steps, and above it in all
def test_the_whole_chain_against_torch(size):
    torch = pytest.importorskip("torch")
    steps = [jax.tree.map(lambda g: g * size, gradient) for gradient in gradients(seed=1)]
    parameters = {name: torch.zeros(g.shape, dtype=torch.float64, requires_grad=True) for name, g in steps[0].items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda count: 0.5 * D**-0.5 * min((count + 1) ** -0.5, (count + 1) * WARMUP**-1.5)
    )
    for gradient in steps:
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        schedule.step()
    got = apply(adam(noam(0.5, D, WARMUP), "torch"), steps)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(got[name], parameter.detach().numpy(), rtol=1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_adamw_against_torch_with_weight_decay_on_matrices_alone(max_norm):
    torch = pytest.importorskip("torch")
    vectors = {"lin.bias": (5,), "norm.scale": (5,), "src_embed.embedding": (7, 3)}
    shapes = {"lin.kernel": (3, 5), "lin.lora_a": (3, 2), "lin.lora_b": (2, 5), **vectors}
    rng = np.random.default_rng(2)
    begun = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    steps = [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(STEPS)]

    parameters = {name: torch.tensor(array, requires_grad=True) for name, array in begun.items()}
    decayed = [parameter for name, parameter in parameters.items() if name not in vectors]
    others = [parameter for name, parameter in parameters.items() if name in vectors]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95), eps=EPS)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1 / (count + 1))
    for gradient in steps:
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradient[name])
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
        optimizer.step()
        falling.step()

    chain = adamw(lambda count: 0.02 / (count + 1), 0.3, max_norm, b1=0.8, b2=0.95, eps=EPS)
    got = apply(chain, steps, jax.tree.map(jnp.asarray, begun))
    for name, parameter in parameters.items():
        np.testing.assert_allclose(got[name], parameter.detach().numpy(), rtol=1e-11, atol=1e-13, err_msg=name)


def test_cosine_rises_linearly_and_falls_to_a_tenth():
    rate, warmup, steps = 0.3, 5, 23
    schedule = make_schedule("cosine", rate, width=D, warmup=warmup, steps=steps)
    t = np.arange(steps + 4)
    share = np.clip((t - warmup) / (steps - warmup), 0, 1)
    falling = rate * (0.1 + 0.9 * (1 + np.cos(np.pi * share)) / 2)
    expected = np.where(t < warmup, rate * t / warmup, falling)
    np.testing.assert_allclose([schedule(jnp.int32(count)) for count in t], expected, rtol=1e-5)
    assert expected[warmup] == rate
    np.testing.assert_allclose(expected[steps:], rate / 10)
    assert {float(make_schedule("constant", 0.5, width=D, warmup=9, steps=3)(count)) for count in (0, 7)} == {0.5}
    with pytest.raises(ValueError, match=r"schedule=cosine.*warmup=5\b.*steps=5\b"):
        make_schedule("cosine", rate, width=D, warmup=5, steps=5)


def test_the_originals_epsilon_has_more_effect_in_the_first_steps():
    original, torch_form = (apply(scale_by_adam(form, eps=EPS), gradients()[:1]) for form in ("original", "torch"))
    assert (np.abs(original["a"]) < 0.5 * np.abs(torch_form["a"])).all()


def test_the_first_float32_update_is_the_sign_of_the_gradient():
    # 1 - βᵗ as a float32 difference would be off by 2.5e-5 here
    updates = apply(scale_by_adam("torch"), [{"a": jnp.array([3.0, -0.5])}])["a"]
    np.testing.assert_allclose(updates, [1, -1], atol=3e-7)


def test_clipping_is_over_all_gradients_and_leaves_small_ones():
    large = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped = apply(clip_by_norm(1.0), [large])
    np.testing.assert_allclose([clipped["a"], clipped["b"]], [[0.6], [0.8]], rtol=1e-6)
    small = {"a": jnp.array([0.3]), "b": jnp.array([0.4])}
    np.testing.assert_array_equal(apply(clip_by_norm(1.0), [small])["a"], small["a"])


LAYERS, IN, OUT = 2, 3, 5
SHAPES = {
    "layers.ffn.kernel": (LAYERS, IN, OUT),  # stacked layers
    "layers.ffn.bias": (LAYERS, OUT),
    "encoder.layers.0.output.kernel": (OUT, IN),  # a list of layers
    "layers.lora_a": (LAYERS, IN, 2),
    "emb.embedding": (7, IN),
    "readout.linear.kernel": (IN, 7),
}
RATE, DECAY = 0.03, 0.4


def arrays(seed: int, dtype: type = np.float64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(dtype) for path, shape in SHAPES.items()}


def layers_of(path: str, array: np.ndarray) -> list[np.ndarray]:
    return list(array) if path.startswith("layers.") else [array]


def in_torch(make, begun: dict, steps: list[dict], only: Sequence[str] = tuple(SHAPES)) -> dict[str, np.ndarray]:
    """Parameters after steps of torch's optimizer, each layer a parameter of its own."""
    torch = pytest.importorskip("torch")
    parameters = {path: [torch.tensor(a, requires_grad=True) for a in layers_of(path, begun[path])] for path in only}
    decayed = {True: [], False: []}
    for path, tensors in parameters.items():
        decayed[path.split(".")[-1] in ("kernel", "lora_a")] += tensors
    groups = [{"params": tensors, "weight_decay": DECAY * decays} for decays, tensors in decayed.items() if tensors]
    optimizer = make(torch.optim, groups)
    for gradient in steps:
        for path, tensors in parameters.items():
            for tensor, value in zip(tensors, layers_of(path, gradient[path]), strict=True):
                tensor.grad = torch.tensor(value)
        optimizer.step()
    return {
        path: np.stack([t.detach().numpy() for t in tensors]).reshape(begun[path].shape)
        for path, tensors in parameters.items()
    }


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_adafactor_against_torch_layer_by_layer():
    begun, steps = arrays(0), [arrays(seed) for seed in range(1, 5)]
    expected = in_torch(lambda optim, groups: optim.Adafactor(groups, lr=RATE, eps=(1e-30, 1e-3)), begun, steps)
    got = apply(adafactor(RATE, DECAY, None, smallest_factored=1), steps, jax.tree.map(jnp.asarray, begun))
    for path in SHAPES:
        # optax computes the decay rate of squares in float32
        np.testing.assert_allclose(got[path], expected[path], rtol=1e-6, err_msg=path)


@pytest.mark.slow
def test_muon_against_torch_on_matrices_of_layers_and_adamw_on_the_rest():
    begun, gradient = arrays(0, np.float32), arrays(1, np.float32)
    matrices = ["layers.ffn.kernel", "encoder.layers.0.output.kernel", "layers.lora_a"]
    assert [path for path, shape in SHAPES.items() if muon_axes(path, len(shape)) is not None] == matrices
    expected = in_torch(
        lambda optim, groups: optim.Muon(groups, lr=RATE, adjust_lr_fn="match_rms_adamw"), begun, [gradient], matrices
    )
    expected |= in_torch(
        lambda optim, groups: optim.AdamW(groups, lr=RATE), begun, [gradient], [p for p in SHAPES if p not in matrices]
    )
    got = apply(muon(RATE, DECAY, None), [gradient], jax.tree.map(jnp.asarray, begun))
    for path in SHAPES:
        # torch orthogonalizes in bfloat16, whose rounding is 2⁻⁹ of an update of the largest RATE · 0.2 · √5
        atol = RATE * 0.02 if path in matrices else 1e-6
        np.testing.assert_allclose(got[path], expected[path], rtol=0, atol=atol, err_msg=path)
        assert np.abs(expected[path] - begun[path]).max() > 3 * RATE * 0.02


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_muon_of_stacked_layers_is_that_of_each_layer():
    begun, steps = arrays(0), [arrays(seed) for seed in range(1, 4)]
    path = "layers.ffn.kernel"
    got = apply(muon(RATE, DECAY, None), steps, jax.tree.map(jnp.asarray, begun))[path]
    plain = optax.contrib.muon(RATE, weight_decay=DECAY, consistent_rms=0.2)
    for layer in range(LAYERS):
        alone = [{"a": step[path][layer]} for step in steps]
        expected = apply(plain, alone, {"a": jnp.asarray(begun[path][layer])})["a"]
        np.testing.assert_allclose(got[layer], expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_lion_closed_form():
    begun, steps = arrays(0), [arrays(seed) for seed in range(1, 5)]
    got = apply(lion(RATE, DECAY, None), steps, jax.tree.map(jnp.asarray, begun))
    for path, parameter in begun.items():
        p, m = parameter.copy(), 0.0
        for g in (step[path] for step in steps):
            decay = DECAY * (path.split(".")[-1] in ("kernel", "lora_a"))
            p -= RATE * (np.sign(0.9 * m + 0.1 * g) + decay * p)
            m = 0.99 * m + 0.01 * g
        np.testing.assert_allclose(got[path], p, rtol=1e-12, err_msg=path)


@pytest.mark.parametrize("name", ["original", "torch", "adamw", "lion", "muon"])
def test_momentum_in_bfloat16_halves_it_and_follows_float32(name):
    begun, steps = arrays(0, np.float32), [arrays(seed, np.float32) for seed in range(1, 5)]
    narrow = make_optimizer(name, RATE, max_norm=None, momentum_dtype="bfloat16")
    states = jax.tree.leaves(jax.eval_shape(narrow.init, begun))
    moments = [leaf for leaf in states if leaf.dtype == jnp.bfloat16]
    assert sorted(leaf.shape for leaf in moments) == sorted(SHAPES.values())
    wide = make_optimizer(name, RATE, max_norm=None)
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(jax.eval_shape(wide.init, begun)))
    begun = jax.tree.map(jnp.asarray, begun)
    first = [apply(transformation, steps[:1], begun) for transformation in (narrow, wide)]
    for path in SHAPES:
        np.testing.assert_allclose(*(p[path] for p in first), rtol=0, atol=RATE * 0.02, err_msg=path)
        assert first[0][path].dtype == np.float32


def test_momentum_of_adafactor_is_refused():
    with pytest.raises(ValueError, match=r"momentum_dtype=bfloat16: optimizer=adafactor"):
        make_optimizer("adafactor", RATE, momentum_dtype="bfloat16")

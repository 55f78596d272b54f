"""The page of the zoo; the pairs themselves need another transformers and are run by `make zoo`."""

import pytest

from examples.zoo.page import page, times
from examples.zoo.truth import CAUSES, located

SOFTWARE = {"jax": "0.1", "transformers": "4.2"}


def result(verdict, noise, **others):
    found = {"verdict": verdict, "noise": noise, "names": "as they are", "seconds": 3.0, "steps": 2, "remark": ""}
    return found | {"narrow": [], "software": SOFTWARE} | others


def test_verdicts_are_compared_with_what_is_true():
    results = {
        "bert": result("agrees", "1.3"),
        "gptj": result("agrees", "7e5", narrow=["modeling_flax_gptj.py:71"]),
        "mistral": result("differs", "inf", remark="first divergence: layers.0"),
        "vit": result("differs", "41", remark="at a|b"),
    }
    text = page(results, {"mistral": (CAUSES["mistral"], "torch.py:5", "flax.py:7")})
    assert "3 of 4 pairs judged truly: 2 agree, 2 differ" in text
    assert "1.3 × noise; of one with a constant in float32: 7e+05 × noise" in text
    assert "| gptj | agrees | 7e+05 | as they are | 3 | float32 in modeling_flax_gptj.py:71 |" in text
    assert "| mistral | differs | ∞ | as they are | 3 | first divergence: layers.0 |" in text
    assert "| vit | differs | 41 | as they are | 3 | **judged wrongly**: at a\\|b |" in text
    assert "- **mistral**: Flax keeps" in text
    assert "(`torch.py:5`, `flax.py:7`)" in text


def test_a_port_of_which_only_the_names_differ_agrees():
    text = page({"resnet": result("agrees", "0.9", names="4 suggested")}, {})
    assert "1 of 1 pairs judged truly" in text


def test_no_results_are_no_page():
    with pytest.raises(ValueError, match="results is empty"):
        page({}, {})


def test_lines_are_found_by_their_text(tmp_path):
    (tmp_path / "model.py").write_text("first\nself.bias = None\n")
    assert located(tmp_path, ("model.py", "self.bias")) == "model.py:2"
    with pytest.raises(ValueError, match=r"model\.py.*'self\.weight'"):
        located(tmp_path, ("model.py", "self.weight"))


@pytest.mark.parametrize(("value", "text"), [(0.25, "0.25"), (31.7, "32"), (2e6, "2e+06"), (float("nan"), "")])
def test_multiples_of_the_noise(value, text):
    assert times(value) == text

"""Hyperparameters and their presets."""

import dataclasses

import pytest

from jaxmodels.training.config import Config


@dataclasses.dataclass(frozen=True)
class Own(Config):
    """Hyperparameters of an experiment outside the project, without presets."""

    context: int = 3


@dataclasses.dataclass(frozen=True)
class WithPresets(Own):
    PRESETS = ("tiny",)

    @classmethod
    def tiny(cls) -> "WithPresets":
        """Seconds on one core."""
        return cls(context=1)


def test_a_config_without_presets_has_its_defaults():
    assert Own.of_preset(Own.PRESETS[0]) == Own()


def test_a_config_with_presets_has_these_alone():
    assert WithPresets.of_preset("tiny").context == 1
    with pytest.raises(ValueError, match=r"preset='default'.*tiny"):
        WithPresets.of_preset("default")


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("seq_len", -1), ("seed", -1), ("clip", 0.0), ("b2", 1.0), ("weight_decay", -0.5)],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        Own(**{field: value})

"""Values of a model's configuration that are no numbers."""

import pytest

from jaxmodels import models


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("AutoregressiveTransformer", {"heads": True}, "heads=True"),
        ("AutoregressiveTransformer", {"heads": 4.0}, "heads=4.0"),
        ("AutoregressiveTransformer", {"dropout_prob": True}, "dropout_prob=True"),
        ("AutoregressiveTransformer", {"max_len": True}, "max_len=True"),
        ("RetroModel", {"ca_layers": [True]}, r"ca_layers=\[True\]"),
        ("RetroModel", {"n_heads": True}, "n_heads=True"),
        ("AutoregressiveModel", {"heads": True}, "heads=True"),
        ("AutoregressiveModel", {"memory": True}, "memory=True"),
        ("AutoregressiveModel", {"memory": 10**12}, "memory=1000000000000"),
        ("RetroModel", {"encoder": {"ca_layers": [True]}}, "encoder="),
    ],
)
def test_true_is_no_number(name, change, match):
    configs = {
        "AutoregressiveTransformer": {"n_vocab": 7, "d_model": 8, "heads": 4, "d_ff": 11, "n_layers": 1},
        "RetroModel": {"n_vocab": 7, "d_model": 8, "n_heads": 2, "d_k": 4, "d_ff": 11, "n_layers": 2, "chunk_len": 3},
        "AutoregressiveModel": {"n_vocab": 7, "d_model": 8, "heads": 4, "d_ff": 11, "n_layers": 1},
    }
    configs["RetroModel"]["ca_layers"] = []
    configs["AutoregressiveModel"]["variant"] = "FeedbackTransformerKV"
    models.build(name, configs[name])
    with pytest.raises(ValueError, match=match):
        models.build(name, configs[name] | change)

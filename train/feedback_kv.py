"""A small character model with a Feedback Transformer whose layers share one key and one value projection.

    python -m train.feedback_kv --text tiny_shakespeare    # or a FILE; without --text: Python's own language reference

The same again goes on from its checkpoint: python -m train.feedback_kv --resume runs/feedback_kv --steps 3000
"""

import dataclasses

from train import experiment, feedback


@dataclasses.dataclass(frozen=True)
class Config(feedback.Config):
    """What decides the numbers of a run."""

    variant = "FeedbackTransformerKV"


if __name__ == "__main__":
    experiment.run_script(Config, "python -m train.feedback_kv")

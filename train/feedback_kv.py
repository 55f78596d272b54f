"""A small character model with a Feedback Transformer whose layers share one key and one value projection.

    python -m train.feedback_kv --text tiny_shakespeare    # or a FILE; without --text: Python's own language reference

Hardware   2 CPU cores, shared with test runs; float32
Time       4 min 41 s by the clock, 4 min 16 s of CPU time over both cores
Training   1200 steps of 32 sequences of 64 characters (2.4 epochs of tiny_shakespeare); 1,461,572 parameters
Result     tiny_shakespeare, seed 0, validation loss in nats per character over the same characters:
           character 4-gram 1.774, this model 1.655
Sample     python -m train.sample runs/feedback_kv --prompt "It is" --temperature 0.7
               It is no man, and thou dall!

               DUKE VINCENTIO:
               I have have not now not may they is the warring of all handed,
               The hold, sir, strike, no lass him to have:

The same command resumes the run; --steps 3000 extends it. `train.feedback` shows how to start from a parallel
transformer's weights, with sequences that grow.
"""

import dataclasses
from typing import ClassVar

from jaxmodels.training.script import run_script
from train import feedback


@dataclasses.dataclass(frozen=True)
class Config(feedback.Config):
    """Hyperparameters of a run."""

    variant: ClassVar[str] = "FeedbackTransformerKV"


class FeedbackKV(feedback.Feedback):
    config_class = Config


EXPERIMENT = FeedbackKV

if __name__ == "__main__":
    run_script(FeedbackKV, "python -m train.feedback_kv")

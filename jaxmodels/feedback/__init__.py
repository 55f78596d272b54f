"""The Feedback Transformer (arXiv 2002.09402): its layers, the recurrence over steps, the language model around it."""

from jaxmodels.feedback.attention import FeedbackAttention, FeedbackTransformerLayer
from jaxmodels.feedback.model import AutoregressiveModel, FeedbackTransformer, FeedbackTransformerKV
from jaxmodels.feedback.parallel import from_parallel
from jaxmodels.feedback.segments import State, logits_at_any_length

__all__ = [
    "AutoregressiveModel",
    "FeedbackAttention",
    "FeedbackTransformer",
    "FeedbackTransformerKV",
    "FeedbackTransformerLayer",
    "State",
    "from_parallel",
    "logits_at_any_length",
]

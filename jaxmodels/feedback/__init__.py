"""Feedback Transformer (arXiv 2002.09402): layers, the recurrence over steps, the language model around it."""

from jaxmodels.feedback.attention import FeedbackAttention, FeedbackTransformerLayer
from jaxmodels.feedback.model import AutoregressiveModel, FeedbackTransformer, FeedbackTransformerKV

__all__ = [
    "AutoregressiveModel",
    "FeedbackAttention",
    "FeedbackTransformer",
    "FeedbackTransformerKV",
    "FeedbackTransformerLayer",
]

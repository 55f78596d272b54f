"""Scores of texts: loss, perplexity and bits per byte of documents; log-probabilities of continuations."""

from jaxmodels.scoring.documents import Score, Scores, score
from jaxmodels.scoring.likelihood import Likelihood, loglikelihood

__all__ = ["Likelihood", "Score", "Scores", "loglikelihood", "score"]

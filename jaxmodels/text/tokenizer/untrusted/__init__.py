"""Tokenizers and chat templates of others: which are known to be harmless, and what is done with the rest."""

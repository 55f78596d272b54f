"""The two sides of a comparison: modules as given, and what is needed to run them widened or in another dtype."""

"""The Flax models of transformers 4.57.6 compared with their PyTorch originals: `make zoo`.

Each pair is a tiny model with random weights and the port that transformers shipped for it. No names are given: the
pair is checked as it is and, if its parts have different names, with those that `parity.suggest` finds. The results
are written to docs/zoo.md. The last transformers with Flax models needs an environment of its own, .venv-zoo.

    registry   the pairs: configuration, inputs, and the constants that only one side takes
    truth      which ports differ, and the lines that say so
    runner     check a pair, store its result
    page       docs/zoo.md from the results
"""

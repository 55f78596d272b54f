"""The two modules of a comparison, run on the same weights and inputs."""

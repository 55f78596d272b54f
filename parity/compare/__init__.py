"""Running the two modules of a pair on the same weights and inputs."""

"""The process of a command: exit codes, signals, other processes, missing optional packages, memory. Knows no model."""

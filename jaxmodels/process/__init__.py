"""The process of a command: exit codes, missing optional packages, memory of the C library. Knows no model."""

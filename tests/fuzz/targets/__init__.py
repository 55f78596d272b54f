"""All targets by name."""

from tests.fuzz.targets import cuts, files, golden, models, outputs, resumed, retro, runs, texts, untrusted
from tests.fuzz.targets.kind import Target

GROUPS: tuple[tuple[Target, ...], ...]
GROUPS = (files.TARGETS, models.TARGETS, runs.TARGETS, texts.TARGETS, retro.TARGETS, golden.TARGETS, untrusted.TARGETS)
GROUPS += (resumed.TARGETS, outputs.TARGETS, cuts.TARGETS)
TARGETS: dict[str, Target] = {target.name: target for group in GROUPS for target in group}

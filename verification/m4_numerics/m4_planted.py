"""Mistakes to plant into the real trainer.

``PLANTED`` maps a name to a function that plants it with pytest's monkeypatch; ``TEN`` have a named cause.
"""

import m4_planted_causes
import m4_planted_groups
import m4_planted_logs
import m4_planted_losses
import m4_planted_runs
import m4_planted_targets

SUBJECTS = (
    m4_planted_causes,
    m4_planted_targets,
    m4_planted_losses,
    m4_planted_runs,
    m4_planted_logs,
    m4_planted_groups,
)
PLANTED = {name: plant for subject in SUBJECTS for name, plant in subject.PLANTED.items()}
TEN = tuple(m4_planted_causes.PLANTED)

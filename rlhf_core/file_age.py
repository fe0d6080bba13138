"""How long ago a file was written: for what looks at a run from outside, never for a log."""

import time
from pathlib import Path


def file_age_s(path: Path) -> float:
    """Return the seconds since a file was last written, 0 where its clock is ahead of ours."""
    return max(0.0, time.time() - path.stat().st_mtime)

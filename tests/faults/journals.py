"""A process that appends to a journal, to be killed."""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator.track.journal import Journal

if __name__ == "__main__":
    journal = Journal(Path(sys.argv[1]))
    for number in (3, 4):
        journal.append({"kind": "Notice", "number": number})
        print(number, flush=True)

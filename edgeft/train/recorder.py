"""metrics.jsonl and events.jsonl of a run: appended line by line, cut back to a checkpoint on resume."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from edgeft.errors import WriteError
from edgeft.paths import write_text
from edgeft.run import Run


class Recorder:
    """Writes what happens in a run. A line is one JSON object; a reader skips a line that a kill cut short."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def metric(self, **values: Any) -> None:
        _append(self.run.metrics_file, values)

    def event(self, kind: str, **details: Any) -> None:
        _append(self.run.events_file, {"time": time.time(), "event": kind, **details})

    def rewind(self, step: int) -> None:
        """Forget what was measured after a checkpoint: those steps are computed again."""
        if self.run.metrics_file.is_file():
            kept = [json.dumps(line) for line in self.run.metrics() if line.get("step", 0) <= step]
            write_text(self.run.metrics_file, "".join(line + "\n" for line in kept))


def _append(file: Path, values: dict[str, Any]) -> None:
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")
    except OSError as error:
        raise WriteError.from_os_error(error, file) from error

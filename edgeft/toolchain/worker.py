"""Running a toolchain's worker: one request in, lines of events out.

stdin    one JSON object, the request
stdout   {"start": label, "total": n} | {"advance": n, "note": text} | {"result": object}
         | {"error": message, "hint": text}
stderr   whatever the libraries say; its end is shown when the worker fails without a word
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from edgeft.errors import PluginError, UnsupportedModel
from edgeft.paths import parse_json
from edgeft.progress import Progress
from edgeft.toolchain.environments import Toolchain, python_of

WORKERS = Path(__file__).parent / "workers"


def call(toolchain: Toolchain, request: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    """Run the worker to its end; it is killed when this process is interrupted.

    Raises:
        MissingDependency: the toolchain is not installed.
        UnsupportedModel: the worker says so.
        PluginError: it failed otherwise.
    """
    command = [str(python_of(toolchain)), "-I", str(WORKERS / toolchain.worker)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=environment
        ) as process:
            assert process.stdin and process.stdout
            try:
                process.stdin.write(json.dumps(request))
                process.stdin.close()
                result = _follow(process.stdout, progress)
            except BrokenPipeError:
                result = None
            except BaseException:
                process.kill()
                raise
            finally:
                progress.finish()
        if result is None:
            said.seek(0)
            last = "\n  ".join(said.read().strip().splitlines()[-5:])
            raise PluginError(f"the toolchain {toolchain.name} failed (exit code {process.returncode}): {last}")
        return result


def _follow(lines: IO[str], progress: Progress) -> Mapping[str, Any] | None:
    for line in lines:
        try:
            event = parse_json(line)
        except ValueError:
            continue  # a library that prints
        if not isinstance(event, dict):
            continue
        if "start" in event:
            progress.start(event["start"], event.get("total"))
        elif "advance" in event:
            progress.advance(event["advance"], event.get("note", ""))
        elif "error" in event:
            raise UnsupportedModel(event["error"], event.get("hint"))
        elif "result" in event:
            result: Mapping[str, Any] = event["result"]
            return result
    return None

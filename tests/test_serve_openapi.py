"""The server does what its own description says: schemathesis asks it, well and badly formed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import serving

# Members that must agree with each other (a tool that is chosen and those that are offered), and schemas that cannot be
# kept: OpenAPI cannot say it.
CONFIG = """
[[operations]]
include-path = "/v1/chat/completions"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "404", "429"]
"""


@pytest.mark.slow
def test_schemathesis_finds_no_difference(tmp_path: Path) -> None:
    (tmp_path / "echo.echo.json").write_text(json.dumps({"default": "an answer"}))
    key = "k" * 20
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    with serving(tmp_path, "echo.echo.json", EDGEFT_SERVE_KEYS=key) as server:
        schema = tmp_path / "openapi.json"
        schema.write_text(json.dumps(server.ask("/openapi.json", headers={"Authorization": f"Bearer {key}"})[1]))
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(schema), "--url", server.url]
        command += ["-H", f"Authorization: Bearer {key}", "--max-examples", "25", "--seed", "1", "--checks", "all"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"}, timeout=280
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

"""Forecasts against published speeds: what is promised holds, and no row has a hand in its own forecast."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def published() -> Any:
    spec = importlib.util.spec_from_file_location("published", BENCHMARKS / "published.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module
    spec.loader.exec_module(module)
    return module


def test_the_promise_holds() -> None:
    command = [sys.executable, BENCHMARKS / "forecast.py", "--json"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["kept"]
    assert result["decode"]["rows"] == 32 and result["decode"]["median_error"] <= 0.12
    assert max(result[what]["worst_factor"] for what in ("decode", "prefill")) <= 2.0


@pytest.mark.parametrize("row", range(32))
def test_no_row_forecasts_itself(published: Any, row: int) -> None:
    before = published.Published()
    after = published.Published()
    after.rows = [dict(each) for each in after.rows]
    after.rows[row]["decode"] *= 10
    for alone in (False, True):
        figures = [published.decode_figure(data, data.rows[row], alone=alone) for data in (before, after)]
        assert figures[0] == figures[1]


def test_alone_no_row_of_the_same_kind_of_machine_is_used(published: Any) -> None:
    before, after = published.Published(), published.Published()
    after.rows = [dict(each) for each in after.rows]
    for each in after.rows:
        if each["machine"] in ("pi5", "pi500+"):
            each["decode"] *= 10
    row = next(at for at, each in enumerate(before.rows) if each["machine"] == "pi5")
    figures = [published.decode_figure(data, data.rows[row], alone=True) for data in (before, after)]
    assert figures[0] == figures[1]
    assert published.decode_figure(before, before.rows[row]) != published.decode_figure(after, after.rows[row])

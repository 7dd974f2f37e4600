"""edgeft bench: what it measures, what it keeps when it is stopped, and how it stands beside the forecast."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_devices import PROFILE
from tiny_gguf import chain_of, write_random, write_scripted

from edgeft.bench import suite
from edgeft.bench.child import run
from edgeft.bench.compare import compared, fits_profile, recalibrated
from edgeft.bench.cost import of_decoding, of_prompts
from edgeft.bench.energy import Meter
from edgeft.bench.job import Answer, Event, Finished, Job, Loaded
from edgeft.bench.suite import Book, Measured, Refused, Settings, Spread, bench
from edgeft.cli.main import main
from edgeft.device import Kernel, load_profile, parse_profile
from edgeft.errors import ModelError, UsageError
from edgeft.forecast.find import find_facts
from edgeft.progress import Silent

SCRIPT = {"default": "x" * 400, "delay_ms": 4, "prompt_delay_ms": 0.5}


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    file = tmp_path / "slow.echo.json"
    file.write_text(json.dumps(SCRIPT))
    return file


def measured(**changes: object) -> Measured:
    same = Spread.of([10.0])
    values: dict[str, object] = {
        "runtime": "xllamacpp", "threads": None, "context": 2048, "prompt_tokens": 2000, "load_s": 0.1,
        "prefill_tps": same, "ttft_s": same, "decode_tps": same, "decode_full_tps": same, "gap_p50_s": 0.1,
        "gap_p99_s": 0.1, "peak_bytes": 300_000_000,
    }  # fmt: skip
    return Measured(**{**values, **changes})  # type: ignore[arg-type]


def answers(job: Job) -> list[Answer]:
    return [event for event in run(job) if isinstance(event, Answer)]


def test_speeds_are_those_of_the_runtime(echo: Path) -> None:
    (found,) = bench(Settings(str(echo), ("echo",), prompt=100, tokens=20), Book(None, {}), Silent())
    assert isinstance(found, Measured)
    assert (found.prompt_tokens, found.prefill_tps.count) == (100, 3)
    assert 100 < found.decode_tps.median <= 250
    assert 500 < found.prefill_tps.median <= 2000
    assert 0.004 <= found.gap_p50_s <= found.gap_p99_s
    assert found.decode_full_tps.low <= found.decode_full_tps.median <= found.decode_full_tps.high


def test_every_prompt_is_computed_anew(tmp_path: Path) -> None:
    file = write_random(tmp_path / "tiny.gguf")
    found = answers(Job(str(file), context=256, prompts=(40,), tokens=8, repeats=3))
    assert [answer.prompt_tokens for answer in found] == [40, 40, 40]


def test_a_context_is_filled(tmp_path: Path) -> None:
    file = write_random(tmp_path / "tiny.gguf")
    (found,) = bench(Settings(str(file), contexts=(256,), tokens=8, repeats=1), Book(None, {}), Silent())
    assert isinstance(found, Measured)
    assert (found.context, found.prompt_tokens) == (256, 256 - 8 - 1)


def test_a_model_that_ends_early_goes_on(tmp_path: Path) -> None:
    file = write_scripted(tmp_path / "short.gguf", chain_of("abcd", start=" "))
    (found,) = answers(Job(str(file), context=256, prompts=(8,), tokens=24, repeats=1, warm=False))
    assert len(found.gaps) >= 12


def test_a_peak_is_the_child_s_own(echo: Path) -> None:
    ballast = bytearray(os.urandom(1 << 20) * 400)
    (finished,) = [
        event for event in run(Job(str(echo), "echo", prompts=(4,), tokens=2)) if isinstance(event, Finished)
    ]
    assert finished.peak_bytes is not None and finished.peak_bytes < 200_000_000 < len(ballast)


def test_what_cannot_be_measured_is_said_and_the_rest_goes_on(echo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(echo), "--runtime", "echo,xllamacpp", "--prompt", "8", "--tokens", "4"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [entry["runtime"] for entry in result["results"]] == ["echo"]
    assert "not a GGUF file" in result["refused"][0]["reason"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "not measured: xllamacpp" in said.err and "decode t/s" in said.out


def test_the_only_setting_that_fails_is_an_error(echo: Path) -> None:
    with pytest.raises(ModelError, match="no runtime named"):
        list(bench(Settings(str(echo), ("nothing",)), Book(None, {}), Silent()))
    with pytest.raises(UsageError, match="do not fit a context of 64"):
        list(bench(Settings(str(echo), ("echo",), contexts=(64,), prompt=60), Book(None, {}), Silent()))
    assert main(["bench", str(echo), "--threads", "1,x"]) == 2
    assert main(["bench", str(echo), "--threads", "0"]) == 2


def test_a_process_that_ends_is_an_error_with_its_last_words(
    echo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'out of luck' >&2\nkill -SEGV $$\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(ModelError, match=r"signal SIGSEGV: out of luck"):
        list(run(Job(str(echo), "echo")))


def events(tokens_per_s: float = 10.0) -> list[Event]:
    gaps = (1 / tokens_per_s,) * 4
    return [
        Loaded("echo", 0.1, 4096, None, None),
        Answer(0, 16, 0.2, gaps),
        Answer(1, 100, 1.0, gaps),
        Finished(1, None),
    ]


def test_a_bench_that_was_stopped_goes_on(tmp_path: Path) -> None:
    settings, book = Settings("m", threads=(1, 2, 4)), tmp_path / "book.json"
    started: list[int | None] = []

    def start(job: Job) -> Iterator[Event]:
        started.append(job.threads)
        if len(started) == 2:
            raise KeyboardInterrupt
        yield from events()

    found = []
    with pytest.raises(KeyboardInterrupt):
        for result in bench(settings, Book(book, {"bytes": 1}), Silent(), start):
            found.append(result)
    assert len(found) == 1
    again = Book(book, {"bytes": 1})
    again.open()
    results = list(bench(settings, again, Silent(), start))
    assert started == [1, 2, 2, 4] and [each.threads for each in results] == [1, 2, 4]
    assert results[0] == found[0], "what was kept is what was measured"
    other = Book(book, {"bytes": 2})
    other.open()
    assert not other.results, "another model under the same name begins anew"
    (tmp_path / "notes.json").write_text("[1]")
    with pytest.raises(UsageError, match="no result of edgeft bench"):
        Book(tmp_path / "notes.json", {}).open()


def test_ctrl_c_ends_with_130_and_what_there_is(echo: Path, tmp_path: Path) -> None:
    out = tmp_path / "book.json"
    arguments = [str(echo), "--runtime", "echo", "--threads", "1,2", "--prompt", "8", "--tokens", "60", "--json"]
    command = [sys.executable, "-m", "edgeft", "bench", *arguments, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    result = json.loads(said)
    assert not result["complete"] and len(result["results"]) == 1
    assert "the same command goes on" in errors


def zone(root: Path, name: str, label: str, microjoules: int) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "name").write_text(f"{label}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("1000000000\n")
    return folder / "energy_uj"


def test_energy_is_that_of_all_packages(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 7)
    meter = Meter(tmp_path)
    first.write_text("1000000")  # it began again at 1000 J
    second.write_text("8000000")
    assert meter.joules() == pytest.approx(2.0 + 3.0)
    assert meter.joules() == 0.0


def test_without_counters_it_says_why(tmp_path: Path) -> None:
    assert Meter(tmp_path).joules() is None
    assert "counts no energy here" in (Meter(tmp_path).why_not or "")
    zone(tmp_path, "intel-rapl:0", "package-0", 1).unlink()
    assert "root only" in (Meter(tmp_path).why_not or "")


def test_a_thousand_tokens_cost_their_energy() -> None:
    found = measured(decode_joules=0.5, prompt_joules=0.1)
    cost = of_decoding(found, None, 0.36)
    assert cost is not None and cost.joules == 500 and cost.money == pytest.approx(500 / 3.6e6 * 0.36)
    given = of_decoding(found, 7.0, None)
    assert given is not None and given.joules == pytest.approx(700), "7 W for 100 s"
    assert given.money is None
    assert of_prompts(measured(), None, 0.3) is None


def test_a_profile_is_corrected_by_what_was_measured(tmp_path: Path) -> None:
    facts = find_facts(str(write_random(tmp_path / "tiny.gguf")))
    found = measured(decode_tps=Spread.of([5000.0]), prefill_tps=Spread.of([90_000.0]))
    for kernels in ((), tuple(Kernel(kind, *[parse_profile(PROFILE, "x").bandwidth] * 2) for kind in ("F32", "Q4_0"))):
        from dataclasses import replace

        device = replace(parse_profile(PROFILE, "board.toml"), kernels=kernels)
        pairs = compared(facts, device, found, 2)
        better = recalibrated(device, facts, "tiny.gguf", pairs)
        after = {pair.what: pair.error for pair in compared(facts, better, found, 2)}
        assert after["decode"] == pytest.approx(0, abs=0.02)
        assert after["prefill"] == pytest.approx(0, abs=0.01)
        assert "edgeft bench tiny.gguf" in (better.kernels[0].decode if kernels else better.bandwidth).source
        assert not kernels or better.kernels[1] == device.kernels[1], "types it has none of stay as they are"


def test_another_runtime_or_other_threads_are_not_compared() -> None:
    from dataclasses import replace

    device = replace(parse_profile(PROFILE, "board.toml"), runtime="llama-cpp-python")
    assert "measured with llama-cpp-python" in (fits_profile(device, measured()) or "")
    assert fits_profile(device, measured(runtime="llama-cpp-python")) is None
    assert "4 threads" in (fits_profile(device, measured(runtime="llama-cpp-python", threads=1)) or "")


def test_the_command_recalibrates_and_draws(
    user_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_random(tmp_path / "tiny.gguf")
    assert main(["bench", str(file), "--recalibrate"]) == 2, "there is no profile yet"
    (user_folders / "devices").mkdir()
    (user_folders / "devices" / "local.toml").write_text(PROFILE.replace('name = "board"', 'name = "local"'))
    capsys.readouterr()
    arguments = ["bench", str(file), "--prompt", "64", "--tokens", "8", "--recalibrate", "--json"]
    picture = tmp_path / "bench.png"
    assert main([*arguments, "--plot", str(picture), "--watts", "5", "--price", "0.3"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["forecast"]["decode"]["measured"] == result["decode_tps"]["median"]
    assert result["per_1000_tokens"]["decode"]["joules"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "edgeft bench tiny.gguf" in load_profile("local").bandwidth.source


def test_a_refusal_is_kept_out_of_the_book(tmp_path: Path) -> None:
    def start(job: Job) -> Iterator[Event]:
        raise ModelError("no")
        yield

    book = Book(tmp_path / "book.json", {})
    found = list(bench(Settings("m", threads=(1, 2)), book, Silent(), start))
    assert all(isinstance(each, Refused) for each in found) and not book.results
    assert suite.START == 16

"""The probe: models made to be timed, what the system says of a machine, and a profile that follows from times."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeft.bench.child import run
from edgeft.bench.job import Answer, Event, Finished, Job, Loaded
from edgeft.cli.main import main
from edgeft.device import load_profile, read_profile, write_profile
from edgeft.forecast.find import find_facts
from edgeft.forecast.memory import kv_bytes
from edgeft.forecast.speed import decode, prefill, token_seconds
from edgeft.models.gguf_check import check_loadable
from edgeft.probe import measure
from edgeft.probe.figures import TOKENS, Seen, Timing, profile
from edgeft.probe.machine import Machine, machine
from edgeft.probe.synthetic import TYPES, Shape, narrow, sized, wide, write_model
from edgeft.progress import Silent

PI = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes crc32 cpuid asimdrdm asimddp
CPU part\t: 0xd0b

processor\t: 1
"""
MEMINFO = "MemTotal:        8000000 kB\nMemFree:   1000 kB\nMemAvailable:    7000000 kB\n"
BOARD = Machine("a board", "aarch64", 4, ("asimd",), 4_000_000_000, 500_000_000, "Debian", "3.13", "2.41")


@pytest.mark.parametrize("kind", TYPES)
def test_a_synthetic_model_of_every_type_runs(tmp_path: Path, kind: str) -> None:
    shape = Shape(kind, 2, width=256, inner=512, heads=4, kv_heads=2)
    file = write_model(tmp_path / "model.gguf", shape)
    check_loadable(file)
    facts = find_facts(str(file))
    assert {part.type for part in facts.parts if part.role == "layer"} == {kind}
    assert facts.layers == 2 and sum(part.bytes for part in facts.parts if part.role == "layer") == shape.bytes
    answers = [event for event in run(Job(str(file), context=64, prompts=(8,), tokens=4, repeats=1))]
    assert any(isinstance(event, Answer) and event.prompt_tokens == 8 and len(event.gaps) >= 3 for event in answers)


def test_a_synthetic_model_has_the_size_asked_for(tmp_path: Path) -> None:
    assert sized("Q4_0", 90_000_000).bytes == pytest.approx(90e6, rel=0.2)
    assert sized("F16", 1).layers == 1, "one layer at least"


def test_what_linux_says_of_a_board(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(PI)
    (tmp_path / "meminfo").write_text(MEMINFO)
    found = machine(tmp_path, tmp_path / "none")
    assert found.isa == ("asimd", "asimddp")
    assert (found.memory, found.in_use) == (8_192_000_000, 1_024_000_000)
    (tmp_path / "memory.max").write_text("2000000000\n")
    assert machine(tmp_path, tmp_path).memory == 2_000_000_000, "a container's limit is all there is"


def made_up(shape: Shape, *, rate: float, gops: float, overhead: float, attention: float, file: Path) -> Timing:
    """What a machine of these figures would take."""
    facts = find_facts(str(write_model(file, shape)))
    begun, past = (16, 1024) if shape in (narrow(), wide()) else (128, 128)

    def seconds(tokens: int) -> float:
        kept = kv_bytes(facts, tokens) * facts.heads / facts.kv_heads
        return facts.streamed() / rate / 1e9 + shape.layers * overhead * 1e-6 + kept / attention / 1e9

    middle = TOKENS // 2
    prompt = gops * 1e9 / 2 / shape.weights
    return Timing(
        shape, "xllamacpp", begun, seconds(begun + middle), past, seconds(past + middle), prompt, 30_000_000,
        1088, 100_000_000,
    )  # fmt: skip


def test_figures_come_back_from_times(tmp_path: Path) -> None:
    known = {"overhead": 40.0, "attention": 6.0}
    shapes = {"Q8_0": (9.0, 50.0), "Q4_0": (7.0, 60.0)}
    timings = [
        made_up(sized(kind, 30_000_000), rate=rate, gops=gops, file=tmp_path / f"{kind}.gguf", **known)
        for kind, (rate, gops) in shapes.items()
    ]
    small = made_up(narrow(), rate=9.0, gops=1.0, file=tmp_path / "narrow.gguf", **known)
    facts = {each.shape: find_facts(str(tmp_path / f"{each.shape.type}.gguf")) for each in timings}
    facts[small.shape] = find_facts(str(tmp_path / "narrow.gguf"))
    broad = made_up(wide(), rate=9.0, gops=1.0, overhead=40.0, attention=4.0, file=tmp_path / "wide.gguf")
    facts[broad.shape] = find_facts(str(tmp_path / "wide.gguf"))
    found = profile(Seen(BOARD, 2, {2: timings[0]}, small, timings, 100.0, broad), facts)
    assert found.overhead and found.attention and found.storage and found.attention_wide
    assert found.attention_wide.value == pytest.approx(4.0, rel=0.01)
    past = token_seconds(facts[broad.shape], found, 1000)["attention"]
    assert past == pytest.approx(kv_bytes(facts[broad.shape], 1000) * 4 / 4.0e9, rel=0.01)
    past = token_seconds(facts[small.shape], found, 1000)["attention"]
    assert past == pytest.approx(kv_bytes(facts[small.shape], 1000) * 3 / 6.0e9, rel=0.01)
    assert found.overhead.value == pytest.approx(40.0, rel=0.1)
    assert found.attention.value == pytest.approx(6.0, rel=0.01)
    for kind, (rate, gops) in shapes.items():
        kernel = found.kernel(kind)
        assert kernel is not None and not kernel.repacked
        assert kernel.decode.value == pytest.approx(rate, rel=0.03)
        assert kernel.prefill.value == pytest.approx(gops, rel=0.01)
    model = facts[timings[1].shape]
    assert decode(model, found, 128 + TOKENS // 2).value == pytest.approx(1 / timings[1].seconds, rel=0.02)
    assert prefill(model, found).value == pytest.approx(timings[1].prompt_tps, rel=0.02)


def test_a_profile_with_kernels_comes_back_as_it_was_written(tmp_path: Path) -> None:
    known = {"overhead": 40.0, "attention": 6.0}
    timing = made_up(sized("Q8_0", 3_000_000), rate=9.0, gops=50.0, file=tmp_path / "a.gguf", **known)
    small = made_up(narrow(), rate=9.0, gops=1.0, file=tmp_path / "narrow.gguf", **known)
    facts = {timing.shape: find_facts(str(tmp_path / "a.gguf")), small.shape: find_facts(str(tmp_path / "narrow.gguf"))}
    found = profile(Seen(BOARD, 2, {2: timing}, small, [timing], None), facts)
    write_profile(found, tmp_path / "local.toml")
    assert read_profile(tmp_path / "local.toml") == found
    assert found.kernels and found.storage is None


def test_what_another_program_slowed_does_not_count(tmp_path: Path) -> None:
    calls = iter((0.004, 0.002))

    def disturbed(job: Job) -> Iterator[Event]:
        free = next(calls)
        yield Loaded("echo", 1.0, 64, None, None)
        for asked, size in enumerate(job.prompts):
            for seconds in (3 * free, free):
                yield Answer(asked, size, 100 * seconds, (seconds,) * 32)
        yield Finished(None, None)

    bench, shape = measure.Bench(tmp_path, "echo", disturbed), Shape("Q4_0", 1, 256, 512, 4, 2)
    found = measure._faster(bench.time(shape, 1, (16, 64)), bench.time(shape, 1, (16, 64)))
    assert (found.seconds, found.past_seconds) == (0.002, 0.002)
    assert found.prompt_tps == pytest.approx(64 / 0.2)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SIZE", 2_000_000)
    monkeypatch.setattr(measure, "TYPES", ("Q4_0", "Q8_0"))
    monkeypatch.setattr(measure, "_PAST", 64)
    monkeypatch.setattr(measure, "_DEADLINE_S", 300.0)


@pytest.mark.usefixtures("quick")
def test_this_machine_is_measured_and_is_then_a_device(
    user_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "probe", "--json", "--runtime", "xllamacpp"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["architecture"]) == ("local", platform.machine())
    assert [kernel["type"] for kernel in shown["kernels"]] == ["Q4_0", "Q8_0"]
    found = load_profile("local")
    assert found.runtime == "xllamacpp" and found.base and 10e6 < found.base.value < 400e6
    file = write_model(tmp_path / "model.gguf", Shape("Q4_0", 2, width=256, inner=512, heads=4, kv_heads=2))
    assert main(["devices", "fit", str(file), "--device", "local", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decode_tps"]["value"] > 0
    assert main(["devices", "show", "local"]) == 0
    assert "decode GB/s" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_slow_machine_leaves_types_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_DEADLINE_S", 0.0)
    found = measure.probe("xllamacpp", Silent())
    assert [kernel.type for kernel in found.kernels] == ["Q4_0"]


@pytest.mark.usefixtures("quick", "user_folders")
def test_a_dry_run_writes_nonarrowg(tmp_path: Path) -> None:
    assert main(["devices", "probe", "--dry-run", "--out", str(tmp_path / "x.toml")]) == 0
    assert not (tmp_path / "x.toml").exists()


@pytest.mark.slow
def test_the_whole_probe_takes_less_than_half_a_minute() -> None:
    started = time.monotonic()
    found = measure.probe("auto", Silent())
    assert time.monotonic() - started < 30
    assert len(found.kernels) >= 4


def test_a_probe_needs_no_torch() -> None:
    code = "import edgeft.probe.measure, edgeft.bench.worker, edgeft.cli.bench; import sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "gguf", "matplotlib"} & set(result.stdout.split())

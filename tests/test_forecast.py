"""Forecasts from headers alone: of files, of folders, of servers; what does not fit is refused with what does."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_devices import PROFILE
from tiny import write_model
from tiny_gguf import write_gguf, write_random

from edgeft.cli.main import main
from edgeft.device import DeviceProfile, load_profile, parse_profile
from edgeft.errors import CheckFailed, ModelError, Unreachable
from edgeft.forecast.best import best, choices
from edgeft.forecast.facts import ModelFacts, Part, as_exported
from edgeft.forecast.find import find_facts
from edgeft.forecast.fit import file_budget, forecast, refuse, runtime_for
from edgeft.forecast.memory import Settings, kv_bytes, largest_context, memory
from edgeft.forecast.speed import decode, prefill

LLAMA_3B = ModelFacts(
    name="llama-3b",
    format="gguf",
    architecture="llama",
    parts=(Part("layer", "Q4_K", 2_819_000_000, 1_690_000_000), Part("embedding", "Q6_K", 394_000_000, 323_000_000)),
    kv_values=(2048,) * 28,
    windowed=(False,) * 28,
    window=0,
    heads=24,
    kv_heads=8,
    width=3072,
    inner=8192,
    vocabulary=128256,
    context=131072,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hf") / "tiny", dtype="bfloat16")


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Files with byte ranges, and a log of how much was sent."""

    sent: int = 0
    ranges = True

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        start, end = 0, len(data) - 1
        asked = self.headers.get("Range")
        if asked and self.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last), end)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start + 1))
        self.end_headers()
        try:
            self.wfile.write(data[start : end + 1])
            type(self).sent += end - start + 1
        except ConnectionError:
            pass  # the reader has what it wants

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["ranges", "no ranges"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path, type[Ranges]]]:
    handler = type("Handler", (Ranges,), {"sent": 0, "ranges": request.param == "ranges"})
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=tmp_path))
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}/", tmp_path, handler
    serving.shutdown()
    serving.server_close()


def board(**changes: str) -> DeviceProfile:
    text = PROFILE
    for key, value in changes.items():
        old = next(line for line in text.splitlines() if line.startswith(f"{key} = "))
        text = text.replace(old, f"{key} = {value}")
    return parse_profile(text, "board.toml")


def test_facts_of_a_gguf(tmp_path: Path) -> None:
    facts = find_facts(str(write_random(tmp_path / "tiny.gguf")))
    assert (facts.heads, facts.kv_heads, facts.width, facts.inner, facts.context) == (4, 2, 64, 96, 2048)
    assert facts.kv_values == (2 * 2 * 16, 2 * 2 * 16)
    embedding = 261 * 64 * 4
    assert facts.streamed() == facts.bytes - embedding, "an untied embedding is a look-up"
    assert facts.active() == facts.parameters


def test_facts_of_a_checkpoint_are_those_of_its_gguf(checkpoint: Path) -> None:
    facts = find_facts(str(checkpoint))
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert facts.parameters == 2 * (layer + 2 * 64) + 64 + 260 * 64
    assert facts.bytes == 2 * facts.parameters
    assert facts.tied and facts.streamed() == facts.bytes
    assert facts.kv_values == (64, 64)
    assert as_exported(facts, "gguf-q8_0").bytes == pytest.approx(facts.parameters * 8.5 / 8, rel=0.02)


def test_a_header_is_read_from_a_server_and_little_else(server: tuple[str, Path, type[Ranges]]) -> None:
    address, folder, handler = server
    width = 512
    tensors = {name: np.zeros(shape, np.float32) for name, shape in _wide(width)}
    file = write_gguf(folder / "big.gguf", tensors)
    assert file.stat().st_size > 12_000_000
    assert find_facts(f"{address}big.gguf").parts == find_facts(str(file)).parts
    if handler.ranges:
        assert handler.sent <= 2 << 20


def _wide(width: int) -> list[tuple[str, tuple[int, ...]]]:
    shapes: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (261, width)), ("output_norm.weight", (width,))]
    for layer in range(2):
        shapes += [(f"blk.{layer}.ffn_{kind}.weight", (2048, width)) for kind in ("gate", "up")]
        shapes.append((f"blk.{layer}.ffn_down.weight", (width, 2048)))
    return shapes


def test_a_long_header_is_asked_for_until_it_is_whole(
    server: tuple[str, Path, type[Ranges]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder, _ = server
    monkeypatch.setattr("edgeft.models.remote._FIRST", 64)
    file = write_random(folder / "tiny.gguf")
    assert find_facts(f"{address}tiny.gguf").parts == find_facts(str(file)).parts


def test_a_checkpoint_on_a_server(server: tuple[str, Path, type[Ranges]], checkpoint: Path) -> None:
    address, folder, _ = server
    shutil.copytree(checkpoint, folder / "tiny")
    assert find_facts(f"{address}tiny").parts == find_facts(str(checkpoint)).parts


def test_a_name_on_the_hub_is_looked_up_by_headers(
    server: tuple[str, Path, type[Ranges]], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder, _ = server
    shutil.copytree(checkpoint, folder / "org" / "tiny" / "resolve" / "main")
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(Unreachable):
        find_facts("hf:org/tiny")  # the tests' environment forbids the hub
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert find_facts("hf:org/tiny").parts == find_facts(str(checkpoint)).parts
    with pytest.raises(ModelError, match="there is no"):
        find_facts("hf:org/other")


def test_what_a_server_sends_is_not_believed(server: tuple[str, Path, type[Ranges]]) -> None:
    address, folder, _ = server
    (folder / "page.gguf").write_text("<html>not found</html>" * 100)
    with pytest.raises(ModelError, match=r"page\.gguf is not a GGUF file"):
        find_facts(f"{address}page.gguf")
    whole = write_random(folder / "cut.gguf").read_bytes()
    (folder / "cut.gguf").write_bytes(whole[:-1000])
    with pytest.raises(ModelError, match="cut short"):
        find_facts(f"{address}cut.gguf")
    with pytest.raises(Unreachable):
        find_facts("http://127.0.0.1:9/model.gguf")


def test_memory_has_every_part() -> None:
    used = memory(LLAMA_3B, board(isa='["asimddp"]'), Settings(4096))
    assert used.weights == LLAMA_3B.bytes
    assert used.repacked == 1_690_000_000, "the embedding is no matrix of a kernel when it is only looked up"
    assert used.kv == 28 * 2048 * 2 * 4096
    assert used.total == used.weights + used.repacked + used.kv + used.compute + used.runtime
    assert memory(LLAMA_3B, board(), Settings(4096)).repacked == 0
    assert kv_bytes(LLAMA_3B, 4096, "q8_0") == used.kv * 34 // 64


def test_layers_with_a_window_keep_a_window() -> None:
    local = replace(LLAMA_3B, window=512, windowed=(True,) * 14 + (False,) * 14)
    assert kv_bytes(local, 8192) == 14 * 2048 * 2 * (8192 + 1024)


def test_the_largest_context_is_the_largest() -> None:
    assert largest_context(LLAMA_3B, lambda tokens: tokens, 10_000) == 9984
    assert largest_context(LLAMA_3B, lambda tokens: tokens, 100) == 0
    assert largest_context(LLAMA_3B, lambda tokens: 0, 1) == LLAMA_3B.context


def test_speed_falls_with_the_context_and_follows_the_device() -> None:
    slow, fast = board(), board(bandwidth='{ value = 6.6, basis = "measured", source = "x" }')
    assert decode(LLAMA_3B, slow).value == pytest.approx(3.3e9 / LLAMA_3B.bytes)
    assert decode(LLAMA_3B, fast).value == pytest.approx(2 * decode(LLAMA_3B, slow).value)
    assert decode(LLAMA_3B, slow, 8192).value < 0.6 * decode(LLAMA_3B, slow).value
    assert prefill(LLAMA_3B, slow).value == pytest.approx(22e9 / 2 / LLAMA_3B.parameters)
    guess = decode(LLAMA_3B, board(bandwidth='{ value = 3.3, basis = "estimate", source = "x" }'))
    assert guess.low < decode(LLAMA_3B, slow).low


def test_settings_change_before_a_model_is_refused() -> None:
    room = {at: f'{{ value = {at}e9, basis = "datasheet", source = "x" }}' for at in (5, 4, 3, 2)}
    found = {at: forecast(LLAMA_3B, board(isa='["asimddp"]', memory=room[at]), 2048) for at in room}
    said = {at: (each.fits, each.settings.mmap, each.settings.repack) for at, each in found.items()}
    assert said == {5: (True, True, True), 4: (True, False, True), 3: (True, False, True), 2: (False, True, False)}
    assert any("--mmap off" in text for text in found[3].notes)


def test_what_does_not_fit_is_refused_with_what_does() -> None:
    small = board(memory='{ value = 2.1e9, basis = "datasheet", source = "x" }')
    hint = refuse(forecast(LLAMA_3B, small), LLAMA_3B, []).hint or ""
    assert "bits per weight" in hint and "--device board" in hint
    tiny = board(memory='{ value = 6e8, basis = "datasheet", source = "x" }')
    hint = refuse(forecast(LLAMA_3B, tiny), LLAMA_3B, [load_profile("rpi5-8g"), load_profile("rpi4-4g")]).hint
    assert hint == "The smallest device it fits is rpi4-4g."
    long = board(memory='{ value = 4e9, basis = "datasheet", source = "x" }')
    refused = refuse(forecast(LLAMA_3B, long, 32768), LLAMA_3B, [])
    assert isinstance(refused, CheckFailed) and (refused.hint or "").startswith("With --ctx ")
    context = int((refused.hint or "").split()[2])
    assert forecast(LLAMA_3B, long, context).fits and not forecast(LLAMA_3B, long, context + 256).fits


def test_the_best_file_is_the_one_with_most_bits_that_fits_and_is_fast_enough() -> None:
    source = replace(
        LLAMA_3B,
        format="safetensors",
        parts=(
            Part("layer", "BF16", 2_819_000_000, 5_638_000_000),
            Part("embedding", "BF16", 394_000_000, 788_000_000),
        ),
    )
    rich = '{ value = 64e9, basis = "datasheet", source = "x" }'
    wide = '{ value = 60, basis = "measured", source = "x" }'
    chosen = {
        "all fit, all fast": best(choices(source, board(memory=rich, bandwidth=wide), 2048, "f16")),
        "all fit, none fast": best(choices(source, board(memory=rich), 2048, "f16")),
        "little room": best(choices(source, board(memory=rich.replace("64e9", "2.3e9")), 2048, "f16")),
    }
    found = {what: (choice.target, choice.fluent) for what, choice in chosen.items()}
    assert found["all fit, all fast"] == ("gguf-q8_0", True)
    assert found["all fit, none fast"] == ("gguf-q4_0", False), "slow is no reason for less than four bits"
    assert found["little room"][0] == "gguf-q2_k" and chosen["little room"].forecast.fits
    as_it_is = choices(LLAMA_3B, board(), 2048, "f16")
    assert [choice.target for choice in as_it_is] == ["as it is"]
    assert runtime_for(load_profile("rpi5-8g")) == "llama-cpp-python"
    assert runtime_for(load_profile("rpi4-4g")) == "xllamacpp"


def test_the_best_of_a_checkpoint_on_every_device(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "fit", str(checkpoint), "--best", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {entry["target"] for entry in found} == {"gguf-q8_0"} and all(entry["runtime"] for entry in found)
    assert main(["devices", "fit", str(checkpoint), "--best", "--device", "rpi4-2g"]) == 0
    assert "gguf-q8_0" in capsys.readouterr().out


def test_a_budget_leaves_room_for_all_else() -> None:
    device = board()
    budget = file_budget(LLAMA_3B, device, 2048)
    rest = memory(LLAMA_3B, device, Settings(2048)).total - LLAMA_3B.bytes
    assert budget + rest == device.usable


def test_the_command_ends_with_5_and_shows_a_table(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "tiny.toml"
    profile.write_text(PROFILE.replace("2e9", "3.3e8"))
    assert main(["devices", "fit", str(checkpoint), "--device", str(profile), "--json"]) == 5
    said = capsys.readouterr()
    result: dict[str, Any] = json.loads(said.out)
    assert not result["fits"] and result["memory"]["total"] > result["memory"]["usable"]
    assert "does not fit A board" in said.err
    assert main(["devices", "fit", str(checkpoint)]) == 0
    assert "rpi4-2g" in capsys.readouterr().out


def test_a_forecast_needs_no_torch(checkpoint: Path) -> None:
    arguments = ["devices", "fit", str(checkpoint), "--json"]
    code = f"from edgeft.cli.main import main; main({arguments!r}); import sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "gguf"} & set(result.stdout.splitlines()[-1].split())


@pytest.mark.model
def test_memory_of_a_real_model_is_within_ten_per_cent(smollm2_gguf: Path) -> None:
    """Peak resident memory of a process that fills the context, measured apart from this one."""
    facts = find_facts(str(smollm2_gguf))
    for context in (512, 4096):
        code = (
            "import re, sys; from edgeft import plugins; from edgeft.artifact import Artifact;"
            "from edgeft.chat import Sampling; from pathlib import Path;"
            "session = plugins.load('runtimes', 'xllamacpp').load("
            f"Artifact(Path(sys.argv[1])), plugins.LoadOptions(context={context}));"
            f"list(session.generate(session.tokenize('a word ' * {context // 3}), Sampling(max_tokens=4)));"
            # Not getrusage, whose peak a child begins with that of the process it was forked from.
            "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024)"
        )
        result = subprocess.run([sys.executable, "-c", code, smollm2_gguf], capture_output=True, text=True, check=True)
        expected = memory(facts, board(), Settings(context)).total
        assert int(result.stdout) == pytest.approx(expected, rel=0.1)


@pytest.fixture(scope="module")
def imatrix(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgeft import export
    from edgeft.progress import Silent

    file = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    text = file.with_name("text.jsonl")
    turns = [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four five six"}]
    text.write_text(json.dumps({"messages": turns}) + "\n")
    return export.calibrate(export.find(str(checkpoint), None, Silent()), str(text), file, progress=Silent())


def test_export_for_a_device_fits_it(
    checkpoint: Path, imatrix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = find_facts(str(checkpoint))
    rest = memory(facts, board(), Settings(256)).total - facts.bytes
    room = rest + facts.parameters * 5 // 8 + 20_000  # five bits per weight and the file's text
    profile = tmp_path / "tight.toml"
    profile.write_text(PROFILE.replace("2e9", str(3e8 + room)))
    out = tmp_path / "tight.gguf"
    arguments = ["export", str(checkpoint), "--imatrix", str(imatrix), "--out", str(out), "--no-verify"]
    assert main([*arguments, "--device", str(profile)]) == 0
    found = find_facts(str(out))
    assert out.stat().st_size <= facts.parameters * 5 // 8 + 20_000
    assert forecast(found, load_profile(str(profile))).fits
    assert found.bytes > 0.3 * facts.bytes, "no smaller than it must be"
    capsys.readouterr()
    assert main([*arguments, "--device", "rpi4-2g", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert 7.5 < planned["bits_per_weight"] <= 8.6, "never more than 8 bits"


def test_export_for_a_device_without_room_is_refused(
    checkpoint: Path, imatrix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "none.toml"
    profile.write_text(PROFILE.replace("2e9", "3.3e8"))
    arguments = ["export", str(checkpoint), "--imatrix", str(imatrix), "--out", str(tmp_path / "x.gguf")]
    assert main([*arguments, "--device", str(profile)]) == 5
    assert "does not fit" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()
    assert main([*arguments, "--device", "rpi4-2g", "--fit", "90MB"]) == 2

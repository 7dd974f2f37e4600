"""The way of a model from training to a device, on the screens, with real commands and tiny models."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from screens import drive, keys, on, rows, said, until
from sshd import Server, needs_sshd, server
from terminal import Terminal
from test_deploy import bundle
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, TextArea

from edgeft import jobs
from edgeft.artifact import read_manifest
from edgeft.cli.main import cli, main
from edgeft.jobs import JobEvents, State
from edgeft.run import Run
from edgeft.tui.actions import Action, How
from edgeft.tui.app import EdgeftApp
from edgeft.tui.chat import ChatScreen
from edgeft.tui.curves import PLOTS, CurvesScreen
from edgeft.tui.deploy import DeployScreen
from edgeft.tui.export import ExportScreen
from edgeft.tui.forms import MAIN, FormScreen, find_command
from edgeft.tui.jobs import JobScreen
from edgeft.tui.ledger import LedgerScreen
from edgeft.tui.training import TrainingScreen

EDGEFT = str(Path(sys.executable).with_name("edgeft"))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models gain nothing from threads, and two thread pools that wait for each other lose much."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base(folder: Path) -> Path:
    """A tiny model, and data for it."""
    (folder / "data").mkdir()
    for split, count in (("train", 40), ("valid", 6), ("test", 6)):
        with (folder / "data" / f"{split}.jsonl").open("w") as lines:
            for at in range(count):
                turns = [{"role": "user", "content": f"{split} {at}"}, {"role": "assistant", "content": str(at * 7)}]
                lines.write(json.dumps({"messages": turns}) + "\n")
    return tiny.write_loadable(folder / "base")


def write_run(place: Path, *, rank: int = 16, steps: int = 6, samples: bool = False) -> Run:
    """What a training leaves behind after some steps."""
    from edgeft.train.config import TrainConfig, write_config

    (place / "checkpoints").mkdir(parents=True)
    write_config(place / "config.toml", TrainConfig("base", "data", place, rank=rank))
    run = Run(place)
    with run.metrics_file.open("w") as lines:
        for step in range(1, steps + 1):
            one = {"step": step, "loss": 3 / step, "lr": 1e-3, "tokens": 64 * step, "tokens_per_s": 500.0}
            one |= {"memory_peak_bytes": 6e8, "elapsed_s": 2.0 * step, "left_s": 2.0 * (steps - step)}
            lines.write(json.dumps(one) + "\n")
        lines.write(json.dumps({"step": steps, "val_loss": 0.75}) + "\n")
    if samples:
        for step, answer in ((3, "too early"), (6, "the lamp is on")):
            told = [{"prompt": "the lamp", "wanted": "the lamp is on", "answer": answer}]
            with run.events_file.open("a") as lines:
                lines.write(json.dumps({"event": "samples", "step": step, "samples": told}) + "\n")
    return run


def edgeft(*words: str, code: int = 0) -> str:
    """What a command in a process of its own prints."""
    done = subprocess.run([EDGEFT, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    return done.stdout


# --- Forms ----------------------------------------------------------------------


def test_what_a_form_shows_first_are_options_of_its_command() -> None:
    for names, main_ones in MAIN.items():
        command, found, _ = find_command(cli, names)
        assert found == names
        assert set(main_ones) <= {parameter.name for parameter in command.params}, names


def test_data_are_looked_at_before_a_training_begins(folder: Path, base: Path) -> None:
    with (folder / "data" / "train.jsonl").open("a") as lines:
        lines.write('{"messages": 3}\n')

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        app.do(Action("Train", ("train", "--model", "base"), How.FORM))
        form = await on(pilot, FormScreen)
        await until(pilot, lambda: form.query_one("#field-data", Input).suggester is not None)
        await pilot.press(*"dat", "right", "enter")  # the name is offered
        text = form.query_one("#plan", TextArea)
        await until(pilot, lambda: "train.jsonl:41" in text.text)  # the problem, with its line
        assert text.text.startswith("$ edgeft data check data --preview 2 --model base")
        assert "█" in text.text and "train 0" in text.text  # lengths in tokens, and the first example
        form.query_one("#field-device_profile", Input).value = "rpi5-8g"
        await pilot.press("f5")
        await until(pilot, lambda: "--ship-to rpi5-8g --dry-run" in text.text and "advice" in text.text)
        assert "rpi5-8g: export --to gguf-q8_0" in text.text
        assert not jobs.list_jobs()

    drive(steps)


def test_several_addresses_are_several_arguments() -> None:
    from edgeft.tui.forms import arguments, values_of

    command, _, _ = find_command(cli, ("deploy", "send"))
    words = ["--keep", "3", "bundle", "pi@one", "pi@two"]
    assert list(arguments(values_of(command, words), command))[-3:] == words[-3:]


# --- Training -------------------------------------------------------------------


def test_curves_of_a_run_and_of_two_beside_each_other(folder: Path) -> None:
    write_run(folder / "runs" / "one", samples=True)
    write_run(folder / "runs" / "two", rank=4, steps=4)

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        app.do(Action("Curves", ("curves", "runs/one"), How.CURVE))
        screen = await on(pilot, CurvesScreen)
        await until(pilot, lambda: bool(screen.seen))
        assert all(screen.seen[0].curves[plot.metric] for plot in PLOTS)
        assert said(screen, "#how-far").startswith("one: step 6, loss 0.5000 · best validation 0.7500 · 32 tokens/s")
        await pilot.press("s")
        await until(pilot, lambda: screen.query_one("#samples").display)
        assert "the lamp is on" in said(screen, "#answers") and "too early" in said(screen, "#answers")
        await pilot.press("s", "o")
        await until(pilot, lambda: app.screen is not screen)
        await pilot.press("enter")
        await until(pilot, lambda: len(screen.seen) == 2)
        assert said(screen, "#line") == "$ edgeft curves runs/one runs/two"
        assert "different: rank 16 / 4" in said(screen, "#how-far")

    drive(steps)


def test_keys_that_cannot_act_are_hidden(folder: Path) -> None:
    write_run(folder / "runs" / "one")
    ended = jobs.wait(jobs.start(["config", "show"]))

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        app.do(Action("Curves", ("curves", "runs/one"), How.CURVE))
        screen = await on(pilot, CurvesScreen)
        await until(pilot, lambda: bool(screen.seen))
        assert "Samples" not in keys(screen) and "Compare" in keys(screen)
        app.do(Action("Watch", ("jobs", "watch", ended.id), How.WATCH))
        job = await on(pilot, JobScreen)
        assert not {"Stop", "Pause/go on", "Try again", "Curves", "Next step"} & keys(job)

    drive(steps)


def test_a_training_is_paused_goes_on_and_is_ended_early(folder: Path, base: Path) -> None:
    """Paused, nothing is computed; ended early, what was learned is a finished run."""

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        words = (
            "train --model base --data data --out runs/a --epochs 400 --micro-tokens 192 --eval-every 50 --samples 2"
        )
        app.start(words.split())
        screen = await on(pilot, TrainingScreen)
        await until(pilot, lambda: any("loss" in line for line in Run(folder / "runs/a").metrics()))
        await pilot.press("space")
        await until(pilot, lambda: screen.job.state is State.PAUSED)
        size = (folder / "runs/a/metrics.jsonl").stat().st_size
        await pilot.pause(1.0)
        assert (folder / "runs/a/metrics.jsonl").stat().st_size == size
        await pilot.press("space")
        await until(pilot, lambda: (folder / "runs/a/metrics.jsonl").stat().st_size > size)
        assert "Finish now" in keys(screen)
        await pilot.press("f")
        await until(pilot, lambda: screen.job.state.ended)
        assert screen.job.state is State.DONE, screen.job.stderr.read_text()
        await until(pilot, lambda: bool(screen.seen) and bool(screen.seen[0].samples))

    drive(steps)
    run = Run(folder / "runs/a")
    assert run.finished and run.adapter is not None and not run.asked_to_finish
    last = max(line["step"] for line in run.metrics())
    assert last < 400 and run.manifest().evaluation["best_step"] <= last


# --- Export and verify ----------------------------------------------------------


def test_the_plan_of_every_target_before_anything_is_written(
    folder: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "base", "--to", "gguf-q4", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["devices", "fit", "base", "--to", "gguf-q4", "--json"]) == 0
    fits = json.loads(capsys.readouterr().out)

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        app.do(Action("Export", ("export", "base", "--to", "gguf-q4"), How.EXPORT))
        screen = await on(pilot, ExportScreen)
        await until(pilot, lambda: screen.target in screen.fits)
        assert len(rows(screen, "#types-table")) == len(plan["groups"])
        reasons = {row[5] for row in rows(screen, "#types-table")}
        assert "64 columns do not fill blocks of 256: Q5_0 instead of Q4_K" in reasons
        chosen = screen.query_one("#targets", DataTable).get_row("gguf-q4")
        assert [str(cell) for cell in chosen[2:5]] == [
            f"{plan['bits_per_weight']:.2f}",
            f"{plan['bytes'] / 1e6:.1f}",
            f"{plan['fallbacks']} of {len(plan['tensors'])}",
        ]
        assert plan["fallbacks"] > 0 and f"fits {len(fits)} of {len(fits)} devices" in said(screen, "#sum")
        assert {row[0] for row in rows(screen, "#devices-table")} == {one["device"] for one in fits}
        await pilot.press("down")
        await until(pilot, lambda: "gguf-q4_k_m" in screen.plans)
        assert said(screen, "#line") == "$ edgeft export --to gguf-q4_k_m base"

    drive(steps)
    assert not jobs.list_jobs() and not list(folder.glob("*.gguf"))


def test_marked_targets_are_exported_one_after_the_other(folder: Path, base: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        app.do(Action("Export", ("export", "--no-verify", "base"), How.EXPORT))
        screen = await on(pilot, ExportScreen)
        await until(pilot, lambda: screen.target == "gguf-q4")
        await pilot.press("space", "down", "space")
        await until(pilot, lambda: len(screen.chosen) == 2)
        assert said(screen, "#line").splitlines() == [
            "$ edgeft export --to gguf-q4 --no-verify base",
            "$ edgeft export --to gguf-q4_k_m --no-verify base",
        ]
        await pilot.press("ctrl+s")
        await until(pilot, lambda: len(jobs.list_jobs()) == 2 and all(job.state.ended for job in jobs.list_jobs()))

    drive(steps)
    first, second = jobs.list_jobs()
    assert second.after == first.id and (first.state, second.state) == (State.DONE, State.DONE)
    assert [job.made for job in (first, second)] == [folder / "base-q4.gguf", folder / "base-q4_k_m.gguf"]


def test_a_target_that_is_not_possible_says_why(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        app.do(Action("Export", ("export", "nothing-here", "--to", "gguf-q4"), How.EXPORT))
        screen = await on(pilot, ExportScreen)
        await until(pilot, lambda: screen.target in screen.plans)
        assert "nothing-here" in said(screen, "#sum")
        assert str(screen.query_one("#targets", DataTable).get_row("gguf-q4")[4]) == "not possible"

    drive(steps)


def test_a_file_that_was_not_verified_says_so(folder: Path, base: Path) -> None:
    assert main(["export", "base", "--to", "gguf-q8_0", "--out", "b.gguf", "--no-verify"]) == 0

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        app.do(Action("Ledger", ("verify", "b.gguf", "--last"), How.LEDGER))
        screen = await on(pilot, LedgerScreen)
        await until(pilot, lambda: "was not verified" in said(screen, "#about"))
        assert not rows(screen, "#steps")

    drive(steps)


def test_the_ledger_marks_the_step_that_loses_most_and_a_check_that_failed(folder: Path, base: Path) -> None:
    edgeft("train", "--model", "base", "--data", "data", "--out", "run", "--epochs", "1", "--micro-tokens", "192")
    edgeft("export", "run", "--to", "gguf-q4", "--out", "b.gguf", "--no-verify")
    edgeft("verify", "b.gguf", "--tolerance", "kl=0", code=5)  # the run is in the manifest
    manifest = read_manifest(folder / "b.gguf")
    assert manifest is not None
    found = manifest.verification
    lost = {step["title"]: (step["kl_from_step_before"] or {"value": 0})["value"] for step in found["steps"]}
    assert len(lost) >= 3

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        app.do(Action("Ledger", ("verify", "b.gguf", "--last"), How.LEDGER))
        screen = await on(pilot, LedgerScreen)
        await until(pilot, lambda: bool(screen.found))
        marked = [row[1] for row in rows(screen, "#steps") if row[0] == "▶"]
        assert marked == [max(lost, key=lambda title: lost[title])]
        assert [row[1] for row in rows(screen, "#steps")] == list(lost)
        failed = [row for row in rows(screen, "#checks") if row[1] == "FAILED"]
        assert failed and "NOT the trained model" in said(screen, "#about")
        assert said(screen, "#advice") == found["advice"]
        await pilot.press("v")
        job = await on(pilot, JobScreen)
        assert job.job.command == ("verify", "b.gguf")
        await until(pilot, lambda: job.job.state.ended)
        await pilot.press("escape")
        await until(
            pilot, lambda: app.screen is screen and not [r for r in rows(screen, "#checks") if r[1] == "FAILED"]
        )

    drive(steps)


# --- Packages and devices -------------------------------------------------------


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[tuple[Path, list[Server]]]:
    with server(tmp_path / "kitchen") as one, server(tmp_path / "hall") as two:
        file = tmp_path / "fleet.toml"
        file.write_text("".join(_table(name, made) for name, made in (("kitchen", one), ("hall", two))))
        yield file, [one, two]


def _table(name: str, made: Server) -> str:
    device = made.device
    return (
        f'[devices.{name}]\nhost = "{device.host}"\nport = {device.port}\nidentity = "{device.identity[0]}"\n'
        f'known_hosts = "{device.known_hosts}"\npython = "{device.python}"\n'
    )


@needs_sshd
def test_a_fleet_is_updated_device_by_device_and_taken_back(folder: Path, fleet: tuple[Path, list[Server]]) -> None:
    file, _ = fleet
    first, second = bundle(folder, "1.0"), bundle(folder, "2.0", more=3_000_000)

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        app.do(Action("Deploy", ("deploy", "send", first.name, "--inventory", file.name), How.DEPLOY))
        screen = await on(pilot, DeployScreen)
        assert said(screen, "#line") == f"$ edgeft deploy send --inventory fleet.toml {first.name}"
        assert "Roll back" not in keys(screen)
        await pilot.press("ctrl+s")
        await until(pilot, lambda: _states(screen) == {"kitchen": "updated", "hall": "updated"})
        await until(pilot, lambda: [row[1] for row in rows(screen, "#devices")] == ["pet 1.0"] * 2)
        screen.query_one("#bundle", Input).value = second.name
        assert screen.job is not None
        first_job = screen.job.id
        await pilot.press("ctrl+s")
        await until(pilot, lambda: screen.job is not None and screen.job.id != first_job)
        await until(pilot, lambda: [row[1] for row in rows(screen, "#devices")] == ["pet 2.0"] * 2)
        assert [row[1:3] for row in rows(screen, "#versions")] == [["2.0", "in use"], ["1.0", ""]]
        events = list(jobs.read_events(screen.job.folder))
        for device in ("kitchen", "hall"):  # progress of each, by its own name
            sending = [one for one in events if one.part == device and one.label.startswith("Sending")]
            assert sending[-1].total and sending[-1].done == sending[-1].total >= 3_000_000
        screen.query_one("#devices", DataTable).move_cursor(row=1)
        await until(pilot, lambda: screen.selected == "hall" and "Roll back" in keys(screen))
        await pilot.press("f7")
        await until(pilot, lambda: [row[1] for row in rows(screen, "#devices")] == ["pet 2.0", "pet 1.0"])

    drive(steps, (120, 40))


def _states(screen: DeployScreen) -> dict[str, str]:
    return {row[0]: row[2] for row in rows(screen, "#devices")}


def test_a_device_that_cannot_be_reached_says_so(folder: Path) -> None:
    made = bundle(folder)

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        words = ("deploy", "send", made.name, "nobody@127.0.0.1:1", "--retries", "0")
        app.start(words)
        screen = await on(pilot, DeployScreen)
        await until(pilot, lambda: screen.job is not None and screen.job.state.ended)
        await until(pilot, lambda: _states(screen) == {"127.0.0.1": "failed"})
        assert rows(screen, "#devices")[0][4]

    drive(steps)


# --- Jobs -----------------------------------------------------------------------


def test_one_job_is_watched_from_a_screen_and_a_command_at_once_and_after_a_crash(folder: Path) -> None:
    (folder / "slow.echo.json").write_text(json.dumps({"default": "word " * 4000, "delay_ms": 20}))
    job = jobs.start(("run", "slow.echo.json", "hello", "--max-tokens", "20000"))
    JobEvents(job.folder).start("answering", 100, "words")
    with Terminal([EDGEFT, "tui"], folder) as terminal:
        terminal.wait_for(job.id)
        terminal.send("/")
        terminal.wait_for("filter")
        terminal.send(job.id + "\r")
        terminal.wait_for(f"jobs watch {job.id}")
        terminal.send("\r")
        terminal.wait_for("answering")
        terminal.process.send_signal(signal.SIGKILL)
        assert terminal.ends() == -signal.SIGKILL
    assert jobs.find_job(job.id).state is State.RUNNING
    watch = subprocess.Popen([EDGEFT, "jobs", "watch", job.id], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        app.do(Action("Watch", ("jobs", "watch", job.id), How.WATCH))
        screen = await on(pilot, JobScreen)
        await until(pilot, lambda: screen.job.state is State.RUNNING)
        jobs.cancel(jobs.find_job(job.id))
        await until(pilot, lambda: screen.job.state is State.CANCELLED)
        assert "Try again" in keys(screen)

    drive(steps)
    _, told = watch.communicate(timeout=60)
    assert watch.returncode == 130 and f"{job.id}: cancelled" in told.decode() and b"answering" in told


def test_the_next_step_of_a_job_is_one_key_away(folder: Path, base: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        app.start(("export", "base", "--to", "gguf-q8_0", "--out", "b.gguf", "--no-verify"))
        screen = await on(pilot, JobScreen)
        await until(pilot, lambda: screen.job.state.ended)
        await until(pilot, lambda: "Enter: edgeft chat b.gguf" in str(screen.query_one("#state").render()))
        await pilot.press("enter")
        await on(pilot, ChatScreen)

    drive(steps)

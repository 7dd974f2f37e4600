"""The `edgeft` command: a table of verbs, and the one place where errors become text and exit codes."""

from __future__ import annotations

import importlib
import sys

import click

from edgeft import __version__
from edgeft.errors import EXIT_CODE_HELP, EdgeftError, ExitCode

# Short help lives here, not in the modules: printing help must import none of them.
VERBS: dict[str, tuple[str, str]] = {
    "tui": ("edgeft.cli.tui:tui", "Everything on one screen: models, training, chat, devices, jobs."),
    "demo": ("edgeft.cli.demo:demo", "Train, export and chat with a real model in minutes."),
    "chat": ("edgeft.cli.chat:chat", "Talk to a model, offline."),
    "history": ("edgeft.cli.history:history", "What was said in conversations: search, export, name."),
    "run": ("edgeft.cli.run:run", "One prompt in, one answer out."),
    "train": ("edgeft.cli.train:train", "Fine-tune a base model on a data set."),
    "curves": ("edgeft.cli.curves:curves", "What a training measures; several runs beside each other."),
    "export": ("edgeft.cli.export:export", "Merge and quantize into one deployable file, in one pass."),
    "imatrix": ("edgeft.cli.imatrix:imatrix", "Measure how much each weight matters on your own text."),
    "verify": ("edgeft.cli.verify:verify", "Prove that a file answers as the trained model does."),
    "diff": ("edgeft.cli.diff:diff", "What sets two artifacts apart: metadata, types, tensors, answers."),
    "eval": ("edgeft.cli.evaluate:evaluate", "Exact match, loss and speed of a model on held-out data."),
    "bench": ("edgeft.cli.bench:bench", "Speed, memory and cost of a model on this machine."),
    "package": ("edgeft.cli.package:package", "Pack a model with all it needs to run on a device, offline."),
    "install": ("edgeft.cli.install:install", "Install a bundle on this machine; roll back, uninstall."),
    "deploy": ("edgeft.cli.deploy:deploy", "Bring a bundle onto devices over SSH; status, rollback."),
    "serve": ("edgeft.cli.serve:serve", "Models behind OpenAI's protocol, for every client that speaks it."),
    "monitor": ("edgeft.cli.monitor:monitor", "Watch a server's answers: feedback, speed, drift."),
    "cascade": ("edgeft.cli.cascade:cascade", "Answer on the device, ask the cloud only when it pays."),
    "data": ("edgeft.cli.data:data", "Check, prepare and split data sets."),
    "models": ("edgeft.cli.models:models", "List, pull, import and remove models."),
    "devices": ("edgeft.cli.devices:devices", "Profiles of devices; what a model needs and does on them."),
    "status": ("edgeft.cli.status:status", "What there is, and what to do next with it."),
    "jobs": ("edgeft.cli.jobs:jobs", "Long tasks in the background: start, watch, cancel, try again."),
    "toolchain": ("edgeft.cli.toolchain:toolchain", "Exporters in environments of their own."),
    "config": ("edgeft.cli.config:config", "Show settings and where each one comes from."),
    "doctor": ("edgeft.cli.doctor:doctor", "What this installation can do, and what it lacks."),
}

EPILOG = "Exit codes: " + ", ".join(f"{code.value} {text}" for code, text in EXIT_CODE_HELP.items()) + "."


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, attribute = VERBS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in VERBS and not name.startswith("-"):
            # click suggests from loaded commands, and none is loaded.
            raise click.exceptions.NoSuchCommand(name, possibilities=list(VERBS), ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgeft")
def cli() -> None:
    """Fine-tune a small language model and run it offline on your own device."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; errors go to stderr as text, never as a traceback."""
    try:
        # click's own handling would end Ctrl-C with 1; edgeft promises 130.
        result = cli.main(args=arguments, prog_name="edgeft", standalone_mode=False)
        return int(result) if isinstance(result, int) else ExitCode.OK
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show(sys.stderr)
        return ExitCode.USAGE
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("\ninterrupted", err=True)
        return ExitCode.INTERRUPTED
    except EdgeftError as error:
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"  {error.hint}", err=True)
        return error.exit_code
    except BrokenPipeError:
        # The reader went away (`edgeft … | head`): nothing left to say, and nobody to say it to.
        sys.stderr.close()
        return ExitCode.OK


def entry() -> None:
    """Console script."""
    sys.exit(main())

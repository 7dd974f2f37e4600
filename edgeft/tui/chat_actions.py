"""What can be done in a conversation: by a key, from a list, and by a command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeft.history import Conversation
from edgeft.tui.actions import Action, How


@dataclass(frozen=True)
class Here:
    """A conversation on the screen, as the command line names it."""

    model: str
    conversation: Conversation
    adapters: Sequence[tuple[str, float]] = ()

    @property
    def number(self) -> str:
        return str(self.conversation.id or "last")

    @property
    def resume(self) -> tuple[str, ...]:
        more = [word for name, scale in self.adapters for word in ("--adapter", f"{name}={scale:g}")]
        begun = ("--resume", self.number) if self.conversation.id else ()
        return ("chat", self.model, *more, *begun)


def chat_actions(here: Here, cascade: bool) -> dict[str, Action]:
    """By the name of the screen's own action."""

    def action(title: str, *command: str, says: str = "") -> Action:
        return Action(title, command, How.HERE, says)

    found = {
        "retry": action("Answer again, with the next seed  (Ctrl+R)", *here.resume, says="/retry"),
        "edit": action("Take my last message back and change it  (F2)", *here.resume, says="/edit NEW TEXT"),
        "branch": action("Go on in a copy  (Ctrl+B)", "history", "branch", here.number),
        "new": action("Begin a new conversation  (Ctrl+N)", "chat", here.model),
        "conversations": action("Find what was said before  (Ctrl+O)", "history", "search", "WORDS"),
        "rename": action("Name this conversation  (F7)", "history", "rename", here.number, "TITLE"),
        "save": action("Write it to a file  (Ctrl+G)", "history", "export", here.number, "FILE"),
        "copy_answer": action("Copy the last answer  (F8)", "history", "show", here.number, "--last"),
        "copy_code": action("Copy its last code block  (F9)", "history", "show", here.number, "--last", "--code"),
        "settings": action("System prompt, sampling, adapters  (Ctrl+T)", *here.resume, says="/set temperature 0.7"),
        "copy_command": action("Copy the command of this conversation  (F3)", *here.resume),
    }
    if cascade:
        by = action("Who answers: the policy, the device, the cloud  (F6)", *here.resume, "--by", "cloud")
        return {"by": by, **found}
    return found

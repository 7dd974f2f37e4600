"""`litert`: the graph of a .litertlm file alone, with a loop of edgeft's own.

The kernels are those that LiteRT-LM's engine runs (LiteRT with XNNPACK). Unlike the engine it tells the probabilities
of what the model could have said: this is what `edgeft verify` measures with. LiteRT tells the standard error what it
loads and unloads, and cannot be asked not to, so it runs in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeft import toolchain
from edgeft.artifact import Artifact
from edgeft.models.litertlm import GRAPH, read_litertlm
from edgeft.plugins import LoadOptions, Session, Support

from . import litert_file
from .child_engine import ChildEngine, ChildSession, check_context
from .cores import physical_cores


@dataclass(frozen=True)
class LitertRuntime:
    name: str = "litert"
    lacks: Mapping[str, str] = field(
        default_factory=lambda: {
            "json": "LiteRT has no grammars",
            "adapters": "the graph takes no adapters at run time",
        }
    )

    def supports(self, artifact: Artifact) -> Support:
        return litert_file.supports(artifact, ("ai_edge_litert",))

    def ready(self) -> Support:
        return litert_file.ready(("ai_edge_litert",))

    def load(self, artifact: Artifact, options: LoadOptions) -> Session:
        file = read_litertlm(artifact.path)
        text, graph = litert_file.text_of(file), file.section(GRAPH)
        request = {"file": str(file.path.absolute()), "begin": graph.begin, "end": graph.end}
        # -P: nothing is imported from the folder that the user happens to be in.
        command = [sys.executable, "-P", str(toolchain.WORKERS / "litert_run.py")]
        engine = ChildEngine(command, {**request, "threads": options.threads or physical_cores()}, file.path)
        context = check_context(options, min(file.context or engine.context, engine.context))
        return LitertSession(engine, text, context, artifact.path, options)


class LitertSession(ChildSession):
    engine_name = "LiteRT"


runtime = LitertRuntime()

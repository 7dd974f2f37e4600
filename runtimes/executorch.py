"""`executorch`: a .pte program in ExecuTorch with XNNPACK, in its toolchain's environment.

The program is the one that a telephone runs, with the same kernels for another processor. Apps sample in C++
(TextLLMRunner); here the loop is edgeft's own, so that answers can be compared with other runtimes' and verified.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeft import toolchain
from edgeft.artifact import Artifact
from edgeft.plugins import LoadOptions, Session, Support

from .child_engine import ChildEngine, ChildSession, check_context
from .cores import physical_cores
from .hf_text import HfText

PROGRAM = "model.pte"
TOOLCHAIN = "executorch"


@dataclass(frozen=True)
class ExecutorchRuntime:
    name: str = "executorch"
    lacks: Mapping[str, str] = field(
        default_factory=lambda: {
            "json": "ExecuTorch has no grammars",
            "adapters": "a program takes no adapters at run time",
        }
    )

    def supports(self, artifact: Artifact) -> Support:
        if not (artifact.path / PROGRAM).is_file():
            return Support(False, f"{artifact.path.name} is not a folder with a {PROGRAM}")
        return self.ready()

    def ready(self) -> Support:
        for module in ("tokenizers", "numpy", "jinja2"):
            if importlib.util.find_spec(module) is None:
                return Support(False, f"{module} is not installed", "pip install 'edgeft[export]'")
        found = toolchain.status(toolchain.find_toolchain(TOOLCHAIN))
        if found.state != "installed":
            what = "out of date" if found.state == "stale" else "not installed"
            hint = f"edgeft toolchain install {TOOLCHAIN}"
            return Support(False, f"the toolchain {TOOLCHAIN}, which runs .pte programs here, is {what}", hint)
        return Support(True)

    def load(self, artifact: Artifact, options: LoadOptions) -> Session:
        python = toolchain.python_of(toolchain.find_toolchain(TOOLCHAIN))
        text, program = HfText(artifact.path), (artifact.path / PROGRAM).absolute()
        request = {"file": str(program), "threads": options.threads or physical_cores()}
        command = [str(python), "-I", str(toolchain.WORKERS / "executorch_run.py")]
        engine = ChildEngine(command, request, artifact.path)
        context = check_context(options, engine.context)
        return ExecutorchSession(engine, text, context, artifact.path, options)


class ExecutorchSession(ChildSession):
    engine_name = "ExecuTorch"


runtime = ExecutorchRuntime()

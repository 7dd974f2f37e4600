"""Runs in the toolchain `optimum`: a Hugging Face folder into an ONNX graph with a cache of keys and values.

Request: {"model": folder, "out": folder}. Result: {"file": name, "type": model type}.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

TASK = "text-generation-with-past"


def main() -> None:
    request = json.load(sys.stdin)
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print

    def send(event: dict[str, object]) -> None:
        events.write(json.dumps(event) + "\n")

    send({"start": "Exporting the graph with Optimum", "total": None})
    with redirect_stdout(sys.stderr):
        from optimum.exporters.onnx import main_export
        from optimum.exporters.tasks import TasksManager
        from transformers import AutoConfig

        kind = AutoConfig.from_pretrained(request["model"]).model_type
        try:
            known = TasksManager.get_supported_tasks_for_model_type(kind, "onnx", library_name="transformers")
        except KeyError:
            known = {}
        if TASK not in known:
            send(
                {
                    "error": f"Optimum does not export {kind} for text generation",
                    "hint": "Export to GGUF: --to gguf-q4.",
                }
            )
            return
        main_export(
            request["model"],
            request["out"],
            task=TASK,
            do_validation=False,
            no_post_process=False,
            local_files_only=True,
            trust_remote_code=False,
        )
    file = next(name for name in ("model.onnx", "decoder_model_merged.onnx") if (Path(request["out"]) / name).is_file())
    send({"result": {"file": file, "type": kind}})


if __name__ == "__main__":
    main()

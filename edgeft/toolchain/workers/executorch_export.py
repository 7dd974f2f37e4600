"""Runs in the toolchain `executorch`: a Hugging Face folder into a program for XNNPACK with its own key-value cache.

Request: {"model": folder, "out": file, "context": tokens, "bits": 4, 8 or 32, "group": n, "eight": [name], "bos": id,
"stops": [id]}. Result: {"types": {type: weights}, "bytes": weights' bytes}.

The transformer is ExecuTorch's own (examples/models/llama), whose cache is written in place; its weights are read from
the safetensors here, so that nothing goes through a pickle or is guessed from a file's name.
"""

import gc
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

Send = Callable[[dict[str, Any]], None]

KEYS = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm_fn",
    "self_attn.k_norm": "attention.k_norm_fn",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
"""Hugging Face's name of a part -> the transformer's."""

STAGES = {"load": 1, "quantize": 1, "trace": 12, "lower": 75, "write": 11}
"""Rough shares of the time, in percent: lowering traces every operation several times."""

BEAT_S = 5.0
"""Seconds between two signs of life of a stage that takes minutes."""


def main() -> None:
    request = json.load(sys.stdin)
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    logging.disable(logging.INFO)

    def send(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")

    with redirect_stdout(sys.stderr):
        send({"start": "Exporting for ExecuTorch", "total": sum(STAGES.values())})
        gc.disable()  # millions of graph nodes live to the end, and would be looked through again and again
        send({"result": export(request, send)})


def export(request: dict[str, Any], send: Send) -> dict[str, Any]:
    import torch

    folder = Path(request["model"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        with stage(send, "load", "loading"):
            model = transformer(config, request["context"])
            load_weights(model, folder, config)
            set_rotation(model, config, request["context"])
        with stage(send, "quantize", "quantizing"):
            result = quantize(model, request)
    started = time.monotonic()
    with stage(send, "trace", "tracing"):
        manager = edge_manager(model, request)
        manager.export()
        manager.run_canonical_optimizations()
    pace = (time.monotonic() - started) / STAGES["trace"]
    with stage(send, "lower", "lowering to XNNPACK", pace * STAGES["lower"]):
        manager.pt2e_quantize([]).to_edge_transform_and_lower(partitioners(request["bits"]))
    with stage(send, "write", "writing"):
        manager.to_executorch()
        with open(request["out"], "wb") as stream:
            manager.export_program.write_to_file(stream)
            stream.flush()
            os.fsync(stream.fileno())
    return result


@contextmanager
def stage(send: Send, name: str, note: str, seconds: float | None = None) -> Iterator[None]:
    """Tell that a stage begins, and its share when it is over.

    Args:
        seconds: how long it may take; it then tells of itself as they pass, up to nine tenths of its share.
    """
    send({"advance": 0, "note": note})
    told, over, started = 0.0, threading.Event(), time.monotonic()

    def tell() -> None:
        nonlocal told
        while seconds and not over.wait(BEAT_S):
            now = 0.9 * STAGES[name] * min(1.0, (time.monotonic() - started) / seconds)
            send({"advance": now - told, "note": note})
            told = now

    clock = threading.Thread(target=tell)
    clock.start()
    try:
        yield
    finally:
        over.set()
        clock.join()
    send({"advance": STAGES[name] - told, "note": note})


def transformer(config: dict[str, Any], context: int) -> Any:
    from executorch.examples.models.llama.llama_transformer import construct_transformer
    from executorch.examples.models.llama.model_args import ModelArgs

    heads, kind = config["num_attention_heads"], config["model_type"]
    norms = kind == "qwen3"
    return construct_transformer(
        ModelArgs(
            dim=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            hidden_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=(config.get("rope_parameters") or config).get("rope_theta", 10000.0),
            use_hf_rope=True,
            attention_qkv_bias=kind == "qwen2",
            use_qk_norm=norms,
            qk_norm_before_rope=norms,
            max_seq_len=context,
            max_context_len=context,
            use_kv_cache=True,
            use_sdpa_with_kv_cache_op=True,
            enable_dynamic_shape=True,
        )
    ).eval()


def load_weights(model: Any, folder: Path, config: dict[str, Any]) -> None:
    """In float32, whatever type they are stored in."""
    weights = {renamed(name): tensor.float() for name, tensor in stored(folder)}
    if "output.weight" not in weights and config.get("tie_word_embeddings"):
        weights["output.weight"] = weights["tok_embeddings.weight"]
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    wanted = {name for name, _ in model.named_parameters()}
    lost = sorted(wanted.intersection(missing)) + sorted(unexpected)
    if lost:
        raise SystemExit(f"the transformer and the model do not fit together: {', '.join(lost[:3])}")


def stored(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                yield name, tensors.get_tensor(name)


def renamed(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> layers.3.feed_forward.w3.weight"""
    begin, part = "", name
    if name.startswith("model.layers."):
        _, _, layer, part = name.split(".", 3)
        begin = f"layers.{layer}."
    stem, _, last = part.rpartition(".")
    return f"{begin}{KEYS.get(stem, stem)}.{last}"


def set_rotation(model: Any, config: dict[str, Any], context: int) -> None:
    """Rotary tables of transformers' own making: theirs knows every kind of scaling."""
    import torch
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    known = AutoConfig.for_model(**config)
    cos, sin = LlamaRotaryEmbedding(known)(torch.zeros(1), torch.arange(context)[None])
    for mine, theirs in ((model.rope.freqs_cos, cos[0]), (model.rope.freqs_sin, sin[0])):
        if mine.shape != theirs.shape:
            raise SystemExit(f"rotary tables of shapes {tuple(mine.shape)} and {tuple(theirs.shape)}")
        mine.copy_(theirs)


def quantize(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Layers as asked for, head and embedding in 8 bits; activations are rounded to 8 bits when they are multiplied."""
    import torch
    from executorch.examples.models.llama.source_transformation.custom_kv_cache import (
        replace_kv_cache_with_custom_kv_cache,
    )
    from executorch.examples.models.llama.source_transformation.quantize import get_quant_embedding_transform
    from executorch.examples.models.llama.source_transformation.sdpa import replace_sdpa_with_custom_op
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    bits, group = request["bits"], request["group"]
    plan = {name: bits_of(name, part, request) for name, part in model.named_modules() if has_matrix(part)}
    result = counted(model, plan, group)
    if bits < 32:
        get_quant_embedding_transform("8,0", False)(model)
        for width, granularity in ((4, PerGroup(group)), (8, PerAxis(0))):
            kind = getattr(torch, f"int{width}")
            # Scales are searched for (half-quadratic), not taken from the largest weight.
            how = Int8DynamicActivationIntxWeightConfig(
                weight_dtype=kind, weight_granularity=granularity, intx_choose_qparams_algorithm="hqq_scale_only"
            )
            chosen = {name for name, given in plan.items() if given == width and name != "tok_embeddings"}
            quantize_(model, how, filter_fn=lambda _, name, chosen=chosen: name in chosen)
    replace_sdpa_with_custom_op(model)
    replace_kv_cache_with_custom_kv_cache(model)
    return result


def has_matrix(part: Any) -> bool:
    import torch

    return isinstance(part, (torch.nn.Linear, torch.nn.Embedding))


def bits_of(name: str, part: Any, request: dict[str, Any]) -> int:
    if request["bits"] == 32:
        return 32
    if name in ("output", "tok_embeddings") or part.weight.shape[1] % request["group"]:
        return 8
    return 8 if any(name.endswith(end) for end in request["eight"]) else int(request["bits"])


def counted(model: Any, plan: dict[str, int], group: int) -> dict[str, Any]:
    mix: dict[str, int] = {}
    size = 0
    for name, part in model.named_parameters():
        bits = plan.get(name.removesuffix(".weight"), 32)
        count = part.numel()
        kind = {4: "int4", 8: "int8", 32: "fp32"}[bits]
        mix[kind] = mix.get(kind, 0) + count
        scales = {4: 2 * count // group, 8: 4 * part.shape[0], 32: 0}[bits]
        size += count * bits // 8 + scales
    return {"types": mix, "bytes": size}


def edge_manager(model: Any, request: dict[str, Any]) -> Any:
    import torch
    from executorch.extension.llm.export.builder import DType, LLMEdgeManager

    context = request["context"]
    about = {
        "get_max_seq_len": context,
        "get_max_context_len": context,
        "get_n_layers": model.n_layers,
        "get_vocab_size": model.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_eos_ids": request["stops"],
    }
    if request["bos"] is not None:
        about["get_bos_id"] = request["bos"]
    return LLMEdgeManager(
        model=model,
        modelname="model",
        max_seq_len=context,
        dtype=DType.fp32,
        use_kv_cache=True,
        example_inputs=(torch.tensor([[2, 3, 4]]), {"input_pos": torch.tensor([0])}),
        enable_dynamic_shape=True,
        metadata=about,
    )


def partitioners(bits: int) -> list[Any]:
    from executorch.extension.llm.export.partitioner_lib import get_xnnpack_partitioner

    # Linear layers with rounded activations first, then whatever else XNNPACK knows.
    kinds = (True, False) if bits < 32 else (False,)
    return [get_xnnpack_partitioner(dynamic_quant_only_partitioner=kind) for kind in kinds]


if __name__ == "__main__":
    main()

"""A llama-server program for machines that have none: llama.cpp's server out of xllamacpp, behind the same flags."""

import argparse
import os
import signal

import xllamacpp

parser = argparse.ArgumentParser()
for flag in ("model", "host"):
    parser.add_argument(f"--{flag}")
for flag in ("port", "ctx-size", "threads", "threads-batch", "batch-size", "ubatch-size", "parallel"):
    parser.add_argument(f"--{flag}", type=int)
for flag in ("cache-type-k", "cache-type-v"):
    parser.add_argument(f"--{flag}", choices=("f16", "q8_0"), default="f16")
for flag in ("no-mmap", "no-repack"):
    parser.add_argument(f"--{flag}", action="store_true")
parser.add_argument("--flash-attn", choices=("on", "off"))
parser.add_argument("--lora-scaled", action="append", default=[])
asked = parser.parse_args()

params = xllamacpp.CommonParams()
params.model.path = asked.model
params.hostnames = [asked.host]
params.port = asked.port
params.n_ctx = asked.ctx_size
params.cpuparams.n_threads = asked.threads
params.cpuparams_batch.n_threads = asked.threads_batch
params.n_batch = asked.batch_size
params.n_ubatch = asked.ubatch_size
params.n_parallel = asked.parallel
kinds = {"f16": xllamacpp.ggml_type.GGML_TYPE_F16, "q8_0": xllamacpp.ggml_type.GGML_TYPE_Q8_0}
params.cache_type_k, params.cache_type_v = kinds[asked.cache_type_k], kinds[asked.cache_type_v]
if asked.no_mmap:
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
params.no_extra_bufts = asked.no_repack
if asked.flash_attn:
    attention = xllamacpp.llama_flash_attn_type
    off, on = attention.LLAMA_FLASH_ATTN_TYPE_DISABLED, attention.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.flash_attn_type = on if asked.flash_attn == "on" else off
params.endpoint_props = True
if key := os.environ.get("LLAMA_API_KEY"):
    params.api_keys = [key]
for path, scale in (text.rsplit(":", 1) for text in asked.lora_scaled):
    adapter = xllamacpp.CommonAdapterLoraInfo(path, float(scale))
    params.lora_adapters = [*params.lora_adapters, adapter]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
signal.pause()

"""Training: QLoRA, LoRA and full fine-tuning of small models, on TRL's SFT trainer, resumable at any instant."""

from __future__ import annotations

from edgeft.train.config import TrainConfig, read_config
from edgeft.train.workflow import Interrupted, Outcome, prepare, train

__all__ = ["Interrupted", "Outcome", "TrainConfig", "prepare", "read_config", "train"]

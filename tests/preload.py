"""What the server that tests fork their runs from has imported already."""

import accelerate
import peft
import torch
import transformers
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama

import scaletrain.callbacks.log
import scaletrain.cli
import scaletrain.runs

__all__ = ["accelerate", "peft", "scaletrain", "torch", "transformers"]

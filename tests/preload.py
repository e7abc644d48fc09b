"""What the server that tests fork their runs from has imported already."""

import os

import accelerate
import peft
import torch
import torch._dynamo
import transformers
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama

import scaletrain.callbacks.log
import scaletrain.cli
import scaletrain.runs

os.environ["DS_ACCELERATOR"] = "cpu"  # asked for as it is imported
import deepspeed

__all__ = ["accelerate", "deepspeed", "peft", "scaletrain", "torch", "transformers"]

"""Gradients of both models for one batch, of which each process has its share; run under torchrun."""

import sys

import torch
from accelerate import Accelerator
from conftest import gradients_of_share

if __name__ == "__main__":
    process = Accelerator()
    result = gradients_of_share(process.process_index, process.num_processes, process)
    if process.is_main_process:
        torch.save(result, sys.argv[1])
    process.end_training()

"""Not a test: what `torchrun` starts in test_train.py, to train suites in as many processes as it is told to."""

import sys
from pathlib import Path

import torch

from guard.lab.suite.config import read_config
from guard.lab.suite.ranks import joined
from guard.lab.suite.train import train

if __name__ == "__main__":
    config, activations, *outs = sys.argv[1:]
    torch.set_num_threads(1)
    with joined() as ranks:
        for out in outs:
            train(read_config(config), Path(activations), Path(out), ranks=ranks, save_seconds=0)

"""What all tests share: a thread in each process, as there is a process for each core, and the same random numbers."""

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before PyTorch is imported, and for the processes that tests start

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

"""Tiny models are fastest on one thread, and a test's time then depends less on what runs beside it."""

import torch

torch.set_num_threads(1)

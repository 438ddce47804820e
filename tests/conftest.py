"""Tiny models are fastest on one thread, and a test's time then depends less on what runs beside it."""

import hypothesis
import torch

torch.set_num_threads(1)

# how long an example takes depends on what else the machine does
hypothesis.settings.register_profile("eellm", deadline=None)
hypothesis.settings.load_profile("eellm")

"""Settings every test shares."""

import hypothesis
import pytest
import torch

# Deterministic, and without deadlines: shared machines are slow at times, which is no property of the code.
hypothesis.settings.register_profile("interpgrad", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("long", deadline=None, max_examples=5000)
hypothesis.settings.load_profile("interpgrad")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)

import pytest
import torch

from maskdm_fast import testing


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with testing.poisoned_memory():
        assert torch.empty(1).isnan().all()
        yield

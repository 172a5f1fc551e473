import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def no_group_stays():
    """A program that ends with an error leaves its process group to the end of its process; the
    tests that call main() have no such end."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()

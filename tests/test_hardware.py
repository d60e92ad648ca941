"""Threads and number types follow the model and the machine."""

import pytest
import torch

from common import hardware
from common.errors import UserError
from common.hardware import settle_processes, suitable_threads


@pytest.fixture
def three_threads(monkeypatch):
    """PyTorch with three threads, which nobody asked for by OMP_NUM_THREADS."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("parameters", "threads"), [(1_999_999, 1), (2_000_000, 3)])
def test_a_tiny_model_runs_on_one_thread(three_threads, parameters, threads):
    model = torch.nn.Embedding(parameters, 1)
    with suitable_threads(model):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 3
    with pytest.raises(RuntimeError, match="half-way"), suitable_threads(model):
        raise RuntimeError("half-way")
    assert torch.get_num_threads() == 3


def test_the_users_number_of_threads_is_kept(three_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with suitable_threads(torch.nn.Linear(2, 2)):
        assert torch.get_num_threads() == 3


def test_several_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE=2: 2 processes are announced, but they do not find each other"):
        settle_processes()
    with pytest.raises(UserError, match="WORLD_SIZE=2: this program runs in one process"):
        settle_processes(one_only=True)
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(UserError, match="WORLD_SIZE=abc: expected the number of processes"):
        settle_processes()


@pytest.mark.parametrize(
    ("seconds_bf16", "supported", "expected"), [(0.5, True, True), (2.0, True, False), (0.5, False, False)]
)
def test_bf16_is_chosen_on_a_cpu_that_is_faster_with_it(monkeypatch, seconds_bf16, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    seconds = {torch.float32: 1.0, torch.bfloat16: seconds_bf16}
    monkeypatch.setattr(hardware, "matmul_seconds", lambda *dtypes: {dtype: seconds[dtype] for dtype in dtypes})
    assert hardware.has_fast_bf16.__wrapped__() == expected


def test_products_of_each_type_are_timed():
    seconds = hardware.matmul_seconds(torch.float32, torch.bfloat16)
    assert set(seconds) == {torch.float32, torch.bfloat16}
    assert all(0 < value < 10 for value in seconds.values())

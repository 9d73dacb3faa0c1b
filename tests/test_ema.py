"""The moving average against its closed form."""

import numpy as np
import pytest
import torch
from helpers import randn

from spo.method.ema import distance, update_ema

MU = 0.9


def tensors(seed):
    return {"a": randn(3, 4, seed=seed), "b": randn(5, seed=seed + 1)}


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_a_policy_that_stands_still(n):
    start, policy, ema = tensors(0), tensors(2), tensors(0)
    for _ in range(n):
        update_ema(ema, policy, MU)
    for name in ema:
        expected = MU**n * start[name].double() + (1 - MU**n) * policy[name].double()
        torch.testing.assert_close(ema[name], expected.float(), rtol=1e-5, atol=1e-6)


def test_a_policy_that_moves():
    ema, n = tensors(0), 6
    policies = [tensors(100 + 10 * i) for i in range(n)]
    for policy in policies:
        update_ema(ema, policy, MU)
    weights = (1 - MU) * MU ** np.arange(n - 1, -1, -1)  # the latest weighs most
    for name, start in tensors(0).items():
        path = np.stack([policy[name].numpy() for policy in policies]).astype(np.float64)
        expected = MU**n * start.numpy() + np.tensordot(weights, path, axes=1)
        np.testing.assert_allclose(ema[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_moves_in_place_and_leaves_the_policy_alone():
    ema, policy = tensors(0), {k: torch.nn.Parameter(v) for k, v in tensors(2).items()}
    storage = {name: tensor.data_ptr() for name, tensor in ema.items()}
    update_ema(ema, policy, 0.0)
    assert all(torch.equal(ema[name], policy[name]) for name in ema)
    assert all(torch.equal(policy[name], value) for name, value in tensors(2).items())
    assert {name: tensor.data_ptr() for name, tensor in ema.items()} == storage
    assert not any(tensor.requires_grad for tensor in ema.values())


def test_distance():
    zero = {"a": torch.zeros(2), "b": torch.zeros(1, 1)}
    other = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[12.0]])}
    assert distance(zero, other).item() == 13.0  # sqrt(9 + 16 + 144)

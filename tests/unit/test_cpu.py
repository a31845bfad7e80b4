"""oneDNN's products and convolutions against torch's own in float64, and what a batch relies on."""

import pytest
import torch
import torch.nn.functional as F

from model.network import cpu
from model.network.dit import ENOUGH
from model.network.vae import CausalConv

random = torch.Generator().manual_seed(0)
X, WEIGHT, BIAS = (torch.randn(*size, generator=random) for size in ((3, 80, 256), (320, 256), (320,)))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def _cut(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, x), -1)[..., 0]  # the same values, not side by side in memory


@pytest.mark.parametrize("given", [X, _cut(X), X.transpose(0, 1)], ids=["contiguous", "every other", "transposed"])
@pytest.mark.parametrize("weight", [WEIGHT, _cut(WEIGHT), WEIGHT.T.contiguous().T], ids=["rows", "cut", "columns"])
def test_products_are_those_of_float64(given: torch.Tensor, weight: torch.Tensor) -> None:
    true = F.linear(given.double(), weight.double(), BIAS.double())
    bound = 1e-5 * true.abs().max().item()
    assert (cpu.linear(given, weight, BIAS) - true).abs().max() < bound
    assert (cpu.linear(given, weight, None) - (true - BIAS)).abs().max() < bound
    assert (cpu.linear_gelu(given, weight, BIAS) - F.gelu(true, approximate="tanh")).abs().max() < bound


@pytest.mark.parametrize("rows", [ENOUGH, ENOUGH + 1, 29, 80, 160])
def test_a_rows_bits_do_not_depend_on_how_many_others_there_are(rows: int) -> None:
    flat = X.flatten(0, 1)
    assert torch.equal(cpu.linear(flat[:rows], WEIGHT, BIAS), cpu.linear(flat, WEIGHT, BIAS)[:rows])
    assert torch.equal(cpu.linear_gelu(flat[:rows], WEIGHT, BIAS), cpu.linear_gelu(flat, WEIGHT, BIAS)[:rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_keep_torchs_path(dtype: torch.dtype) -> None:
    x, weight, bias = X.to(dtype), WEIGHT.to(dtype), BIAS.to(dtype)
    assert torch.equal(cpu.linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(cpu.linear_gelu(x, weight, bias), F.gelu(F.linear(x, weight, bias), approximate="tanh"))


def test_gradients_go_torchs_way() -> None:
    with torch.enable_grad():
        weight = WEIGHT.clone().requires_grad_()
        cpu.linear_gelu(X, weight, BIAS).sum().backward()
        conv = CausalConv(4, 8, (3, 3, 3))
        conv(torch.randn(1, 4, 3, 8, 8)).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert conv.weight.grad is not None and conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("clips", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_convolutions_are_those_of_float64(
    kernel: tuple[int, int, int], stride: tuple[int, int, int], clips: int, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    conv, x = CausalConv(16, 12, kernel, stride), torch.randn(clips, 16, 5, 8, 6)
    ours = conv(x.contiguous(memory_format=layout))
    true = conv.double()(x.double())
    assert ours.shape == true.shape
    assert (ours - true).abs().max() < 1e-5

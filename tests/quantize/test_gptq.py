"""GPTQ: a layer by hand, against rounding alone, and the order of columns within blocks and groups."""

import pytest
import torch

from opensala.quantize import gptq
from opensala.quantize.gptq import output_error, quantise_matrix


def inputs(count, width, seed=0):
    """Correlated inputs `[count, width]`, as hidden states are."""
    torch.manual_seed(seed)
    mixed = torch.randn(count, width // 4) @ torch.randn(width // 4, width)
    return mixed + 0.3 * torch.randn(count, width)


def test_two_columns_by_hand():
    """W = [7, 0.4]: the scale is 1, 0.4 becomes 0; the other way round the error of the first is made up
    for."""
    weight = torch.tensor([[0.4, 7.0]])
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # the second input nearly follows the first
    codes, error = quantise_matrix(weight, hessian, bits=4, group=-1, damping=0.0)
    assert codes.scales.item() == 1.0 and codes.zeros.item() == 8
    # 0.4 is rounded to 0; the second column takes over 0.9 * 0.4 = 0.36 and 7.36 becomes the highest level, 7
    assert codes.codes.tolist() == [[8, 15]]
    assert error == pytest.approx(0.4 / (weight @ hessian @ weight.T).sqrt().item(), rel=1e-5)


def test_the_error_of_a_column_is_passed_on():
    """One input in two columns: only the sum of the two weights counts, and it is kept to half a level."""
    weight = torch.tensor([[0.4, 0.4, 7.0, -7.0]])
    hessian = torch.tensor(
        [[1.0, 0.999, 0.0, 0.0], [0.999, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    )
    codes, _ = quantise_matrix(weight, hessian, bits=4, group=-1, damping=0.0)
    assert codes.codes.tolist() == [[8, 9, 15, 1]], "0.4 + 0.4 is 0 + 1, not 0 + 0"


@pytest.mark.parametrize("group", [16, 32, 64, -1])
@pytest.mark.parametrize("bits, most", [(4, 0.12), (8, 0.008)])
def test_better_than_rounding_alone(bits, group, most):
    x = inputs(400, 64)
    torch.manual_seed(1)
    weight = torch.randn(48, 64)
    hessian = x.T @ x
    codes, error = quantise_matrix(weight, hessian, bits=bits, group=group)
    plain, _ = quantise_matrix(weight, hessian.diagonal().diag(), bits=bits, group=group)
    alone = output_error(weight, plain.weights(), hessian)
    assert error < most and error < 0.8 * alone
    direct = (x @ (weight - codes.weights()).T).norm() / (x @ weight.T).norm()
    assert error == pytest.approx(direct.item(), rel=1e-4), "it is the error of the layer's output"


def test_blocks_change_nothing(monkeypatch):
    """Errors passed on at the end of a block or at once; groups across the border of blocks included."""
    x = inputs(300, 96)
    weight = torch.randn(16, 96)
    made = []
    for block in (1, 7, 40, 96):
        monkeypatch.setattr(gptq, "_BLOCK", block)
        made.append(quantise_matrix(weight, x.T @ x, bits=4, group=32)[0])
    for other in made[1:]:
        same = (other.codes == made[0].codes).float().mean()
        assert same > 0.99, "sums in another order may tip a rounding"
        assert torch.allclose(other.scales, made[0].scales, rtol=0.05)


def test_inputs_that_are_always_zero_or_too_few():
    x = inputs(5, 64)  # five inputs for 64 columns
    x[:, 10] = 0
    weight = torch.randn(16, 64)
    codes, error = quantise_matrix(weight, x.T @ x, bits=4, group=16)
    assert torch.isfinite(codes.weights()).all() and error < 0.2
    step = codes.scales[:, 0]
    assert ((codes.weights()[:, 10] - weight[:, 10]).abs() < 2 * step).all(), "a column nobody uses stays"


def test_numbers_that_are_not_finite_are_refused():
    weight = torch.randn(8, 16)
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        quantise_matrix(weight, torch.eye(16), bits=4, group=16)

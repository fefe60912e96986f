"""The vocabulary's cross entropy in chunks against all logits at once."""

import pytest
import torch
from torch import Tensor

from zerobert.kernels import cross_entropy
from zerobert.kernels.cross_entropy import IGNORED_LABEL

NUM_ROWS, HIDDEN, VOCAB = 37, 16, 64


def make_inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    x = torch.randn(NUM_ROWS, HIDDEN)
    weight, bias = torch.randn(VOCAB, HIDDEN) * 0.3, torch.randn(VOCAB) * 0.3
    bias[-3:] = float("-inf")  # rows that pad the vocabulary
    labels = torch.randint(0, VOCAB - 3, (NUM_ROWS,))
    labels[::5] = IGNORED_LABEL
    return [part.to(dtype).requires_grad_() for part in (x, weight, bias)], labels


@pytest.mark.parametrize("chunk_rows", [1, 8, 100])
def test_chunks_give_the_same_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int
) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_VALUES", chunk_rows * VOCAB)
    results = []
    for name in ("plain", "chunked"):
        inputs, labels = make_inputs(torch.float32)
        loss = cross_entropy.IMPLEMENTATIONS[name](*inputs, labels)
        results.append([loss, *torch.autograd.grad(3 * loss, inputs)])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    assert not results[1][2][-3:].any()
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy.chunked(*inputs, labels), results[0][0])


def test_in_16_bits_chunks_are_as_near_to_the_truth() -> None:
    exact, labels = make_inputs(torch.float32)
    truth = torch.autograd.grad(cross_entropy.plain(*exact, labels), exact)
    inputs, _ = make_inputs(torch.bfloat16)
    got = torch.autograd.grad(cross_entropy.chunked(*inputs, labels), inputs)
    for wanted, grad in zip(truth, got, strict=True):
        error = (grad.float() - wanted).norm() / wanted.norm()
        assert error < 0.01


def test_no_row_with_a_label_is_no_loss() -> None:
    inputs, labels = make_inputs(torch.float32)
    for implementation in cross_entropy.IMPLEMENTATIONS.values():
        loss = implementation(*inputs, torch.full_like(labels, IGNORED_LABEL))
        assert loss.item() == 0
        empty = implementation(inputs[0][:0], inputs[1], inputs[2], labels[:0])
        assert empty.item() == 0

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qwen3_fp8_ascend.evaluate.precision import metrics

MATRICES = arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(2, 9)), elements=st.floats(-50, 50, width=32))


def test_closeness_by_hand() -> None:
    found = metrics.closeness(np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[3.0, 4.0], [1.0, 0.0]]))
    assert found.vectors == 2
    assert found.cosine == pytest.approx(0.5) and found.min_cosine == pytest.approx(0.0)
    assert found.max_rel == pytest.approx(5**0.5)


@given(MATRICES)
def test_a_run_is_close_to_itself(a: np.ndarray) -> None:
    found = metrics.closeness(a, a)
    assert found.min_cosine == pytest.approx(1.0) and found.max_rel == 0
    assert metrics.kl_divergence(a, a).max() == pytest.approx(0.0, abs=1e-12)


@given(MATRICES, st.floats(0.5, 2.0))
def test_a_relative_error_is_the_factor_by_which_vectors_differ(a: np.ndarray, factor: float) -> None:
    a = a + np.float32(60)
    found = metrics.closeness(a.astype(np.float64) * factor, a.astype(np.float64))
    assert found.max_rel == pytest.approx(abs(factor - 1), abs=1e-9)
    assert found.min_cosine == pytest.approx(1.0)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        metrics.closeness(np.ones((2, 3)), np.ones((3, 2)))


def test_kl_divergence_by_torch() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 50, generator=generator), torch.randn(7, 50, generator=generator)
    expected = torch.nn.functional.kl_div(
        a.double().log_softmax(-1), b.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert metrics.kl_divergence(a.numpy(), b.numpy()) == pytest.approx(expected.numpy(), rel=1e-9)


@given(arrays(np.float64, (3, 12), elements=st.floats(-6, 6)), arrays(np.float64, (3, 12), elements=st.floats(-6, 6)))
def test_the_lumped_divergence_is_a_lower_bound(a: np.ndarray, b: np.ndarray) -> None:
    def top(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logprobs = metrics.log_softmax(logits)
        ids = np.argsort(-logprobs, axis=1)[:, :4]
        return ids, np.take_along_axis(logprobs, ids, axis=1)

    lumped = metrics.lumped_kl_divergence(*top(a), *top(b))
    assert (lumped <= metrics.kl_divergence(a, b) + 1e-9).all()
    assert metrics.lumped_kl_divergence(*top(b), *top(b)) == pytest.approx(np.zeros(3), abs=1e-9)


def test_perplexity_and_agreement() -> None:
    assert metrics.perplexity(np.log([0.5, 0.125])) == pytest.approx(4.0)
    assert metrics.agreement(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4])) == 0.75

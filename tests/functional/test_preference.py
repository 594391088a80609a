"""Preference losses against plain numbers of Python, closed forms and their derivatives."""

import math

import pytest
import torch

from lit_llm.functional import bradley_terry_loss, dpo_loss

SCORES = [0.3, -1.2, 2.0, 0.7, 0.7]
PAIRS = [(0, 1), (1, 2), (3, 4), (2, 0)]  # right, wrong, tie, right


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def _by_hand(scores, pairs, *, weights=None, margins=None, eps=0.0, centring=0.0) -> float:
    total = 0.0
    for n, (better, worse) in enumerate(pairs):
        d = scores[better] - scores[worse] - (margins[n] if margins else 0.0)
        loss = -(1 - eps) * _log_sigmoid(d) - eps * _log_sigmoid(-d)
        loss += centring * (scores[better] + scores[worse]) ** 2
        total += loss * (weights[n] if weights else 1.0)
    return total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": [0.5, 0.25, 2.0, 0.0]},
        {"margins": [1.0, 0.5, 0.0, -0.3]},
        {"eps": 0.1},
        {"centring": 0.01},
        {"weights": [1.0, 0.5, 0.5, 3.0], "margins": [0.1] * 4, "eps": 0.2, "centring": 0.3},
    ],
    ids=str,
)
def test_bradley_terry_equals_plain_numbers(options: dict) -> None:
    tensors = {k: torch.tensor(options[k]) for k in ("weights", "margins") if k in options}
    loss, correct = bradley_terry_loss(
        torch.tensor(SCORES),
        torch.tensor(PAIRS),
        label_smoothing=options.get("eps", 0.0),
        centring=options.get("centring", 0.0),
        **tensors,
    )
    assert loss.item() == pytest.approx(_by_hand(SCORES, PAIRS, **options), rel=1e-6)
    assert correct.tolist() == [1.0, 0.0, 0.5, 1.0]


def test_bradley_terry_golden_numbers() -> None:
    # d = 0: ln 2. d = ln 3: sigmoid 3/4, so ln(4/3); the other way round ln 4.
    scores, pairs = torch.tensor([0.0, math.log(3.0), 0.0]), [[0, 2], [1, 0], [0, 1]]
    for pair, expected in zip(pairs, (math.log(2), math.log(4 / 3), math.log(4)), strict=True):
        loss = bradley_terry_loss(scores, torch.tensor([pair])).loss
        assert loss.item() == pytest.approx(expected, rel=1e-6)
    # A margin of ln 3 takes the lead away: ln 2 again, and the pair stays correct.
    margin = torch.tensor([math.log(3.0)])
    loss, correct = bradley_terry_loss(scores, torch.tensor([[1, 0]]), margins=margin)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert correct.tolist() == [1.0]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_a_ranked_prompt_counts_as_in_instructgpt(k: int) -> None:
    """Loss of a prompt: 1 / C(K, 2) times the sum over its pairs."""
    torch.manual_seed(k)
    scores = torch.randn(k, dtype=torch.float64)
    pairs = torch.combinations(torch.arange(k))
    weights = torch.full((len(pairs),), 1 / len(pairs), dtype=torch.float64)
    expected = 0.0
    for better in range(k):
        for worse in range(better + 1, k):
            expected -= _log_sigmoid(float(scores[better] - scores[worse])) / math.comb(k, 2)
    assert bradley_terry_loss(scores, pairs, weights=weights).loss.item() == pytest.approx(expected)


def test_bradley_terry_gradient_is_the_closed_form() -> None:
    eps, centring, margins, weights = 0.1, 0.05, [0.4, 0.0, 0.2, 1.0], [1.0, 0.5, 2.0, 0.25]
    scores = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(
        scores,
        torch.tensor(PAIRS),
        weights=torch.tensor(weights),
        margins=torch.tensor(margins),
        label_smoothing=eps,
        centring=centring,
    ).loss.backward()
    expected = [0.0] * len(SCORES)
    for (better, worse), m, w in zip(PAIRS, margins, weights, strict=True):
        d = SCORES[better] - SCORES[worse] - m
        slope = 1 / (1 + math.exp(-d)) - (1 - eps)
        pull = 2 * centring * (SCORES[better] + SCORES[worse])
        expected[better] += w * (slope + pull)
        expected[worse] += w * (-slope + pull)
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx(expected, abs=1e-7)


def test_heads_are_so_many_reward_models() -> None:
    heads = [SCORES, [1.0, 0.0, -1.0, 3.0, -2.5]]
    pairs = torch.tensor(PAIRS)
    loss, correct = bradley_terry_loss(torch.tensor(heads).T, pairs, margins=torch.full((4,), 0.5))
    expected = sum(_by_hand(one, PAIRS, margins=[0.5] * 4) for one in heads) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # Means of the heads: 0.65, -0.6, 0.5, 1.85, -0.9. The last pair is wrong now, by its mean only.
    assert correct.tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores_stay_finite(dtype: torch.dtype) -> None:
    scores = torch.tensor([1e4, 0.0, -1e4], dtype=dtype, requires_grad=True)
    pairs = torch.tensor([[0, 2], [2, 0], [1, 0]])
    loss, correct = bradley_terry_loss(scores, pairs, label_smoothing=0.1)
    loss.backward()
    exact = scores.detach().float().tolist()
    assert loss.dtype == torch.float32
    # The right pair costs eps d, the wrong ones (1 - eps) d.
    expected = 0.1 * (exact[0] - exact[2]) + 0.9 * (exact[0] - exact[2]) + 0.9 * exact[0]
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([1.9, -0.9, -1.0], rel=1e-2)
    assert correct.tolist() == [1.0, 0.0, 0.0]


def test_half_precision_scores_are_compared_in_float32() -> None:
    scores = torch.tensor([2.0, -0.0078125], dtype=torch.bfloat16)  # 2.0078 is no bfloat16
    loss = bradley_terry_loss(scores, torch.tensor([[0, 1]]), centring=1.0).loss
    expected = -_log_sigmoid(2.0078125) + 1.9921875**2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_no_pairs_no_loss() -> None:
    scores = torch.randn(3, requires_grad=True)
    none = torch.zeros(0, 2, dtype=torch.long)
    loss, correct = bradley_terry_loss(scores, none, weights=torch.zeros(0))
    loss.backward()
    assert loss.item() == 0
    assert correct.shape == (0,)
    assert scores.grad is not None
    assert not scores.grad.any()
    assert dpo_loss(scores, scores.detach(), none, beta=0.1).loss.item() == 0


LOGPROBS, REFERENCE = [-10.0, -12.0, -3.0, -8.0], [-11.0, -11.5, -3.5, -8.5]
RATIOS = [1.0, -0.5, 0.5, 0.5]
DPO_PAIRS = [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_sigmoid_dpo_equals_plain_numbers(beta: float, eps: float) -> None:
    weights = [1.0, 0.5, 3.0]
    logprobs = torch.tensor(LOGPROBS, requires_grad=True)
    result = dpo_loss(
        logprobs,
        torch.tensor(REFERENCE),
        torch.tensor(DPO_PAIRS),
        beta=beta,
        label_smoothing=eps,
        weights=torch.tensor(weights),
    )
    margins = [beta * 1.5, beta * -1.0, 0.0]
    expected = sum(
        w * (-(1 - eps) * _log_sigmoid(m) - eps * _log_sigmoid(-m))
        for w, m in zip(weights, margins, strict=True)
    )
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    assert result.rewards.tolist() == pytest.approx([beta * ratio for ratio in RATIOS])
    assert result.margins.tolist() == pytest.approx(margins)
    assert result.correct.tolist() == [1.0, 0.0, 0.5]
    assert not any(t.requires_grad for t in (result.rewards, result.margins, result.correct))
    result.loss.backward()
    # Equation 7 of the paper: beta sigmoid(-margin), up for the better answer.
    slopes = [
        w * beta * (1 / (1 + math.exp(-m)) - (1 - eps))
        for w, m in zip(weights, margins, strict=True)
    ]
    grad = [slopes[0], slopes[1] - slopes[0], slopes[2] - slopes[1], -slopes[2]]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx(grad, abs=1e-6)


def test_a_policy_that_is_its_reference_has_a_loss_of_ln_2() -> None:
    logprobs = torch.tensor(LOGPROBS)
    result = dpo_loss(logprobs, logprobs, torch.tensor(DPO_PAIRS), beta=0.3)
    assert result.loss.item() == pytest.approx(3 * math.log(2))
    assert result.correct.tolist() == [0.5] * 3
    assert not result.rewards.any()


def test_beta_scales_what_the_sigmoid_sees() -> None:
    """DPO at beta is Bradley-Terry on the log-ratios times beta."""
    pairs = torch.tensor(DPO_PAIRS)
    found = dpo_loss(torch.tensor(LOGPROBS), torch.tensor(REFERENCE), pairs, beta=0.7)
    expected = _by_hand([0.7 * ratio for ratio in RATIOS], DPO_PAIRS)
    assert found.loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_ipo_draws_the_log_ratios_apart_by_1_over_2_beta(beta: float) -> None:
    pair = torch.tensor([[0, 1]])
    reference = torch.tensor([-5.0, -7.0], dtype=torch.float64)
    for apart in (-1.0, 0.0, 1 / (2 * beta), 20.0):
        logprobs = (reference + torch.tensor([apart, 0.0])).requires_grad_()
        result = dpo_loss(logprobs, reference, pair, beta=beta, kind="ipo")
        result.loss.backward()
        assert result.loss.item() == pytest.approx((apart - 0.5 / beta) ** 2, abs=1e-10)
        assert logprobs.grad is not None
        slope = 2 * (apart - 0.5 / beta)
        assert logprobs.grad.tolist() == pytest.approx([slope, -slope], abs=1e-10)
        assert result.margins.item() == pytest.approx(beta * apart, abs=1e-10)


def test_ipo_takes_means_over_tokens_where_it_is_given_lengths() -> None:
    lengths = torch.tensor([4, 2, 1, 5])
    weights = torch.tensor([1.0, 0.5, 2.0])
    result = dpo_loss(
        torch.tensor(LOGPROBS),
        torch.tensor(REFERENCE),
        torch.tensor(DPO_PAIRS),
        beta=0.25,
        kind="ipo",
        lengths=lengths,
        weights=weights,
    )
    # Ratios a token: 1/4, -1/4, 1/2, 1/10; apart by 1/2, -3/4, 2/5, to be by 2.
    expected = (0.5 - 2) ** 2 + 0.5 * (-0.75 - 2) ** 2 + 2 * (0.4 - 2) ** 2
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    assert result.rewards.tolist() == pytest.approx([0.0625, -0.0625, 0.125, 0.025])
    assert result.correct.tolist() == [1.0, 0.0, 1.0]  # the last a tie by sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_extreme_log_probabilities_stay_finite(kind: str, dtype: torch.dtype) -> None:
    logprobs = torch.tensor([-1e4, 0.0], dtype=dtype, requires_grad=True)
    for pair in ([0, 1], [1, 0]):
        result = dpo_loss(logprobs, torch.zeros(2), torch.tensor([pair]), beta=1.0, kind=kind)
        (grad,) = torch.autograd.grad(result.loss, logprobs)
        assert result.loss.dtype == torch.float32
        assert result.loss.isfinite()
        assert grad.isfinite().all()
    sums = torch.tensor([-200.5, -201.0]), torch.tensor([-200.0, -200.0])
    assert dpo_loss(*sums, torch.tensor([[0, 1]]), beta=1.0).margins.item() == 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pairs": torch.zeros(4, dtype=torch.long)}, r"pairs must be \(P, 2\)"),
        ({"weights": torch.ones(2)}, r"weights must be \(3,\), not \(2,\)"),
        ({"label_smoothing": 0.5}, "label_smoothing must be"),
        ({"label_smoothing": -0.1}, "label_smoothing must be"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"kind": "hinge"}, "'hinge'"),
        ({"ref_logprobs": torch.zeros(3)}, r"\(4,\) and \(3,\)"),
        ({"lengths": torch.ones(4)}, "kind 'ipo'"),
        ({"kind": "ipo", "lengths": torch.ones(3)}, "one for each"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "kind 'sigmoid'"),
    ],
)
def test_dpo_refuses_what_does_not_fit(change: dict, words: str) -> None:
    options = {"logprobs": torch.zeros(4), "ref_logprobs": torch.zeros(4), "beta": 0.1}
    with pytest.raises(ValueError, match=words):
        dpo_loss(**(options | {"pairs": torch.tensor(DPO_PAIRS)} | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": torch.zeros(2, 2, 2)}, r"\(N,\) or \(N, H\)"),
        ({"margins": torch.ones(4, 1)}, r"margins must be \(4,\)"),
        ({"label_smoothing": 0.6}, "label_smoothing"),
    ],
)
def test_bradley_terry_refuses_what_does_not_fit(change: dict, words: str) -> None:
    options = {"scores": torch.zeros(5), "pairs": torch.tensor(PAIRS)} | change
    with pytest.raises(ValueError, match=words):
        bradley_terry_loss(**options)

"""Sums of updates, and the means that are logged of them."""

from __future__ import annotations

import pytest
import torch

from lit_llm.functional.policy_gradient import policy_loss, value_loss
from lit_llm.modules.ppo_config import PPOConfig
from lit_llm.modules.update_sums import UpdateSums


def micro_batches(seed: int = 0):
    """Three micro-batches of unequal token counts, with NaN where there is no token."""
    torch.manual_seed(seed)
    made = []
    for lengths in ([1, 2], [5, 4], [3, 1]):
        mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
        tensors = 0.4 * torch.randn(7, 2, 5)
        made.append([*tensors.masked_fill(mask == 0, float("nan")), mask])
    return made


def added(sums: UpdateSums, batch) -> None:
    new, old, advantages, values, old_values, returns, entropy, mask = batch
    policy = policy_loss(new, old, advantages, mask, clip_range=0.2)
    value = value_loss(values, old_values, returns, mask, clip_range=0.1)
    sums.add(policy, value, entropy[mask == 1].sum(), mask)


def by_hand(batches) -> dict[str, float]:
    """Token by token, all together."""
    tokens = [
        [float(part[row, column]) for part in batch[:7]]
        for batch in batches
        for row in range(2)
        for column in range(5)
        if batch[7][row, column]
    ]
    found: dict[str, list[float]] = {}

    def seen(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for new, old, advantage, value, old_value, target, entropy in tokens:
        ratio = torch.tensor(new - old).double().exp().item()
        near = min(max(ratio, 0.8), 1.2)
        seen("loss/policy", max(-advantage * ratio, -advantage * near))
        seen("policy/clipfrac", float(-advantage * near > -advantage * ratio))
        seen("policy/approxkl", ratio - 1 - (new - old))
        seen("policy/ratio_mean", ratio)
        seen("policy/entropy", entropy)
        clipped = min(max(value, old_value - 0.1), old_value + 0.1)
        errors = 0.5 * (value - target) ** 2, 0.5 * (clipped - target) ** 2
        seen("loss/value", max(errors))
        seen("value/clipfrac", float(errors[1] > errors[0]))
    assert len(tokens) == 16
    result = {name: sum(values) / 16 for name, values in found.items()}
    return result | {"policy/ratio_max": max(found["policy/ratio_mean"])}


def joined(batches) -> UpdateSums:
    window, whole = UpdateSums(), UpdateSums()
    for batch in batches:
        added(window, batch)
    whole.join(window.over_ranks(lambda tensor: tensor))
    return whole


def test_means_are_over_tokens_not_micro_batches() -> None:
    batches = micro_batches()
    found, expected = joined(batches).measures(), by_hand(batches)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name
    ratios = [float((b[0] - b[1])[b[7] == 1].exp().sub(1).abs().max()) for b in batches]
    assert found["policy/first_ratio_error"] == pytest.approx(max(ratios), abs=1e-5)
    assert 0 < found["policy/clipfrac"] < 1
    assert 0 < found["value/clipfrac"] < 1
    assert found["policy/skipped"] == 0
    assert "loss/ptx" not in found


def test_an_iteration_is_all_of_its_minibatches() -> None:
    """The first alone tells whether the policy is the one that sampled."""
    first, second = micro_batches(1), micro_batches(2)
    for batch in first:
        batch[0] = batch[1].clone()  # exactly on policy
    whole = UpdateSums()
    for batches in (first, second):
        window = UpdateSums()
        for batch in batches:
            added(window, batch)
        whole.join(window.over_ranks(lambda tensor: tensor))
    found = whole.measures()
    one, two = by_hand(first), by_hand(second)
    for name in one.keys() - {"policy/ratio_max"}:
        assert found[name] == pytest.approx((one[name] + two[name]) / 2, abs=1e-5), name
    assert found["policy/ratio_max"] == pytest.approx(two["policy/ratio_max"], abs=1e-5)
    assert found["policy/first_ratio_error"] == 0
    assert whole.steps == 2


def test_ranks_add_up() -> None:
    """Two ranks of which the other has twice the sums of this one, whatever they are."""
    batches = micro_batches()
    window = UpdateSums()
    for batch in batches:
        added(window, batch)
    asked = []

    def three_times(tensor):
        asked.append(tensor.clone())
        return 3 * tensor

    whole = UpdateSums()
    whole.join(window.over_ranks(three_times))
    assert len(asked) == 1  # one message for all sums
    assert whole.measures() == pytest.approx(joined(batches).measures())
    assert whole.state()["sums"]["tokens"] == 48


def test_parts_that_are_missing_are_not_logged() -> None:
    assert UpdateSums().measures() == {}
    window = UpdateSums()
    new, old, advantages, *_, entropy, mask = micro_batches()[0]
    loss = policy_loss(new, old, advantages, mask, clip_range=0.2)
    window.add(loss, None, entropy[mask == 1].sum(), mask)
    window.add_ptx(torch.tensor(12.0), torch.tensor(8))
    window.add_ptx(torch.tensor(4.0), torch.tensor(8))
    found = window.measures()
    assert found["loss/ptx"] == 1
    assert not [name for name in found if "value" in name]
    skipped = UpdateSums()
    skipped.skipped = 3
    assert skipped.measures() == {"policy/skipped": 3}


def test_the_loss_is_the_sum_of_its_parts() -> None:
    batches = micro_batches()
    whole, parts = joined(batches), by_hand(batches)
    whole.add_ptx(torch.tensor(20.0), torch.tensor(8))
    config = PPOConfig(vf_coef=0.3, ent_coef=0.05, ptx_coef=2.0)
    expected = parts["loss/policy"] + 0.3 * parts["loss/value"] - 0.05 * parts["policy/entropy"]
    assert whole.loss(config) == pytest.approx(expected + 2 * 2.5, abs=1e-5)


def test_a_checkpoint_brings_them_back() -> None:
    whole = joined(micro_batches())
    whole.skipped = 2
    state = whole.state()
    assert all(isinstance(value, float) for value in state["sums"].values())
    again = UpdateSums.of(state)
    assert again.measures() == whole.measures()
    assert (again.steps, again.skipped) == (1, 2)
    more = micro_batches(4)
    for one in (whole, again):
        window = UpdateSums()
        for batch in more:
            added(window, batch)
        one.join(window.over_ranks(lambda tensor: tensor))
    assert again.measures() == whole.measures()


def test_a_ratio_out_of_all_bounds_stays_a_number() -> None:
    """One token that has become e^100 times as likely: the measures of a run must stay finite."""
    batch = micro_batches()[0]
    batch[0] = batch[1] + 100.0
    found = joined([batch]).measures()
    assert all(torch.tensor(value).isfinite() for value in found.values()), found

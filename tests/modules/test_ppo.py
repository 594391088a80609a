"""Iterations of PPO, against the same computed again in plain torch, one response at a time."""

from __future__ import annotations

import copy
import math
import statistics
from typing import Any

import pytest
import torch

from lit_llm.modules.ppo import PPOModule
from tests.modules.ppo_world import RATE, STOP, Kept, fit, module, spread

ROWS = 12
VOCABULARY = 10  # so few that every other response or so stops
SIZES = {
    "rollout_batch_size": ROWS,
    "minibatch_size": 6,
    "micro_batch_size": 2,
    "num_ppo_epochs": 2,
    "kl_coef": 0.3,
    "clip_range": 0.05,
    "value_clip_range": 0.05,
}
MOVED = 0.15  # of every weight away from the reference, before the first rollout


class Sample:
    """What rewards look at."""

    def __init__(self, prompt_ids: list[int], response_ids: list[int]) -> None:
        self.prompt_ids, self.response_ids = prompt_ids, response_ids


class ByHand:
    """The same iteration from the formulas, on whole texts without any padding.

    Of the module it takes the responses and the order of the rows, and nothing else.

    Args:
        made: The module, after the run.
        kept: What the run left.
        critic: ``separate``, ``shared`` or None.
        temperature: Of the sampling.
        settings: As for ``PPOConfig``.
    """

    def __init__(
        self, made: PPOModule, kept: Kept, critic: str | None, temperature: float, **settings: Any
    ) -> None:
        self.critic, self.temperature, self.settings = critic, temperature, settings
        own = copy.deepcopy(made).double()
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                parameter.copy_(kept.start[name])
                parameter.grad = None
        self.policy, self.reference = own.model, own.reference
        self.value_model, self.value_head = own.value_model, own.value_head
        assert self.reference is not None
        named = own.named_parameters()
        self.trained = {name: p for name, p in named if not name.startswith("reference.")}
        self.scores_so_far: list[float] = []
        self.kl_coef: float = settings["kl_coef"]

    # ----- what the models say of one response ---------------------------------------------------

    def says(self, model: Any, prompt: list[int], answer: list[int]) -> tuple[list, list, Any]:
        """Log-probabilities and entropies of its tokens, and the states that they come from."""
        output = model(torch.tensor([prompt + answer]), output_hidden_states=True)
        where = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logs = torch.log_softmax(output.logits[0, where] / self.temperature, -1)
        logprobs = [logs[place, token] for place, token in enumerate(answer)]
        entropies = [-(row.exp() * row).sum() for row in logs]
        return logprobs, entropies, output.hidden_states[-1][0, where]

    def values(self, prompt: list[int], answer: list[int], hidden: Any) -> list:
        head: Any = self.value_head
        if self.critic is None:
            return [torch.tensor(0.0)] * len(answer)
        if self.critic == "separate":
            critic: Any = self.value_model
            head = critic.head
            states = critic.backbone(torch.tensor([prompt + answer])).last_hidden_state
            hidden = states[0, len(prompt) - 1 : -1]
        return [(state @ head.weight[0]) + head.bias[0] for state in hidden]

    # ----- what there is to learn ----------------------------------------------------------------

    def shaped(self, scores: list[float], answers: list[list[int]]) -> list[float]:
        kind = self.settings.get("normalise_scores", "none")
        self.scores_so_far += scores
        if kind != "none":
            known = scores if kind == "batch" else self.scores_so_far
            mean, deviation = statistics.fmean(known), statistics.pstdev(known)
            scores = [(score - mean) / deviation for score in scores]
        if (limit := self.settings.get("score_clip")) is not None:
            scores = [min(max(score, -limit), limit) for score in scores]
        cut = [answer[-1] != STOP for answer in answers]
        if (least := self.settings.get("missing_eos_score")) is not None:
            return [least if is_cut else score for score, is_cut in zip(scores, cut, strict=True)]
        penalty = self.settings.get("missing_eos_penalty", 0.0)
        return [score - penalty * is_cut for score, is_cut in zip(scores, cut, strict=True)]

    def price(self, log_ratio: float) -> float:
        """Of a token, by the log of policy over reference."""
        kind = self.settings.get("kl_estimator", "k1")
        return {
            "k1": log_ratio,
            "k2": log_ratio**2 / 2,
            "k3": math.exp(-log_ratio) - 1 + log_ratio,
        }[kind]

    def rollout(self, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Any]:
        """Old log-probabilities, old values, advantages and returns, a list of each a response."""
        pairs = list(zip(prompts, answers, strict=True))
        scores = spread([Sample(*pair) for pair in pairs])  # type: ignore[misc]
        shaped = self.shaped(scores, answers)
        old, before, kls, rewards, entropies = [], [], [], [], []
        with torch.no_grad():
            for (prompt, answer), score in zip(pairs, shaped, strict=True):
                logprobs, entropy, hidden = self.says(self.policy, prompt, answer)
                against, _, _ = self.says(self.reference, prompt, answer)
                old.append([float(x) for x in logprobs])
                before.append([float(x) for x in self.values(prompt, answer, hidden)])
                entropies += [float(x) for x in entropy]
                kl = [float(a - b) for a, b in zip(logprobs, against, strict=True)]
                kls.append(sum(kl))
                own = [-self.kl_coef * self.price(one) for one in kl]
                own[-1] += score
                rewards.append(own)
        known = {
            "objective/kl": statistics.fmean(kls),
            "objective/kl_coef": self.kl_coef,
            "objective/scores": statistics.fmean(scores),
            "objective/scores_std": statistics.pstdev(scores),
            "objective/rlhf_reward": statistics.fmean(map(sum, rewards)),
            "objective/non_score_reward": statistics.fmean(
                sum(row) - score for row, score in zip(rewards, shaped, strict=True)
            ),
            "objective/entropy": statistics.fmean(entropies),
            "rollout/response_length": statistics.fmean(map(len, answers)),
            "rollout/eos_rate": statistics.fmean(answer[-1] == STOP for answer in answers),
        }
        if self.settings.get("whiten_rewards"):
            deviation = statistics.stdev([one for row in rewards for one in row])
            mean = statistics.fmean([one for row in rewards for one in row])
            rewards = [[(one - mean) / deviation + mean for one in row] for row in rewards]
        kind = self.settings.get("advantage", "gae")
        returns = [[0.0] * len(row) for row in rewards]
        if kind == "gae":
            advantages = [self.gae(*rows) for rows in zip(rewards, before, strict=True)]
            returns = [
                [a + v for a, v in zip(*rows, strict=True)]
                for rows in zip(advantages, before, strict=True)
            ]
            left = [one for row in advantages for one in row]  # returns less values
            came = [one for row in returns for one in row]
            share = 1 - statistics.variance(left) / statistics.variance(came)
            known["value/explained_variance"] = share
            flat = [one for row in advantages for one in row]
            mean, deviation = statistics.fmean(flat), statistics.stdev(flat)
            advantages = [[(one - mean) / deviation for one in row] for row in advantages]
        else:
            # The deviation of a group is that of its scores: the KL keeps its price.
            priced = [sum(row) - score for row, score in zip(rewards, shaped, strict=True)]
            earned = [
                one + other
                for one, other in zip(
                    self.compared(list(shaped), kind), self.compared(priced, "rloo"), strict=True
                )
            ]
            advantages = [[one] * len(row) for one, row in zip(earned, rewards, strict=True)]
        if (target := self.settings.get("kl_target")) is not None:
            error = min(max(known["objective/kl"] / target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * ROWS / self.settings["kl_horizon"]
        return {
            "logprobs": old,
            "values": before,
            "advantages": advantages,
            "returns": returns,
            "known": known,
        }

    def gae(self, rewards: list[float], values: list[float]) -> list[float]:
        """The sum of the paper, term by term: equation 16 with all that is to come."""
        gamma, lam = self.settings.get("gamma", 1.0), self.settings.get("gae_lambda", 0.95)
        ahead = [*values[1:], 0.0]
        deltas = [r + gamma * n - v for r, n, v in zip(rewards, ahead, values, strict=True)]
        return [
            sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
            for t in range(len(deltas))
        ]

    def compared(self, earned: list[float], kind: str) -> list[float]:
        size = self.settings["group_size"]
        found = []
        for first in range(0, len(earned), size):
            group = earned[first : first + size]
            for place, own in enumerate(group):
                if kind == "rloo":
                    found.append(own - statistics.fmean(group[:place] + group[place + 1 :]))
                else:
                    deviation = statistics.stdev(group) + 1e-4
                    found.append((own - statistics.fmean(group)) / deviation)
        return found

    # ----- the updates ---------------------------------------------------------------------------

    def update(
        self,
        prompts: list[list[int]],
        answers: list[list[int]],
        order: list[int],
        texts: list[list[list[int]]],
    ) -> dict[str, Any]:
        """Sample nothing, but learn: plain gradient descent, a minibatch after the other."""
        rollout, settings = self.rollout(prompts, answers), self.settings
        seen: dict[str, list[float]] = {}
        for number, start in enumerate(range(0, len(order), settings["minibatch_size"])):
            rows = order[start : start + settings["minibatch_size"]]
            losses, spent = [], []
            for row in rows:
                new, entropy, hidden = self.says(self.policy, prompts[row], answers[row])
                values = self.values(prompts[row], answers[row], hidden)
                for place in range(len(answers[row])):
                    old, before, advantage, target = (
                        rollout[name][row][place]
                        for name in ("logprobs", "values", "advantages", "returns")
                    )
                    ratio = (new[place] - old).exp()
                    low, high = 1 - settings["clip_range"], 1 + settings["clip_range"]
                    now = float(ratio.detach())
                    near = min(max(now, low), high)
                    clips = near != now and -advantage * near > -advantage * now
                    loss = torch.tensor(-advantage * near) if clips else -advantage * ratio
                    seen.setdefault("policy/clipfrac", []).append(float(clips))
                    seen.setdefault("loss/policy", []).append(float(loss.detach()))
                    seen.setdefault("policy/approxkl", []).append(now - 1 - math.log(now))
                    if self.critic is not None:
                        reach = settings["value_clip_range"]
                        value = float(values[place].detach())
                        kept = min(max(value, before - reach), before + reach)
                        binds = kept != value and abs(kept - target) > abs(value - target)
                        error = torch.tensor(kept) if binds else values[place]
                        error = 0.5 * (error - target) ** 2
                        loss = loss + settings["vf_coef"] * error
                        seen.setdefault("value/clipfrac", []).append(float(binds))
                        seen.setdefault("loss/value", []).append(float(error.detach()))
                    losses.append(loss)
                    spent.append(entropy[place])
            loss = torch.stack(losses).mean()
            loss = loss - settings.get("ent_coef", 0.0) * torch.stack(spent).mean()
            if settings.get("ptx_coef"):
                nll = []
                for text in texts[number]:
                    logs = self.policy(torch.tensor([text])).logits[0].log_softmax(-1)
                    nll += [-logs[place, token] for place, token in enumerate(text[1:])]
                loss = loss + settings["ptx_coef"] * torch.stack(nll).mean()
            weights = [p for p in self.trained.values() if p.requires_grad]
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None:
                        weight -= RATE * gradient
        return {**rollout, "seen": {name: statistics.fmean(all_) for name, all_ in seen.items()}}


# Of all that PPOConfig has, everything is on in one of them.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"vf_coef": 0.5},
    "shared, k3": {
        "value_model": "shared",
        "vf_coef": 0.7,
        "ent_coef": 0.2,
        "kl_estimator": "k3",
        "whiten_rewards": True,
        "missing_eos_penalty": 0.8,
        "normalise_scores": "batch",
        "score_clip": 0.9,
    },
    "discounted, texts": {
        "vf_coef": 0.5,
        "gamma": 0.9,
        "gae_lambda": 0.7,
        "ptx_coef": 0.4,
        "normalise_scores": "running",
        "missing_eos_score": -1.5,
        "kl_target": 0.1,
        "kl_horizon": 48,
    },
    "grpo": {"advantage": "grpo", "group_size": 3, "kl_estimator": "k2"},
    "rloo": {"advantage": "rloo", "group_size": 4, "normalise_scores": "running"},
}


def texts_of(step: int) -> list[list[int]]:
    """The texts that the updates mix in at a step of the run: six rows of six numbers."""
    return [[(6 * step + row + k) % VOCABULARY for k in range(6)] for row in range(6)]


@pytest.mark.parametrize("case", CASES)
def test_iterations_are_those_computed_by_hand(case: str) -> None:
    """Two of them, so that moments, controller and texts go on; each of four steps that clip."""
    settings = SIZES | CASES[case]
    temperature = 0.7 if case == "plain" else 1.0
    made = module(settings, temperature=temperature, vocabulary=VOCABULARY)
    kept = fit(made, 2, moved=MOVED)
    lengths: set[int] = set()
    critic = settings.get("value_model", "separate") if "advantage" not in settings else None
    by_hand = ByHand(made, kept, critic, temperature, **settings)
    for iteration, found in enumerate(kept.experiences):
        size = settings.get("group_size", 1)
        prompts = [prompt.ids for prompt in kept.prompts[iteration] for _ in range(size)]
        width = found["response_mask"].shape[1]
        answers = []
        for row, prompt in enumerate(prompts):
            real = found["attention_mask"][row] == 1
            ids = found["input_ids"][row][real].tolist()
            assert ids[: len(prompt)] == prompt
            answers.append(ids[len(prompt) :])
            assert STOP not in answers[-1][:-1]
            assert found["response_mask"][row].tolist() == [
                int(k < len(answers[-1])) for k in range(width)
            ]
        lengths |= {len(answer) for answer in answers}
        order = found["order"].tolist()
        texts = [texts_of(4 * iteration + step) for step in range(4)]
        expected = by_hand.update(prompts, answers, order, texts)
        names = ["logprobs", "advantages", *(["values", "returns"] if critic else [])]
        for name in names:
            for row, values in enumerate(expected[name]):
                own = found[name][row].tolist()
                assert own[: len(values)] == pytest.approx(values, abs=2e-3, rel=2e-3), (name, row)
                assert not any(own[len(values) :]), (name, row)
        metrics = kept.metrics[iteration]
        for name, value in (expected["known"] | expected["seen"]).items():
            assert metrics[name] == pytest.approx(value, abs=2e-3, rel=2e-3), name
    # Or masks, clipping and the KL would not matter.
    assert len(lengths) >= 3
    for name in ("policy/clipfrac", "objective/kl", *(["value/clipfrac"] if critic else [])):
        assert max(abs(metrics[name]) for metrics in kept.metrics) > 0.02, name
    for name, weight in by_hand.trained.items():
        moved = float((weight.detach() - kept.start[name]).norm())
        own = made.get_parameter(name)
        if not name.startswith("rewards."):
            assert moved > 0, name
        assert float((own - weight).detach().norm()) < 1e-2 * moved, (name, moved)


def test_scores_that_are_all_the_same_say_nothing() -> None:
    """Normalised, they are 0, and not noise blown up."""
    made = module(SIZES)
    for kind in ("batch", "running"):
        made.ppo.normalise_scores = kind  # type: ignore[assignment]
        found = made._shaped(torch.full((6,), 0.1), torch.ones(6, dtype=torch.bool))
        assert float(found.abs().max()) < 0.1


def test_moments_of_all_scores_are_exact_far_from_0() -> None:
    made = module(SIZES | {"normalise_scores": "running"})
    stopped = torch.ones(5, dtype=torch.bool)
    seen: list[float] = []
    for number in range(4):
        scores = 4096 + torch.arange(5.0) * (number + 1)
        seen += scores.tolist()
        found = made._shaped(scores, stopped)
    mean, deviation = statistics.fmean(seen), statistics.pstdev(seen)
    expected = [(score - mean) / deviation for score in seen[-5:]]
    assert found.tolist() == pytest.approx(expected, abs=1e-3)


def test_the_controller_moves_the_price_both_ways() -> None:
    """By a fifth of its size a horizon, up where the KL is above the target, and down below."""
    for target, factor in ((1e-3, 1.2), (1e3, 0.8)):
        made = module(SIZES | {"kl_target": target, "kl_horizon": ROWS})
        kept = fit(made, 3, moved=MOVED)
        prices = [metrics["objective/kl_coef"] for metrics in kept.metrics]
        assert prices == pytest.approx([0.3, 0.3 * factor, 0.3 * factor**2])
        assert made.kl_coef == pytest.approx(0.3 * factor**3)
    assert {m["objective/kl_coef"] for m in fit(module(SIZES), 2).metrics} == {0.3}


@pytest.mark.parametrize("kind", ["separate", "shared", "adapters", "none"])
def test_the_critics_own_weights_have_their_own_rate(kind: str) -> None:
    from lit_llm.models.adapters import AdapterConfig

    settings: dict[str, Any] = {"value_lr_factor": 8.0}
    settings |= {"none": CASES["grpo"], "shared": {"value_model": "shared"}}.get(kind, {})
    adapter = AdapterConfig(r=2) if kind == "adapters" else None
    made = module(SIZES | settings, adapter=adapter)
    fit(made, 1)
    optimizer: Any = made.trainer.optimizers[0]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert len(rates) == count == len(trained)
    found = set()
    for name, parameter in trained.items():
        of_critic = name.startswith(("value_model.", "value_head.")) or "value" in name.split(".")
        assert rates[id(parameter)] == (8 * RATE if of_critic else RATE), name
        found.add(of_critic)
    assert found == ({False} if kind == "none" else {False, True})


def test_it_samples_from_the_policy_and_not_from_the_critic() -> None:
    """Adapters of both on one backbone: the likeliest tokens are those of the merged policy."""
    from lit_llm.models.adapters import AdapterConfig, merged_copy
    from lit_llm.rollout.generation import GenerationConfig

    made = module(SIZES, adapter=AdapterConfig(r=2))
    fit(made, 1, moved=0.5)
    made.generation = GenerationConfig(max_new_tokens=6, temperature=0)
    prompts = made.trainer.datamodule.take_prompts(8)  # type: ignore[attr-defined]
    with torch.no_grad():
        found = {
            "policy": [one.ids for one in made.respond(prompts, range(8))],
            "reference": [one.ids for one in made.respond(prompts, range(8), by_reference=True)],
        }
        merged = merged_copy(made.model).eval()
        plain: Any = copy.deepcopy(made.model).unload()
        for name, model in (("policy", merged), ("reference", plain)):
            for prompt, own in zip(prompts, found[name], strict=True):
                ids = list(prompt.ids)
                while len(ids) < len(prompt.ids) + 6 and (ids == prompt.ids or ids[-1] != STOP):
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                assert ids[len(prompt.ids) :] == own, name
    assert found["policy"] != found["reference"]


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_values_are_of_the_critics_own_adapters(kind: str) -> None:
    """What the rollout has kept of them, and the reference, from models merged by peft itself."""
    from lit_llm.models.adapters import AdapterConfig

    settings = SIZES | {"value_model": kind, "whiten_advantages": False, "num_ppo_epochs": 1}
    made = module(settings, adapter=AdapterConfig(r=2), optimizer=still)
    kept = fit(made, 1, moved=0.3)
    plain: Any = copy.deepcopy(made.model)
    if kind == "separate":
        plain.set_adapter("value")
    critic, start = plain.merge_and_unload(), copy.deepcopy(made.model).unload()
    policy: Any = copy.deepcopy(made.model).merge_and_unload(adapter_names=["default"])
    found, head, kls = kept.experiences[0], made.value_head, []
    assert head is not None
    for row, prompt in enumerate(kept.prompts[0]):
        ids = found["input_ids"][row][found["attention_mask"][row] == 1]
        where = slice(len(prompt.ids) - 1, len(ids) - 1)
        answer = ids[len(prompt.ids) :, None]
        with torch.no_grad():
            states = critic.model(ids[None]).last_hidden_state[0, where]
            expected = states @ head.weight[0] + head.bias[0]  # type: ignore[index, operator]
            own, other = (
                model(ids[None]).logits[0, where].log_softmax(-1).gather(1, answer)[:, 0]
                for model in (policy, start)
            )
        count = len(expected)
        torch.testing.assert_close(found["values"][row, :count], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["logprobs"][row, :count], own, atol=1e-4, rtol=1e-4)
        kls.append(float((own - other).sum()))
    assert kept.metrics[0]["objective/kl"] == pytest.approx(statistics.fmean(kls), abs=1e-4)
    assert abs(kept.metrics[0]["objective/kl"]) > 0.01


def still(groups: Any) -> torch.optim.Optimizer:
    """Moves nothing."""
    return torch.optim.SGD(groups, lr=0.0)

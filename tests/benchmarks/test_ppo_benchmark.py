"""The benchmark runs, at a size where it says nothing about speed; without TRL."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import ppo
from benchmarks.ppo_contestants import CONTESTANTS
from benchmarks.ppo_work import SHAPES, Clock, Work, prepare, read_prompts


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = Work("tiny", 3, tmp_path_factory.mktemp("work"))
    prepare(work)
    return work


def test_all_contestants_get_whole_prompts_and_small_models_of_the_asked_shape(work):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.reward)
    prompts = read_prompts(work, tokenizer)
    assert [len(prompt) for prompt in prompts] == [6] * 3 * 8
    assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set().union(*prompts)
    for folder, name in ((work.policy, "LlamaForCausalLM"), (work.reward, "LlamaForSequenceCl")):
        config = AutoConfig.from_pretrained(folder)
        assert config.architectures[0].startswith(name)
        assert (config.num_hidden_layers, config.vocab_size, config.hidden_size) == (2, 256, 32)


def test_the_full_size_is_the_one_of_the_comparison():
    shape = SHAPES["full"]
    assert (shape["prompts"], shape["prompt_len"], shape["new_tokens"]) == (16, 64, 64)
    assert (shape["hidden_size"], shape["num_hidden_layers"], shape["vocab_size"]) == (
        576,
        8,
        49152,
    )
    assert Work("full", 1, ppo.ROOT).num_minibatches == 4


def test_ours_learns_from_full_responses_four_steps_an_iteration(work, monkeypatch, tmp_path):
    import torch

    steps = []
    step = torch.optim.AdamW.step

    def counted(self, *args, **kwargs):
        steps.append(len(self.param_groups))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    monkeypatch.chdir(tmp_path)
    clock = Clock()
    CONTESTANTS["ours"](work, clock)
    assert not list(tmp_path.iterdir())  # what a run writes goes with its folder
    assert len(clock.ticks) == 3 and len(steps) == 3 * 4
    assert clock.lengths == [5.0] * 3
    measured = clock.measures(warmup=1)
    assert 0 < measured["rollout_seconds"] < measured["seconds"]
    assert measured["peak_bytes"] > 50e6


@pytest.mark.parametrize("name", ppo.ROLLOUTS)
def test_rollouts_sample_full_responses(work, name):
    clock = Clock()
    CONTESTANTS[name](work, clock)
    assert clock.lengths == [5] * 3
    assert min(clock.rollouts) > 0


def test_the_first_repeats_are_not_measured():
    clock = Clock()
    clock.ticks = [100.0, 150.0, 151.0, 153.0, 156.0]
    clock.lengths = [5.0, 5.0, 5.0, 5.0, 5.0]
    clock.rollouts = [90.0, 40.0, 0.5, 0.25, 0.75]
    measured = clock.measures(warmup=2)
    assert (measured["seconds"], measured["rollout_seconds"]) == (2.0, 0.5)


def test_a_round_runs_in_processes_and_ends_in_a_table(capsys, tmp_path):
    file = tmp_path / "rounds.json"
    options = ["--size", "tiny", "--rounds", "1", "--iterations", "1", "--json", str(file)]
    results = ppo.main([*options, "--only", "rollout_generate_fp32"])

    (measured,) = results["rollout_generate_fp32"]
    assert measured["response_length"] == 5
    assert json.loads(file.read_text()) == results
    printed = capsys.readouterr().out
    assert "python benchmarks/ppo.py --size tiny" in printed
    assert "| rollout_generate_fp32 |" in printed and "s an iteration" not in printed


def rounds(*seconds, sampling=0.5):
    return [{"seconds": s, "rollout_seconds": sampling, "peak_bytes": s * 1e9} for s in seconds]


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_tables_show_ratios_of_medians():
    results = {"trl": rounds(8, 9, 100), "ours": rounds(3, 1, 2)}
    ours = cells(ppo.iteration_table(results, "trl").splitlines()[3])
    assert ours == ["ours", "2.00", "1.00 to 3.00", "0.50", "2.00", "4.50", "0.22"]

    results = {
        "rollout_generate_bf16": rounds(2, sampling=2),
        "rollout_ours_bf16": rounds(1, sampling=0.5),
        "rollout_ours_fp32": rounds(1, sampling=0.25),
    }
    lines = ppo.rollout_table(results, tokens=1024).splitlines()
    assert cells(lines[3]) == ["rollout_ours_bf16", "2048", "2048 to 2048", "1.00", "4.00", "0.50"]
    assert cells(lines[4])[4:] == ["-", "-"]  # nothing in fp32 to compare with


def test_names_that_are_no_contestants_are_refused(capsys):
    assert set(CONTESTANTS) < {*ppo.ITERATIONS, *ppo.ROLLOUTS}
    with pytest.raises(SystemExit, match="2"):
        ppo.main(["--only", "ours,theirs"])
    assert "no contestant 'theirs'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        ppo.main(["--only", "ours", "--reference", "trl"])
    assert "--reference trl is not among the contestants ours" in capsys.readouterr().err


class Processes:
    """Stands in for subprocess.run."""

    def __init__(self, stdout="", returncode=0):
        self.commands = []
        self.done = SimpleNamespace(stdout=stdout, stderr="why it failed", returncode=returncode)

    def __call__(self, command, **_):
        self.commands.append(command)
        return self.done


def test_other_work_than_was_asked_for_is_no_measure(monkeypatch, tmp_path):
    args = SimpleNamespace(size="tiny", iterations=1, warmup=1, threads=1, wrap="nice -n 5")
    short = Processes('said before\n{"response_length": 4.5}\n')
    monkeypatch.setattr(ppo.subprocess, "run", short)
    with pytest.raises(SystemExit, match="ours sampled 4.5 tokens a response where 5 were asked"):
        ppo.run_contestant("ours", tmp_path, args)
    assert short.commands[0][:3] == ["nice", "-n", "5"]
    monkeypatch.setattr(ppo.subprocess, "run", Processes(returncode=1))
    with pytest.raises(SystemExit, match="ours failed:\nwhy it failed"):
        ppo.run_contestant("ours", tmp_path, args)


def test_the_environment_of_trl_is_made_when_it_is_not_there(monkeypatch, tmp_path):
    made = []

    def create(folder, **_):
        made.append(folder)
        folder.mkdir(exist_ok=True)

    monkeypatch.setattr(ppo.venv, "create", create)
    pins = tmp_path / "pins"
    pins.write_text("trl==1\n")
    monkeypatch.setattr(ppo, "PEER_PINS", pins)
    folder = tmp_path / "env"

    monkeypatch.setattr(ppo.subprocess, "run", Processes(returncode=1))
    with pytest.raises(SystemExit, match=r"cannot be installed in .*env:\nwhy it failed"):
        ppo.peer_python(folder)
    pip = Processes()
    monkeypatch.setattr(ppo.subprocess, "run", pip)
    python = ppo.peer_python(folder)
    assert ppo.peer_python(folder) == python and python.parent.parent == folder
    assert pip.commands[0][:4] == [str(python), "-m", "pip", "install"]
    assert len(made) == 2  # once more after the failure, and then no more
    pins.write_text("trl==2\n")
    ppo.peer_python(folder)
    assert len(made) == 3


def test_what_trl_needs_is_pinned():
    lines = ppo.PEER_PINS.read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert {"trl==1.12.0", "torch==2.13.0"} < set(pins)
    assert all("==" in pin for pin in pins)

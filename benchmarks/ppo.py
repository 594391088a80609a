"""An iteration of PPO beside TRL's, and rollouts beside ``model.generate``.

    python benchmarks/ppo.py --threads 2
    python benchmarks/ppo.py --only ours,trl --rounds 5 --iterations 4
    python benchmarks/ppo.py --only rollout_ours_bf16,rollout_generate_bf16

An iteration answers 16 prompts of 64 tokens with 64 tokens each, scores them, and learns from them
in one pass of 4 minibatches; policy, reference, value and reward model have 8 layers of SmolLM2's
width each. All contestants read the same random weights and prompts from disk. Every one has a
process of its own; a round runs them all, one after the other, so that a machine that slows down
slows down for everyone. Prints medians over the rounds and their ratios to a reference.

TRL runs in an environment of its own (--peer_env), which is made when it is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # of a script only the own folder is there

from benchmarks.ppo_work import SHAPES, Work, prepare  # noqa: E402
from benchmarks.pretrain import machine, medians  # noqa: E402

ITERATIONS = ("trl", "trl_bf16", "ours", "ours_blocked", "ours_compiled")
ROLLOUTS = (
    "rollout_generate_fp32",
    "rollout_ours_fp32",
    "rollout_generate_bf16",
    "rollout_ours_bf16",
)
DEFAULT = ("trl", "trl_bf16", "ours", *ROLLOUTS)
PEER_PINS = ROOT / "benchmarks" / "ppo_trl.txt"

Rounds = list[dict[str, float]]


def peer_python(folder: Path) -> Path:
    """The Python of TRL's environment, made anew where its pins have changed."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "pins.txt"  # written last: what failed half way is taken up again
    pins = PEER_PINS.read_text(encoding="utf-8")
    if done.exists() and done.read_text(encoding="utf-8") == pins:
        return python
    print(f"making the environment of TRL in {folder} (a minute or two) ...", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(PEER_PINS)]
    result = subprocess.run(install, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"TRL cannot be installed in {folder}:\n{result.stderr[-4000:]}")
    done.write_text(pins, encoding="utf-8")
    return python


def run_contestant(name: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run in a new process; its last line holds the measures."""
    peer = name.startswith("trl")
    python = peer_python(args.peer_env) if peer else Path(sys.executable)
    script = "ppo_trl.py" if peer else "ppo_contestants.py"
    command = [
        *shlex.split(args.wrap),
        *(str(python), str(ROOT / "benchmarks" / script), name, "--size", args.size),
        *("--iterations", str(args.iterations), "--warmup", str(args.warmup)),
        *("--folder", str(folder)),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    asked = SHAPES[args.size]["new_tokens"]
    if result["response_length"] != asked:
        raise SystemExit(
            f"{name} sampled {result['response_length']} tokens a response where {asked} were "
            "asked for; that is not the same work"
        )
    return result


def iteration_table(results: dict[str, Rounds], reference: str) -> str:
    """Medians of the iterations, their ratios to the reference, and the spread of the rounds."""
    base = medians(results[reference])
    lines = [
        "| contestant | s an iteration | of rounds | of it sampling | peak GB "
        f"| speed / {reference} | memory / {reference} |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, rounds in results.items():
        one = medians(rounds)
        times = [x["seconds"] for x in rounds]
        lines.append(
            f"| {name} | {one['seconds']:.2f} | {min(times):.2f} to {max(times):.2f} "
            f"| {one['rollout_seconds']:.2f} | {one['peak_bytes'] / 1e9:.2f} "
            f"| {base['seconds'] / one['seconds']:.2f} "
            f"| {one['peak_bytes'] / base['peak_bytes']:.2f} |"
        )
    return "\n".join(lines)


def rollout_table(results: dict[str, Rounds], tokens: int) -> str:
    """Medians of the rollouts; ratios are to ``model.generate`` in the same type, if it ran.

    Args:
        results: Rounds of each contestant.
        tokens: Sampled tokens of a rollout.
    """
    lines = [
        "| contestant | tokens/s | of rounds | peak GB | speed / generate | memory / generate |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rounds in results.items():
        one = medians(rounds)
        rates = [tokens / x["rollout_seconds"] for x in rounds]
        peer = results.get(f"rollout_generate_{name.rpartition('_')[2]}")
        speed = memory = "-"
        if peer is not None:
            base = medians(peer)
            speed = f"{base['rollout_seconds'] / one['rollout_seconds']:.2f}"
            memory = f"{one['peak_bytes'] / base['peak_bytes']:.2f}"
        lines.append(
            f"| {name} | {tokens / one['rollout_seconds']:.0f} "
            f"| {min(rates):.0f} to {max(rates):.0f} | {one['peak_bytes'] / 1e9:.2f} "
            f"| {speed} | {memory} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Rounds]:
    """Run the rounds, print the tables, and return the measures of every round."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SHAPES, default="full")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3, help="measured in each process")
    parser.add_argument("--warmup", type=int, default=1, help="iterations before them")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes itself")
    parser.add_argument(
        "--only", default=",".join(DEFAULT), help="names of contestants, separated by commas"
    )
    parser.add_argument("--reference", help="ratios are to this one; default: trl")
    parser.add_argument(
        "--peer_env", type=Path, default=ROOT / "runs" / "bench" / "trl", help="folder"
    )
    parser.add_argument("--wrap", default="", help="command put before each process, e.g. a lock")
    parser.add_argument("--json", type=Path, help="file to write the measures of all rounds to")
    args = parser.parse_args(argv)
    if args.warmup < 1 or args.iterations < 1 or args.rounds < 1:
        parser.error("--rounds, --iterations and --warmup must be at least 1")
    names = args.only.split(",")
    if unknown := [name for name in names if name not in (*ITERATIONS, *ROLLOUTS)]:
        known = ", ".join((*ITERATIONS, *ROLLOUTS))
        parser.error(f"--only: there is no contestant {unknown[0]!r}; known are {known}")
    iterations = [name for name in names if name in ITERATIONS]
    reference = args.reference or ("trl" if "trl" in names else next(iter(iterations), None))
    if reference is not None and reference not in iterations:
        parser.error(f"--reference {reference} is not among the contestants {', '.join(names)}")

    results: dict[str, Rounds] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        work = Work(args.size, args.warmup + args.iterations, Path(folder))
        prepare(work)
        for number in range(args.rounds):
            for name in names:
                one = run_contestant(name, Path(folder), args)
                results[name].append(one)
                print(
                    f"round {number + 1}: {name:22} {one['seconds']:7.2f} s "
                    f"{one['peak_bytes'] / 1e9:6.2f} GB",
                    flush=True,
                )
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"\npython benchmarks/ppo.py {shlex.join(sys.argv[1:] if argv is None else argv)}")
    print(
        f"{args.size}, medians of {args.rounds} rounds of {args.iterations} iterations; {machine()}"
    )
    if iterations and reference is not None:
        chosen = {name: results[name] for name in iterations}
        print(f"\n{iteration_table(chosen, reference)}")
    if rollouts := {name: results[name] for name in names if name in ROLLOUTS}:
        print(f"\n{rollout_table(rollouts, work.prompts * work.new_tokens)}")
    return results


if __name__ == "__main__":
    main()

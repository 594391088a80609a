"""Pre-training side by side: ours, Hugging Face Trainer, a plain loop eager and compiled.

    python benchmarks/pretrain.py
    python benchmarks/pretrain.py --size 15m --rounds 5 --steps 20
    python benchmarks/pretrain.py --size narrow --steps 50 --contestants ours_eager,ours_bare_eager

Every contestant trains the same model on the same tokens, in a process of its own; a round runs
them all, one after the other, so that a machine that slows down slows down for everyone. Prints
medians over the rounds and their ratios to a reference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = "ours,hf_trainer,plain,plain_compiled"


def run_contestant(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Train in a new process; its last line holds the measures."""
    command = [
        *shlex.split(args.wrap),
        *(sys.executable, str(ROOT / "benchmarks" / "contestants.py"), name),
        *("--size", args.size, "--steps", str(args.steps), "--warmup", str(args.warmup)),
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Median of every measure over the rounds."""
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def table(results: dict[str, list[dict[str, float]]], reference: str) -> str:
    """Medians, their ratios to the reference, and the spread of the rounds."""
    base = medians(results[reference])
    lines = [
        "| contestant | tokens/s | of rounds | step ms | peak GB "
        f"| speed / {reference} | memory / {reference} |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, rounds in results.items():
        one = medians(rounds)
        rates = [x["tokens_per_s"] for x in rounds]
        lines.append(
            f"| {name} | {one['tokens_per_s']:.0f} | {min(rates):.0f} to {max(rates):.0f} "
            f"| {one['step_seconds'] * 1e3:.1f} | {one['peak_bytes'] / 1e9:.2f} "
            f"| {one['tokens_per_s'] / base['tokens_per_s']:.2f} "
            f"| {one['peak_bytes'] / base['peak_bytes']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Run the rounds, print the table, and return the measures of every round."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="135m", help="135m, 15m, narrow or tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps measured in each process")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes itself")
    parser.add_argument("--contestants", default=DEFAULT, help="names, separated by commas")
    parser.add_argument("--reference", help="ratios are to this one; default: hf_trainer")
    parser.add_argument("--wrap", default="", help="command put before each process, e.g. a lock")
    parser.add_argument("--json", type=Path, help="file to write the measures of all rounds to")
    args = parser.parse_args(argv)
    if args.warmup < 1 or args.steps < 1 or args.rounds < 1:
        parser.error("--rounds, --steps and --warmup must be at least 1")
    names = args.contestants.split(",")
    reference = args.reference or ("hf_trainer" if "hf_trainer" in names else names[-1])
    if reference not in names:
        parser.error(f"--reference {reference} is not among the contestants {', '.join(names)}")

    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            one = run_contestant(name, args)
            results[name].append(one)
            print(
                f"round {number + 1}: {name:16} {one['tokens_per_s']:8.0f} tokens/s "
                f"{one['peak_bytes'] / 1e9:6.2f} GB",
                flush=True,
            )
            if args.json:
                args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"\n{args.size}, medians of {args.rounds} rounds of {args.steps} steps; {machine()}\n")
    print(table(results, reference))
    return results


def machine() -> str:
    """What the numbers were measured on."""
    model: Any = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8")
        names = [x.split(":")[1].strip() for x in text.splitlines() if x.startswith("model name")]
        flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in text.split()]
        model = f"{names[0] if names else model} ({', '.join(flags) or 'no bf16 instructions'})"
    return f"{os.cpu_count()} x {model}"


if __name__ == "__main__":
    main()

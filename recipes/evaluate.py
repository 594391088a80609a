r"""Judge models: perplexity, benchmark tasks, safety, coherence, and one report over all of them.

    python recipes/evaluate.py runs/sft/model
    python recipes/evaluate.py runs/sft/model --compare runs/ppo/model --judge runs/reward/model
    python recipes/evaluate.py HuggingFaceTB/SmolLM2-135M-Instruct --suite reasoning,safety \\
        --limit 200 --texts wiki=wiki.test.txt
    python recipes/evaluate.py runs/pretrain --suite none --tasks lm_eval/arc_easy

docs/evaluation.md says what each number means. An evaluation that was stopped goes on where it was
when the command is repeated.
"""

import shlex
import sys
from functools import partial

from lit_llm.arguments import evaluation_arguments
from lit_llm.console import recipe
from lit_llm.evaluation.session import evaluate_models
from lit_llm.evaluation.tracking import track


@recipe
def main(args: list[str] | None = None) -> None:
    """Evaluate, compare, report."""
    given = sys.argv[1:] if args is None else args
    comparison, settings, logging = evaluation_arguments(__doc__.partition("\n")[0], given)
    evaluate_models(
        comparison,
        settings,
        command=shlex.join(["python", "recipes/evaluate.py", *given]),
        track=partial(track, logging, comparison.output_dir),
    )


if __name__ == "__main__":
    main()

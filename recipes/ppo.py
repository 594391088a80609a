r"""Let a fine-tuned model learn from a reward model, a rule, or both: PPO, GRPO or RLOO.

    python recipes/ppo.py --model.base.pretrained runs/sft/model --model.rewards runs/reward/model
    python recipes/ppo.py --model.base.pretrained FOLDER --model.rewards my_rewards.py:polite
    python recipes/ppo.py --model.base.pretrained FOLDER --model.ppo.advantage rloo \\
        --model.ppo.group_size 4 --model.rewards exact_match --data.sources my_questions.jsonl

Adapters want a higher learning rate than all weights: --model.optimizer.init_args.lr 2e-5.
The defaults stand in recipes/configs/ppo.yaml; --help lists every setting, --print_config writes
them as YAML. A run that was stopped goes on where it was when the command is repeated.
"""

from pathlib import Path

from lit_llm.callbacks.ppo_health import PPOHealth
from lit_llm.callbacks.responses import Responses
from lit_llm.cli import RecipeCLI
from lit_llm.console import recipe
from lit_llm.data.prompts import PromptDataModule
from lit_llm.modules.ppo import PPOModule


@recipe
def main(args: list[str] | None = None) -> RecipeCLI:
    """Measure, train, measure again beside the model it started from, export, report."""
    cli = RecipeCLI(
        PPOModule,
        PromptDataModule,
        output_dir="runs/ppo",
        config=Path(__file__).parent / "configs" / "ppo.yaml",
        samples=Responses,
        callbacks={"health": PPOHealth},
        args=args,
    )
    cli.test("before")
    cli.fit()
    cli.test("after")
    cli.export()
    cli.report()
    return cli


if __name__ == "__main__":
    main()

"""Chat with a model: the folder that a recipe exported, or a name on the Hugging Face Hub.

    python recipes/chat.py runs/sft/model
    python recipes/chat.py runs/sft/model --prompt "What does len() do?" --temperature 0
    python recipes/chat.py runs/sft/model --system "Answer in one word." < questions.txt

At a terminal /help lists the commands; over a pipe every line is a message and every answer goes
to stdout.
"""

from typing import Any, Literal

from jsonargparse import ArgumentParser

from lit_llm.console import recipe


def run(
    folder: str,
    prompt: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Chat with a model.

    Args:
        folder: Folder with a model and its tokenizer, or the name of one on the Hugging Face Hub.
        prompt: Print the answer to this one message and end.
        system: System prompt.
        max_new_tokens: Longest answer in tokens.
        temperature: Sampling temperature; 0 takes the most likely token.
        top_p: Sample from the most likely tokens that hold this much probability; 1 is off.
        seed: Seed of the sampling.
        dtype: Data type of the weights.
    """
    import torch

    from lit_llm.data.tokenizer import load_tokenizer
    from lit_llm.models import BaseModelConfig, build_model, resolve_config, vocabulary_of
    from lit_llm.rollout.chat import ChatSession, answer, converse
    from lit_llm.rollout.generation import GenerationConfig

    config = GenerationConfig(max_new_tokens, temperature, top_p=top_p)
    base = BaseModelConfig(pretrained=folder, dtype=dtype)
    resolve_config(base)  # tells of a wrong folder before the tokenizer does
    tokenizer = load_tokenizer(folder)
    model: Any = build_model(base, vocab_size=vocabulary_of(tokenizer)["vocab_size"])
    session = ChatSession(model, tokenizer, config, system, seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if prompt is not None:
        answer(session, prompt)
    else:
        converse(session)


@recipe
def main(args: list[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_function_arguments(run, as_positional=True)
    run(**parser.parse_args(args).as_dict())


if __name__ == "__main__":
    main()

"""recipes/tokenizer.py as a user runs it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_llm.data.splits import assign_split
from lit_llm.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "tokenizer.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("tokenizer_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Lines; the held-out ones hold a word of their own that training must not see."""
    lines = []
    for number in range(2_000):
        split = assign_split(f"{number} wordword")
        word = "wordword" if split == "train" else "heldout"
        line = f"{number} {word}"
        if assign_split(line) == split:
            lines.append(line)
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(lines + lines[:10]))
    return path


def test_default_is_python_docs_and_the_shipped_config_says_so(main, tmp_path, capsys):
    config = str(ROOT / "recipes" / "configs" / "tokenizer.yaml")
    main(["--config", config, "--output_dir", str(tmp_path / "a"), "--vocab_size", "1024"])
    first = capsys.readouterr().out
    main(["--output_dir", str(tmp_path / "b"), "--vocab_size", "1024"])
    second = capsys.readouterr().out
    assert first.replace(str(tmp_path / "a"), "") == second.replace(str(tmp_path / "b"), "")
    tokenizer = load_tokenizer(tmp_path / "a")
    assert len(tokenizer) == 1024
    one, two = (load_tokenizer(tmp_path / name).backend_tokenizer.to_str() for name in "ab")
    assert one == two
    compression = float(re.search(r"held-out text \(validation\): (\S+)", first).group(1))
    assert 2.0 < compression < 3.5
    assert "<|endoftext|> = 0, <|pad|> = 1, <|im_start|> = 2, <|im_end|> = 3" in first


def test_held_out_text_is_not_seen(main, corpus, tmp_path, capsys):
    main(
        [
            *("--sources", f"[{{path: {corpus}, documents: lines}}]"),
            *("--output_dir", str(tmp_path / "out"), "--vocab_size", "1000"),
        ]
    )
    tokens = "".join(load_tokenizer(tmp_path / "out").get_vocab())
    assert "wordword" in tokens
    assert "held" not in tokens
    assert "10 equal" in capsys.readouterr().out


def test_several_sources_and_nothing_held_out(main, corpus, tmp_path, capsys):
    (tmp_path / "more.md").write_text("a second source\n" * 20)
    main(
        [
            *("--sources", f"[{corpus}, {tmp_path / 'more.md'}]"),
            *("--val_fraction", "0", "--test_fraction", "0"),
            *("--output_dir", str(tmp_path / "out"), "--vocab_size", "300"),
            *("--cleaning.max_repetition", "0.3", "--deduplication.near", "true"),
        ]
    )
    out = capsys.readouterr().out
    assert "kept 1 of 2 documents" in out
    assert "1 repetitive" in out
    assert "bytes per token are not measured" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sources", "./nope.txt"], "error: ./nope.txt: no such file or folder.\n"),
        (
            ["--vocab_size", "100"],
            "error: vocab_size 100 is too small: 256 bytes and 4 special tokens need at least "
            "260.\n",
        ),
        (["--val_fraction", "1"], "error: val_fraction 1.0 and test_fraction 0.05 must not"),
        (["--cleaning.max_repetition", "2"], "error: cleaning: max_repetition 2.0 must lie in"),
        (["--sources", '[{"path": "a", "wight": 1}]'], "has no field 'wight'"),
        (["--sources", '[{"path": "a", "weight": -1}]'], "error: source a: weight -1.0 must be"),
    ],
)
def test_mistakes_are_one_sentence(main, capsys, tmp_path, arguments, sentence):
    if "--sources" not in arguments:
        (tmp_path / "a.txt").write_text("some text")
        arguments = ["--sources", str(tmp_path / "a.txt"), *arguments]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--output_dir", str(tmp_path / "out")])
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_is_light():
    code = (
        "import runpy, sys; sys.argv = ['tokenizer.py', '--help']\n"
        "try: runpy.run_path(sys.argv.pop(0) and RECIPE, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'lightning', 'datasets', 'pyarrow', 'tokenizers'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    code = code.replace("sys.argv.pop(0) and RECIPE", repr(str(RECIPE)))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "--sources SOURCES" in result.stdout
    assert "Number of tokens, special tokens included." in result.stdout
    assert "loaded: []" in result.stdout

"""The built-in pair: what it promises, and that the script which made it can be trusted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import specdec
from specdec import zoo
from specdec.evals.make_prompts import OUT as PROMPTS
from specdec.forward import jit
from specdec.zoo import corpus, train

NEW_TOKENS = 32


def load(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=dtype).eval()


def prompts() -> list[dict[str, str]]:
    return [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def big() -> Any:
    return load("big")


@pytest.fixture(scope="module")
def small() -> Any:
    return load("small")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(zoo.path("big"))


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="big, small"):
        zoo.path("medium")


def test_pair_is_small_enough_for_git() -> None:
    folders = [zoo.path(name) for name in zoo.NAMES]
    assert sum(f.stat().st_size for folder in folders for f in folder.iterdir()) < 32e6


def test_pair_shares_one_tokenizer_that_round_trips(tokenizer: Any) -> None:
    other = AutoTokenizer.from_pretrained(zoo.path("small"))
    assert tokenizer.get_vocab() == other.get_vocab()
    text = "def f(x):\n\treturn 'naïve ☃ \U0001f40d' + str(1234)\r\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_prompts_come_from_files_that_training_never_saw() -> None:
    assert len(prompts()) == 40
    assert all(corpus.is_held_out(prompt["source"]) for prompt in prompts())


def test_split_depends_on_the_file_name_alone(tmp_path: Path) -> None:
    names = [f"module_{i}.py" for i in range(60)]
    for name in names:
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("x = 1\n")
    files = corpus.read_corpus(tmp_path)
    assert [f.name for f in files] == sorted(names)
    assert [f.held_out for f in files] == [corpus.is_held_out(f.name) for f in files]
    assert 0 < sum(f.held_out for f in files) < len(files) / 4


def test_log_ends_with_measurements_over_the_bars() -> None:
    log = (Path(zoo.__file__).parent / "training_log.jsonl").read_text().splitlines()
    result = json.loads(log[-1])
    assert result["held_out_perplexity_big"] < 0.8 * result["held_out_perplexity_small"]
    assert result["acceptance_greedy"] >= 0.60


def test_model_card_states_what_the_log_says() -> None:
    folder = Path(zoo.__file__).parent
    result = json.loads((folder / "training_log.jsonl").read_text().splitlines()[-1])
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert result.pop("stage") == "result"
    for name, value in result.items():
        assert str(value) in card, name


def test_small_agrees_with_big_on_held_out_code(big: Any, small: Any, tokenizer: Any) -> None:
    """Tokens of big's own greedy continuation that are small's argmax, on eight prompts."""
    agree = []
    for prompt in prompts()[::5]:
        ids = tokenizer(prompt["prompt"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            text = big.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
            guess = small(input_ids=text).logits[0, ids.shape[1] - 1 : -1].argmax(-1)
        agree += (guess == text[0, ids.shape[1] :]).tolist()
    assert sum(agree) / len(agree) > 0.5


def test_greedy_equals_transformers_on_every_held_out_prompt(
    big: Any, small: Any, tokenizer: Any
) -> None:
    """Alone and in left-padded batches of eight, with the draft and without."""
    texts = [prompt["prompt"] for prompt in prompts()]
    flags: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    reference = load("big")  # never wrapped
    spec, plain = specdec.wrap(big, draft=small), specdec.wrap(big)
    for start in range(0, len(texts), 8):
        group = texts[start : start + 8]
        alone = []
        for text in group:
            inputs = tokenizer(text, return_tensors="pt")
            alone.append(reference.generate(**inputs, **flags)[0].tolist())
            assert spec.generate(**inputs, **flags)[0].tolist() == alone[-1]
        first = tokenizer(group[0], return_tensors="pt")
        assert plain.generate(**first, **flags)[0].tolist() == alone[0]
        batch = tokenizer(group, return_tensors="pt", padding=True)
        width = batch["input_ids"].shape[1]
        out = spec.generate(**batch, **flags)
        for row, wanted in enumerate(alone):
            prompt_len = int(batch["attention_mask"][row].sum())
            new = wanted[prompt_len:]
            assert out[row, width : width + len(new)].tolist() == new


@pytest.mark.skipif(bool(jit.why_not()), reason=jit.why_not())
def test_bfloat16_with_and_without_speculation_is_the_same_text(tokenizer: Any) -> None:
    """A row's bits do not depend on the rows beside it, so near-ties cannot fall either way."""
    big, small = load("big", torch.bfloat16), load("small", torch.bfloat16)
    spec, plain = specdec.wrap(big, draft=small, num_draft_tokens=5), specdec.wrap(big)
    coupled = specdec.wrap(big, draft=small, verification="gumbel")
    for prompt in prompts()[::5]:
        inputs = tokenizer(prompt["prompt"], return_tensors="pt")
        greedy: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        assert torch.equal(spec.generate(**inputs, **greedy), plain.generate(**inputs, **greedy))
        sampled = greedy | {"do_sample": True, "top_k": 0, "seed": 3}
        # by the rule that keeps the tokens of plain sampling
        found = coupled.generate(**inputs, **sampled)
        assert torch.equal(found, plain.generate(**inputs, **sampled))


@pytest.fixture
def tiny_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        corpus.SourceFile(f"m{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 60, i == 3)
        for i in range(4)
    ]
    # the held-out loss reads rows of 1,025 tokens
    files.append(corpus.SourceFile("long.py", "value = [1, 2, 3]\n" * 400, True))
    monkeypatch.setattr(corpus, "read_corpus", lambda: files)
    monkeypatch.setitem(train.SHAPES, "small", train.Shape(1, 32, 48, 2, 1))


@pytest.mark.filterwarnings("ignore:Token indices sequence length:UserWarning")
def test_training_resumes_where_it_stopped(tiny_corpus: None, tmp_path: Path) -> None:
    del tiny_corpus
    recipe = train.Recipe(tokens=4 * 512, batch=512, micro=256, lengths=((1.0, 64),))

    def run(folder: Path, stop_after: int | None) -> LlamaForCausalLM:
        trainer = train.Trainer(folder, seed=5, device="cpu", save_every=2)
        model = train.build_model(train.SHAPES["small"], trainer.tok, seed=5)
        calls = 0

        def loss(m: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if stop_after is not None and calls > stop_after:
                raise KeyboardInterrupt
            return train.plain_loss(m, rows)

        try:
            trainer.run_stage("small", model, recipe, loss)
        except KeyboardInterrupt:
            assert stop_after is not None
        return model

    whole = run(tmp_path / "whole", None)
    run(tmp_path / "parts", stop_after=5)  # dies inside the third step, after a checkpoint
    resumed = run(tmp_path / "parts", None)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=f"{name} differs after resuming")

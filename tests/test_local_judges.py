"""Judges on this machine: a tiny random model, tiny random classifiers, and a fake reward model."""

import math
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from judged import PROMPT, verdicts_of

import local_judges
from docket import Bill
from feedback import Markers
from local_judges import Classifier, HuggingFaceJudge, RewardModelJudge, batches
from templates import PromptTemplate
from utils import UserError
from verdicts import Comparison, Question

Patch = pytest.MonkeyPatch
CHAT = ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[answer]{% endif %}")
TEXTS = ["Yes.", "No, I would not say so.", "Perhaps! It depends on what you mean by it.", "Yes. " * 20]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers, and a byte-level tokenizer whose only merge is a blank with a 1."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "\u01201", "<s>"]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [("\u0120", "1")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, max_position_embeddings=1024)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A random Llama of 1 layer with one label, and the tokenizer of tiny_model with a pad token."""
    return classifier(tmp_path_factory.mktemp("classifier"), tiny_model, labels=1)


def classifier(folder: Path, tiny_model: Path, labels: int) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                             num_attention_heads=4, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id)
        config.num_labels = labels
        model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    return folder


def questions(texts: list[str] = TEXTS) -> list[Question]:
    return [Question(PROMPT, (first, second)) for first in texts for second in texts]


def test_batches_have_rows_of_like_length_and_no_more_tokens_than_allowed() -> None:
    """10 and 9 padded to 20 tokens; 5, 4, 4 and 1 to 20; a row that is longer than all of it comes alone."""
    assert list(batches([4, 10, 1, 5, 9, 4], most=20)) == [[1, 4], [3, 0, 5, 2]]
    assert list(batches([30, 1], most=20)) == [[0], [1]]


def test_a_local_judge_weighs_what_the_whole_texts_weigh(tiny_model: Path) -> None:
    """log P(1) - log P(2) is the difference of the log-probabilities of the two whole texts: the beginning cancels. One
    ends in one token (a blank with a 1), the other in two (a blank, a 2). All questions share their forward passes."""
    import torch

    judge = HuggingFaceJudge(str(tiny_model))
    model, tokenizer = judge.model_and_tokenizer
    shares = judge.first_label_probabilities(questions())
    for question, share in zip(questions(), shares, strict=True):
        text = "\n\n".join(message["content"] for message in PromptTemplate().format(*question))
        whole = []
        for label in "12":
            ids = torch.tensor([tokenizer(f"{text}\n\nResponse {label}")["input_ids"]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].double().log_softmax(-1)
            whole.append(logps.gather(1, ids[0, 1:, None]).sum().item())
        assert math.isclose(share, 1 / (1 + math.exp(whole[1] - whole[0])), rel_tol=1e-4)


def test_labels_of_one_token_take_one_row_a_question_and_few_passes(tiny_model: Path, monkeypatch: Patch) -> None:
    """Neither 2 nor 3 is merged with the blank before it: 16 questions are 16 rows, which both labels read."""
    judge = HuggingFaceJudge(str(tiny_model), PromptTemplate(labels="23"))
    model, _ = judge.model_and_tokenizer
    shapes = []
    model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    judge.first_label_probabilities(questions())
    assert sum(rows for rows, _ in shapes) == 16 and len(shapes) < 4
    assert all(rows * T <= local_judges.BATCH_TOKENS for rows, T in shapes)


@pytest.mark.parametrize(("first", "second", "expected"), [
    (0.9, 0.3, ("candidate", ("1", "2"), "", False)), (0.2, 0.6, ("baseline", ("2", "1"), "", False)),
    (0.9, 0.8, (None, ("1", "1"), "tie", True)), (0.5, 0.5, (None, (None, None), "tie", False)),
    (math.nan, 0.5, (None, (None, None), "unparsed", False))])
def test_a_local_judge_is_asked_in_both_orders(tiny_model: Path, monkeypatch: Patch, first: float, second: float,
                                               expected: tuple[Any, ...]) -> None:
    """first, second: the probability of label 1 with the candidate first, and with it second. 0.9 and 0.3 are above 1/2
    for the candidate, and for label 2, the candidate's. 0.9 and 0.8: the judge likes the place."""
    judge = HuggingFaceJudge(str(tiny_model))
    answers = {("Yes.", "No."): first, ("No.", "Yes."): second}
    monkeypatch.setattr(judge, "first_label_probabilities", lambda asked: [answers[one.responses] for one in asked])
    [verdict] = verdicts_of(judge, [Comparison(PROMPT, "Yes.", "No.")], orders=2)
    assert (verdict.winner, verdict.choices, verdict.why, verdict.flipped) == expected


def test_what_a_local_judge_said_is_known_until_its_folder_changes(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    comparisons = [Comparison(PROMPT, "Yes.", "No."), Comparison(PROMPT, "No.", "Perhaps.")]
    asked = []
    for turn in range(3):
        bill = Bill()
        verdicts_of(HuggingFaceJudge(str(model)), comparisons, orders=2, cache=tmp_path / "cache", bill=bill)
        asked.append(bill.requests)
        if turn == 1:
            (model / "generation_config.json").write_text("{}")
    assert asked == [4, 0, 4]


def test_a_local_judge_is_asked_through_its_chat_template(tiny_model: Path) -> None:
    judge = HuggingFaceJudge(str(tiny_model))
    _, tokenizer = judge.model_and_tokenizer
    tokenizer.chat_template = CHAT
    text = tokenizer.decode(judge.token_ids(Question(PROMPT, ("Yes.", "No.")), "2"))
    assert text.startswith("[user]Below is") and text.endswith("Pick one.[answer]Response 2")
    assert text.count("[user]") == 1


def test_a_question_longer_than_the_local_judges_context_is_unparsed(tiny_model: Path) -> None:
    verdicts = verdicts_of(HuggingFaceJudge(str(tiny_model)), [
        Comparison(PROMPT, "Yes. " * 200, "No."), Comparison(PROMPT, "Yes.", "No.")])
    assert [verdict.why == "unparsed" for verdict in verdicts] == [True, False]
    assert verdicts[0].text == "longer than the model's context"


def test_a_local_judge_gives_no_reason(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="--reason: --judge hf:"):
        HuggingFaceJudge(str(tiny_model), PromptTemplate(reason=True))


def test_a_folder_without_a_model_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="transformers cannot load it"):
        verdicts_of(HuggingFaceJudge(str(tmp_path)), [Comparison(PROMPT, "a", "b")])
    with pytest.raises(UserError, match="neither a reward model's run nor a sequence classifier"):
        verdicts_of(RewardModelJudge(str(tmp_path)), [Comparison(PROMPT, "a", "b")])


def test_a_reward_model_judges_by_score_in_its_own_markers(monkeypatch: Patch, tmp_path: Path) -> None:
    """The fake reward is the number of e's: 2 to 1, 1 to 1, 0 to 1, and one that is not a number."""
    seen: list[tuple[str, str]] = []

    class Fake:
        def __init__(self) -> None:
            self.markers = {"human_prefix": "Q: ", "human_suffix": "\n",
                            "assistant_prefix": "A: ", "assistant_suffix": "</s>"}

        def score(self, prompts: list[str], completions: list[str]) -> list[float]:
            seen.extend(zip(prompts, completions, strict=True))
            return [math.nan if "?" in text else float(text.count("e") - text.count("/s")) for text in completions]

    (tmp_path / "config.yaml").write_text("")
    monkeypatch.setitem(sys.modules, "reward_model", types.SimpleNamespace(load_reward_model=lambda path: Fake()))
    comparisons = [Comparison(PROMPT, text, "be", candidate_first=False) for text in ("bee", "be", "b", "?")]
    judge = RewardModelJudge(str(tmp_path), at_once=3)
    verdicts = verdicts_of(judge, comparisons)
    assert [(v.winner, v.choices, v.why) for v in verdicts] == [
        ("candidate", ("2",), ""), (None, (None,), "tie"), ("baseline", ("1",), ""), (None, (None,), "unparsed")]
    assert seen[0] == ("Q: Hi.\nA: Hello!</s>Q: Bye.\nA: ", "be</s>") and judge.order_blind
    assert verdicts_of(judge, [Comparison(PROMPT, "bee", "b")])[0].winner == "candidate"
    assert len(seen) == len(set(seen)) == 4, "each text is scored once, however often it is compared"


def test_a_classifier_scores_a_batch_as_it_scores_one_by_one(tiny_classifier: Path) -> None:
    """The score of a row alone, without padding, is the model's own."""
    import torch

    scorer = Classifier(str(tiny_classifier), Markers())
    scores = scorer.score([PROMPT] * len(TEXTS), TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        ids = torch.tensor([scorer.tokenizer(PROMPT + text)["input_ids"]])
        with torch.no_grad():
            assert math.isclose(score, scorer.model(ids).logits.item(), rel_tol=1e-4, abs_tol=1e-6)
    assert len(set(scores)) == len(TEXTS)
    scorer.model.config.pad_token_id = None
    assert scorer.score([PROMPT] * len(TEXTS), TEXTS) == pytest.approx(scores, rel=1e-4)


def test_a_classifier_judges_by_its_score(tiny_classifier: Path) -> None:
    scorer = Classifier(str(tiny_classifier), Markers())
    first, second = scorer.score([PROMPT] * 2, ["Yes.", "No."])
    [verdict] = verdicts_of(RewardModelJudge(str(tiny_classifier)), [Comparison(PROMPT, "Yes.", "No.")])
    assert verdict.winner == ("candidate" if first > second else "baseline")
    assert verdict.text == f"{first!r} to {second!r}"


def test_a_classifier_with_a_chat_template_is_shown_the_turns(tiny_classifier: Path) -> None:
    scorer = Classifier(str(tiny_classifier), Markers(assistant_suffix="</s>"))
    scorer.tokenizer.chat_template = CHAT
    assert scorer.tokenizer.decode(scorer.ids("Be kind." + PROMPT, "Yes.</s>")) == (
        "[system]Be kind.[user]Hi.[assistant]Hello![user]Bye.[assistant]Yes.")


def test_a_classifier_is_shown_the_end_of_what_is_too_long(tiny_classifier: Path) -> None:
    scorer = Classifier(str(tiny_classifier), Markers())
    ids = scorer.ids("Hi. " * 200, "The end.")
    assert len(ids) == 512 and scorer.tokenizer.decode(ids).endswith("Hi. The end.")


def test_a_classifier_of_several_labels_is_no_reward_model(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 labels; the head of a reward model has 1"):
        verdicts_of(RewardModelJudge(str(classifier(tmp_path, tiny_model, labels=3))), [Comparison(PROMPT, "a", "b")])

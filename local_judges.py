"""Judges on this machine: an instruct model read by the probability of its labels, and reward models."""

import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from docket import Docket
from feedback import Markers
from templates import PromptTemplate
from utils import UserError
from verdicts import Answer, Question, Reading

BATCH_TOKENS = 4096  # of a forward pass, padding included
NO_VERDICT = "longer than the model's context"


def looks_like_path(name: str) -> bool:
    return not name or name.startswith(("/", ".", "~", os.sep))


def fingerprint(path: str) -> str:
    """What tells one state of a folder from another: its files' names, sizes and times; a name on the Hub for itself.

    Weights are not read for it: that takes longer than to judge by them.
    """
    files = sorted(file for file in Path(path).rglob("*") if file.is_file()) if Path(path).is_dir() else []
    facts = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32] if files else path


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def batches(lengths: Sequence[int], most: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Places of rows of like length, longest first, so many that they have at most `most` tokens when padded."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    while order:
        n = max(1, most // max(1, lengths[order[0]]))
        yield order[:n]
        order = order[n:]


class HuggingFaceJudge:
    """A local instruct model, read by the probability that it names each label; no text is sampled.

    What it says of a question is P(first label) as a share of both labels' probability; above 1/2 the first is better.
    """

    order_blind = False

    def __init__(self, path: str, template: PromptTemplate | None = None, at_once: int = 64) -> None:
        """at_once: questions whose answers come together; they are sorted by length."""
        if looks_like_path(path) and not (path and Path(path).expanduser().is_dir()):
            raise UserError(f"--judge hf:{path}: no such folder; give one that transformers loads, or a Hub name")
        self.name, self.path, self.at_once = f"hf:{path}", str(Path(path).expanduser()), at_once
        self.template = template or PromptTemplate()
        if self.template.reason:
            raise UserError(f"--reason: --judge {self.name} weighs labels and writes nothing; leave it out, or name a "
                            "model of an endpoint")

    @property
    def labels(self) -> str:
        return self.template.labels

    @cached_property
    def place(self) -> dict[str, Any]:
        return {"judge": "hf", "weights": fingerprint(self.path), "gpu": on_gpu(), "labels": self.labels}

    def identity(self, question: Question) -> dict[str, Any]:
        return {**self.place, "messages": self.template.messages(question.prompt, question.responses)}

    @cached_property
    def model_and_tokenizer(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        gpu = on_gpu()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path)
            model: Any = AutoModelForCausalLM.from_pretrained(self.path, dtype="auto" if gpu else torch.float32)
        except (OSError, ValueError) as error:
            raise UserError(f"--judge {self.name}: transformers cannot load it: {error}") from error
        return model.to("cuda" if gpu else "cpu").eval(), tokenizer

    def ask(self, questions: Sequence[Question], docket: Docket) -> None:
        for start in range(0, len(questions), self.at_once):
            numbers = [n for n in range(start, min(start + self.at_once, len(questions))) if docket.state(n) != "known"]
            docket.bill.requests += len(numbers)
            shares = self.first_label_probabilities([questions[number] for number in numbers])
            for number, share in zip(numbers, shares, strict=True):
                docket.take(number, Answer(NO_VERDICT if math.isnan(share) else f"P({self.labels[0]}) = {share!r}"))

    def read(self, text: str) -> Reading:
        if text == NO_VERDICT:
            return Reading(None)
        share = float(text.rpartition("= ")[2])
        return Reading(0.5 if share == 0.5 else float(share > 0.5))

    def first_label_probabilities(self, questions: Sequence[Question]) -> list[float]:
        """P(first label) / (P(first label) + P(second label)), as the next words after "Response"."""
        rows = [[self.token_ids(question, label) for label in self.labels] for question in questions]
        return [1 / (1 + math.exp(min(second - first, 700.0))) for first, second in self.label_logps(rows)]

    def token_ids(self, question: Question, label: str) -> list[int]:
        """The question and an answer that names `label`, as one text: a label may merge with the blank before it."""
        _, tokenizer = self.model_and_tokenizer
        text = "\n\n".join(message["content"] for message in self.template.messages(*question))
        if tokenizer.chat_template is None:
            return tokenizer(f"{text}\n\nResponse {label}")["input_ids"]
        chat = [{"role": "user", "content": text}]  # one message: many templates refuse two of a role in a row
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tokenizer(f"{text}Response {label}", add_special_tokens=False)["input_ids"]

    def label_logps(self, pairs: Sequence[list[list[int]]]) -> list[list[float]]:
        """Log-probability, in nats, of what each of a pair of rows has after their common beginning; not a number
        where one is longer than the model's context. Labels of one token read the same ids, and those once.
        """
        model, _ = self.model_and_tokenizer
        longest = getattr(model.config, "max_position_embeddings", None) or math.inf
        starts = [sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False)))
                  for rows in pairs]
        needed = {tuple(row[:-1]): start for rows, start in zip(pairs, starts, strict=True) for row in rows
                  if max(map(len, rows)) <= longest}
        logps = self.logps_after(needed)
        return [[sum(logps[tuple(row[:-1])][i][token].item() for i, token in enumerate(row[start:]))
                 if max(map(len, rows)) <= longest else math.nan for row in rows]
                for rows, start in zip(pairs, starts, strict=True)]

    def logps_after(self, needed: dict[tuple[int, ...], int]) -> dict[tuple[int, ...], Any]:
        """For each row of ids (T,) with a place: log-probs of what comes after ids place - 1 to T - 1, (T - place + 1,
        V). Rows of like length share a forward pass, padded on the right, where no id before sees it.
        """
        import torch

        model, _ = self.model_and_tokenizer
        rows, found = list(needed), {}
        for places in batches([len(row) for row in rows]):
            batch = [rows[place] for place in places]
            T = max(map(len, batch))
            ids = torch.tensor([[*row, *[0] * (T - len(row))] for row in batch], device=model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in batch], device=model.device)
            kept = sorted({t for row in batch for t in range(needed[row] - 1, len(row))})
            with torch.inference_mode():
                logits = model(ids, attention_mask=mask,
                               logits_to_keep=torch.tensor(kept, device=model.device)).logits  # (rows, kept, V)
            for number, row in enumerate(batch):
                first = kept.index(needed[row] - 1)
                mine = logits[number, [first + i for i, t in enumerate(kept[first:]) if t < len(row)]]
                found[row] = mine.float().log_softmax(-1).cpu()
        return found


class RewardModelJudge:
    """A reward model: the higher score wins, equal scores are a tie. It is a run of ours, or a sequence classifier of
    transformers with one label. `markers` are those of the samples."""

    order_blind = True

    def __init__(self, path: str, markers: Markers | None = None, labels: str = "12", at_once: int = 256) -> None:
        self.path = str(Path(path).expanduser())
        if not (path and Path(self.path).is_dir()) and (looks_like_path(path)
                                                        or not re.fullmatch(r"[\w.-]+/[\w.-]+", path)):
            raise UserError(f"--judge rm:{path}: no such folder; give the folder of a reward model's run, or a "
                            "sequence classifier with one label: its folder or its name on the Hub")
        self.name, self.labels, self.at_once = f"rm:{path}", labels, at_once
        self.markers = markers or Markers()
        self.scores: dict[tuple[str, str], float] = {}  # of prompts with a response, each scored once in a run

    @cached_property
    def place(self) -> dict[str, Any]:
        return {"judge": "rm", "weights": fingerprint(self.path), "gpu": on_gpu(), "markers": self.markers}

    def identity(self, question: Question) -> dict[str, Any]:
        return {**self.place, "prompt": question.prompt, "responses": question.responses}

    @cached_property
    def scorer(self) -> Any:
        """An object with `score(prompts, responses)`, in markers of its own."""
        if is_our_run(self.path):
            from reward_model import load_reward_model

            return load_reward_model(self.path)
        return Classifier(self.path, self.markers)

    def ask(self, questions: Sequence[Question], docket: Docket) -> None:
        markers = Markers(**self.scorer.markers)
        for start in range(0, len(questions), self.at_once):
            numbers = [n for n in range(start, min(start + self.at_once, len(questions))) if docket.state(n) != "known"]
            if not (asked := [questions[number] for number in numbers]):
                continue
            docket.bill.requests += len(asked)
            texts = [(self.markers.rewrite_prompt(question.prompt, markers),
                      self.markers.rewrite_response(question.responses[place], markers))
                     for place in (0, 1) for question in asked]
            if new := [text for text in dict.fromkeys(texts) if text not in self.scores]:
                scores = self.scorer.score([prompt for prompt, _ in new], [response for _, response in new])
                self.scores.update(zip(new, scores, strict=True))
            for number, first, second in zip(numbers, texts, texts[len(asked):], strict=False):
                docket.take(number, Answer(f"{self.scores[first]!r} to {self.scores[second]!r}"))

    def read(self, text: str) -> Reading:
        first, second = map(float, text.split(" to "))
        if math.isnan(first) or math.isnan(second):  # nobody's win
            return Reading(None)
        return Reading(0.5 if first == second else float(first > second))


def is_our_run(path: str) -> bool:
    return (Path(path) / "config.yaml").is_file()


class Classifier:
    """A sequence classifier of transformers with one label, which is the reward.

    With a chat template it is shown the turns, else the prompt and the response as one text. Where they are longer than
    its context they lose their beginning.
    """

    def __init__(self, path: str, markers: Markers) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        gpu = on_gpu()
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, truncation_side="left")
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                path, dtype="auto" if gpu else torch.float32)
        except (OSError, ValueError) as error:
            raise UserError(f"--judge rm:{path}: neither a reward model's run nor a sequence classifier that "
                            f"transformers can load: {error}") from error
        if model.config.num_labels != 1:
            raise UserError(f"--judge rm:{path}: {model.config.num_labels} labels; the head of a reward model has 1")
        self.model, self.markers = model.to("cuda" if gpu else "cpu").eval(), markers._asdict()
        self.turns = markers.turns
        limits = (self.tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or math.inf)
        self.longest = min(limits)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        import torch

        rows = [self.ids(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        pad = self.model.config.pad_token_id  # without one the model takes a row at a time
        scores = [math.nan] * len(rows)
        for places in batches([len(row) for row in rows], BATCH_TOKENS if pad is not None else 1):
            T = len(rows[places[0]])
            ids = [[*rows[place], *[pad] * (T - len(rows[place]))] for place in places]
            mask = [[1] * len(rows[place]) + [0] * (T - len(rows[place])) for place in places]
            with torch.inference_mode():
                logits = self.model(torch.tensor(ids, device=self.model.device),
                                    attention_mask=torch.tensor(mask, device=self.model.device)).logits  # (rows, 1)
            for place, score in zip(places, logits[:, 0].float().tolist(), strict=True):
                scores[place] = score
        return scores

    def ids(self, prompt: str, response: str) -> list[int]:
        cut = {"truncation": True, "max_length": int(self.longest)} if self.longest < 1e9 else {}
        if self.tokenizer.chat_template is None:
            return self.tokenizer(prompt + response, **cut)["input_ids"]
        roles = {"": "system", "human": "user", "assistant": "assistant"}
        turns = [(roles[who], text.strip()) for who, text in self.turns(prompt)]
        turns = turns[:-1] if turns and turns[-1] == ("assistant", "") else turns
        answer = response.removesuffix(self.markers["assistant_suffix"])
        turns = [(role, text) for role, text in [*turns, ("assistant", answer)] if text or role != "system"]
        chat = [{"role": role, "content": text} for role, text in turns]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False, **cut)["input_ids"]

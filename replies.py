"""What an endpoint's reply tells: an answer, or why there is none and what can be done."""

import email.utils
import math
import re
import time
from typing import Any

from verdicts import Answer


class Failure:
    """What a request without an answer tells. reason: in words, without the key."""

    def __init__(self, error: Exception, reason: str) -> None:
        import openai

        self.reason, self.kind = reason, type(error).__name__
        status, code, headers = None, None, {}
        if isinstance(error, openai.APIStatusError):
            status, code, headers = error.status_code, error.code, error.response.headers
        said = reason.lower()
        self.asked = retry_after(headers.get("retry-after", ""))  # seconds
        self.slow_down = status == 429
        self.empty = isinstance(error, NoChoice)
        self.charged = status is None  # who got no answer may have been served all the same
        self.of_this_question = status in (400, 413, 422) and (
            code in ("context_length_exceeded", "content_filter") or "maximum context length" in said)
        unsupported = re.search(r"unsupported (?:parameter|value): '(\w+)'", said) if status in (400, 422) else None
        self.unsupported = unsupported[1] if unsupported else ""  # a setting that the model does not take
        self.final = status is not None and (
            code == "insufficient_quota" or not (status in (408, 409, 425, 429) or status >= 500))


class NoChoice(ValueError):
    """A completion without any choice."""


def answer_of(completion: Any) -> Answer:
    """The text of an endpoint's reply, and its tokens. Errors: `ValueError` where it is no chat completion."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list):
        raise ValueError(f"the endpoint's answer is not a chat completion: {str(completion)[:80]!r}")
    if not choices:
        raise NoChoice("a completion without choices")
    text = getattr(getattr(choices[0], "message", None), "content", None)
    usage = getattr(completion, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    return Answer(text if isinstance(text, str) else "", *(n if isinstance(n, int) else 0 for n in counts))


def retry_after(header: str) -> float | None:
    """Seconds from a Retry-After header, which holds a number or a date; None where it holds neither."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None

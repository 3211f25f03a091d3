"""Whether an answer is correct."""

from __future__ import annotations

import re
import threading

from memshare.errors import UserError
from memshare.lab.evals.questions import Question
from memshare.lab.problems import read_answer

_SECONDS = 10  # for parsing, and for comparing; an answer that takes longer is wrong
# The letter may be set in a font: \boxed{\textbf{(B)}}.
_BOXED_LETTER = re.compile(r"\\boxed\{\s*(?:\\(?:text|math)(?:rm|bf|it|sf|tt)?\{)?\s*\(?([A-D])\b")


def is_right(question: Question, text: str) -> bool:
    """Return whether ``text``, all that the model wrote, ends in the right answer.

    Mathematics is compared by ``math-verify`` (equal expressions in another form are right), a
    choice by the last letter in a box, a problem of the reasoner by its last final answer.

    Raises:
        UserError: ``math-verify`` is not installed.
    """
    match question.kind:
        case "reasoner":
            return read_answer(text) == int(question.reference)
        case "choice":
            letters = _BOXED_LETTER.findall(text)
            return bool(letters) and letters[-1] == question.reference
        case "math":
            return _is_equal(question.reference, text)


def _is_equal(reference: str, text: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError("grading mathematics: pip install 'memshare[eval]'") from None
    # An expression may take sympy for ever. The limit is made by a signal, which only a main thread
    # may use: elsewhere there is none.
    is_main = threading.current_thread() is threading.main_thread()
    seconds = _SECONDS if is_main else None
    gold = parse(f"${reference}$", parsing_timeout=seconds)
    return bool(verify(gold, parse(text, parsing_timeout=seconds), timeout_seconds=seconds))

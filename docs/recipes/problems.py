"""Writes the reasoner's problems as JSON lines, for lm-eval: ``problems.py [COUNT] > FILE``."""

from __future__ import annotations

import json
import sys

from memshare.lab.problems import generate

for number in range(int(sys.argv[1]) if len(sys.argv) > 1 else 100):
    problem = generate("chain", number)
    print(json.dumps({"prompt": problem.prompt, "answer": str(problem.answer)}))

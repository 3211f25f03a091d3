"""Accuracy on problems with known answers: what KV memory given up costs a model.

- ``questions``: the reasoner's problems, and public benchmarks through ``datasets``
- ``grading``: whether an answer is correct
- ``answers``: a model's answers, from an engine started here or over HTTP
"""

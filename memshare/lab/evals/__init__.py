"""Accuracy on problems with known answers: what KV memory given up costs a model.

- ``questions``: the reasoner's problems, and public benchmarks through ``datasets``
- ``grading``: whether an answer is right
- ``answers``: a model's answers, from an engine of our own or over HTTP
"""

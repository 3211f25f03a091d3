"""Pictures of what was measured.

- ``style``: colours of the arms, one figure to a file
- ``arms``: correct answers, preemptions and tokens per step, by arm
- ``usage``: KV memory over time, with preemptions
- ``switches``: first token and memory, by context and number of agents
- ``pareto``: cost against gain
- ``steps``: which reasoning steps are similar, in words and in the KV cache
- ``waterfall``: from all blocks to those that were freed, and why the rest were not
- ``trace``: a text with its repetitions, as a page
"""

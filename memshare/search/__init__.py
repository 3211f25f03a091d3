"""Stage one: output is cut into steps, and evaluators search them for repetitions."""

"""What is counted, logged and explained, and how it gets out of the engine."""

"""What is counted, logged and explained, and how it leaves the engine."""

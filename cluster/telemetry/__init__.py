"""What a replica tells of itself: step statistics, metrics, spans and log lines."""

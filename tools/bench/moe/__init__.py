"""What a mixture of experts' counts cost, and what requests that meet gain."""

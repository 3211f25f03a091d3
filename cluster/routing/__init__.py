"""How loaded replicas are, which of them serves a request, and how many there should be."""

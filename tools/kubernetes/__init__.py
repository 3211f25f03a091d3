"""What belongs to ``k8s/``: its generated parts, and every check that needs no cluster."""

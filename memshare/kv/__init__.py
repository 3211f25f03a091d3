"""The contents of KV blocks: where K and V lie, how similar two blocks or tokens are."""

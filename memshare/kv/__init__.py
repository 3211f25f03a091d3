"""The contents of KV blocks: where K and V lie, how alike two blocks or tokens are."""

"""``twins``: blocks whose tokens appear elsewhere in the request."""

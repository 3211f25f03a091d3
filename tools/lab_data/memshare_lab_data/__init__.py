"""Data of MemShare's instruments: ``adapter/`` is the small reasoning model's LoRA adapter."""

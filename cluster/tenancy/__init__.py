"""Tenants: who is calling, what they may do, what they used, and whose KV blocks are whose."""

"""The vLLM plug-in. All contact with vLLM internals lies in this package."""

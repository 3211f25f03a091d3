"""HTTP: what stands between Ray Serve and vLLM's OpenAI app, in replicas and in proxies."""

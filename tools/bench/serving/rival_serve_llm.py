"""``ray.serve.llm`` with the engine that the others have, for tools/bench/serving/__main__.py.

Runs in an environment of its own, with ``ray[llm]`` and the vLLM that it wants; imports nothing of
this project.
"""

from __future__ import annotations

import argparse
import json

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--name", required=True, help="in the OpenAI API")
    parser.add_argument("--engine", required=True, help="options of vLLM, JSON")
    args = parser.parse_args()
    config = LLMConfig(
        model_loading_config={"model_id": args.name, "model_source": args.model},
        engine_kwargs=json.loads(args.engine),
        deployment_config={"num_replicas": 1, "max_ongoing_requests": 256},
        placement_group_config={"bundles": [{"CPU": 1}], "strategy": "STRICT_PACK"},
        accelerator_type=None,
    )
    # Bookkeeping: replica and ingress want a CPU each, whatever the machine has.
    ray.init(num_cpus=8, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)


if __name__ == "__main__":
    main()

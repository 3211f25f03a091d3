"""``memshare moe placement``: which rank holds what of a model, by arithmetic."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from memshare.cli.options import count, fraction, positive, whole
from memshare.config import ConfigError
from memshare.errors import UserError
from memshare.extras import require
from memshare.small_model.names import SPECIAL_NAME, resolve_model

if TYPE_CHECKING:
    from memshare.moe.placement.parallelism import Parallelism
    from memshare.moe.placement.proposal import Load, Machine
    from memshare.moe.placement.shape import ModelShape

_GIB = 1 << 30
_GB = 1e9
_KV_BYTES = {"auto": 2, "fp8": 1}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Says, from a model's config.json alone, which rank holds which KV heads, tokens and "
        "experts, the bytes of each, and what ranks send each other in a step. With --gpus and "
        "--gpu-memory it tries every division and proposes one. Loads no model; nothing is "
        "measured. Dense models are placed, too."
    )
    parser.add_argument("model", help="folder, config.json, or hub id")
    group = parser.add_argument_group("a division, with vLLM's names")
    group.add_argument("--tensor-parallel-size", "--tp", type=count, default=1, help="ranks")
    group.add_argument("--data-parallel-size", "--dp", type=count, default=1, help="replicas")
    group.add_argument(
        "--enable-expert-parallel", "--ep", action="store_true", help="whole experts on each rank"
    )
    group.add_argument(
        "--decode-context-parallel-size", "--dcp", type=count, default=1,
        help="ranks that divide the tokens of the same KV heads",
    )  # fmt: skip
    group.add_argument(
        "--kv-cache-dtype", choices=tuple(_KV_BYTES), default="auto", help="auto is 16 bits"
    )
    group = parser.add_argument_group("a machine to propose a division for")
    group.add_argument("--gpus", type=count, help="how many")
    group.add_argument("--gpu-memory", type=positive, metavar="GIB", help="of one")
    group.add_argument("--gpus-per-node", type=count, default=8, help="most ranks of a replica")
    group.add_argument(
        "--gpu-memory-utilization", type=fraction, default=0.9, help="fraction of the memory"
    )
    group.add_argument(
        "--reserve", type=whole, default=4, metavar="GIB",
        help="of a GPU, for activations and CUDA graphs",
    )  # fmt: skip
    group.add_argument(
        "--memory-bandwidth", type=positive, default=3350, metavar="GB/S",
        help="that a GPU reads from its memory",
    )  # fmt: skip
    group.add_argument(
        "--link-bandwidth", type=positive, default=450, metavar="GB/S",
        help="that a GPU sends to others of its node",
    )  # fmt: skip
    group.add_argument(
        "--network-bandwidth", type=positive, default=50, metavar="GB/S",
        help="that a GPU sends to other nodes",
    )  # fmt: skip
    parser.add_argument("--context", type=count, default=8192, help="tokens of a request")
    parser.add_argument(
        "--max-num-seqs", type=count, default=128, help="requests of each replica in a decode step"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Place, and print.

    Raises:
        UserError: the model or an option cannot be used, or the model cannot be divided so.
    """
    from memshare.moe.placement.model_config import read_shape
    from memshare.moe.placement.parallelism import Parallelism
    from memshare.moe.placement.proposal import Load, Machine

    load = Load(args.context, args.max_num_seqs, _KV_BYTES[args.kv_cache_dtype])
    parallelism = Parallelism(
        tensor_parallel_size=args.tensor_parallel_size,
        data_parallel_size=args.data_parallel_size,
        enable_expert_parallel=args.enable_expert_parallel,
        decode_context_parallel_size=args.decode_context_parallel_size,
    )
    try:
        shape = read_shape(_config_of(args.model))
    except ConfigError as error:
        raise UserError(str(error)) from None
    if args.gpus is None and args.gpu_memory is None:
        return _show(shape, parallelism, load, args.json)
    if args.gpus is None or args.gpu_memory is None:
        raise UserError("--gpus and --gpu-memory go together: give both")
    if parallelism != Parallelism():
        raise UserError("--gpus asks for a proposal: leave the options of a division out")
    machine = Machine(
        args.gpus, int(args.gpu_memory * _GIB), args.gpus_per_node, args.gpu_memory_utilization,
        args.reserve * _GIB, args.memory_bandwidth * _GB, args.link_bandwidth * _GB,
        args.network_bandwidth * _GB,
    )  # fmt: skip
    return _propose(shape, machine, load, args.json)


def _config_of(model: str) -> Path:
    """The configuration's file, or a folder that has it.

    Raises:
        UserError: it is not here, and the hub does not give it.
    """
    if SPECIAL_NAME.fullmatch(model):
        return Path(resolve_model(model))
    if Path(model).exists() or not _HUB_ID.fullmatch(model):
        return Path(model)
    require("huggingface_hub", f"{model}, a hub id,")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json"))
    except OSError as error:  # whatever the hub or the network says
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{model}: no such folder, and its config.json cannot be had from the hub: {reason}\n"
            "    fix: give a folder or a config.json"
        ) from None


def _show(shape: ModelShape, parallelism: Parallelism, load: Load, wants_json: bool) -> int:
    from memshare.moe.placement.ranks import place
    from memshare.moe.placement.report import as_object, placement_lines

    try:
        placement = place(shape, parallelism, load.kv_number_bytes)
    except ConfigError as error:
        raise UserError(f"the model cannot be divided so:\n{error}") from None
    if wants_json:
        print(json.dumps(as_object(placement, load.context, load.max_num_seqs), indent=2))
    else:
        print("\n".join(placement_lines(placement, load.context, load.max_num_seqs)))
    return 0


def _propose(shape: ModelShape, machine: Machine, load: Load, wants_json: bool) -> int:
    from memshare.moe.placement.proposal import least_weight_bytes, propose
    from memshare.moe.placement.ranks import place
    from memshare.moe.placement.report import (
        as_object,
        candidate_lines,
        candidate_object,
        gib,
        placement_lines,
    )

    candidates = propose(shape, machine, load)
    if not candidates:
        least = least_weight_bytes(shape, machine)
        raise UserError(
            f"{machine.gpus} x {gib(machine.gpu_bytes)}: too small for the weights and one request "
            f"of {load.context:,} tokens; divided as far as it can be, a rank's weights are "
            f"{gib(least)}\n    fix: more or larger GPUs, a shorter --context, or fewer bits"
        )
    placement = place(shape, candidates[0].parallelism, load.kv_number_bytes)
    if wants_json:
        found = as_object(placement, load.context, load.max_num_seqs)
        found["candidates"] = [candidate_object(candidate) for candidate in candidates]
        print(json.dumps(found, indent=2))
        return 0
    print("\n".join(candidate_lines(candidates, load)))
    print()
    print("\n".join(placement_lines(placement, load.context, load.max_num_seqs)))
    return 0

"""What runs in a pod: its rights, its variables, and what is in its image."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from cluster.tenancy.keys import parse_table
from memshare import __version__
from memshare.config import ENV_PREFIX, ConfigError, load_config
from tools.kubernetes import images
from tools.kubernetes.build import Found, Manifest, Manifests

# Set by pods, read by libraries that keep no list of their names.
PLAIN_VARIABLES = {
    "HOME", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "REDIS_PASSWORD", "PROXY_HEAD_TIMEOUT_S",
    "PROXY_BODY_TIMEOUT_S",
}  # fmt: skip


# Oldest versions of other projects' images without a known hole, and what the ones before have.
PATCHED = {"redis": ("7.4.11", "CVE-2026-23479 and CVE-2026-81934")}


def security(manifests: Manifests) -> Found:
    """Pods fit Kubernetes' restricted standard, and can't write to their image."""
    contexts = [
        (pod.where, pod.spec.get("securityContext", {}), container.get("securityContext", {}))
        for pod in manifests.pods
        for container in pod.containers
    ]
    autoscaler = manifests.cluster["autoscalerOptions"].get("securityContext", {})
    for where, of_pod, of_container in [*contexts, ("autoscaler", {}, autoscaler)]:
        context = {**of_pod, **of_container}
        wanted = {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        for name, value in wanted.items():
            if context.get(name) != value:
                yield where, f"securityContext.{name} is not {value}"
        if not context.get("runAsUser"):
            yield where, "runs as root, or as whoever the image says"
    for pod in manifests.pods:
        if any(pod.spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
            yield pod.where, "shares a namespace of its node"
        if pod.role != "head" and pod.spec.get("automountServiceAccountToken") is not False:
            yield pod.where, "has a token for the API server and needs none"
        for container in pod.containers:
            writable = {m["mountPath"] for m in container.get("volumeMounts", [])}
            if pod.ray_params is not None and not {"/tmp", _home(container)} <= writable:
                yield pod.where, "Ray can't write to /tmp and its home folder"
            yield from ((pod.where, message) for message in _holes(container["image"]))
    for secret in manifests.of("Secret"):
        for name, text in secret.get("data", {}).items():
            if not _is_key_table(b64decode(text).decode()):
                where = f"Secret/{secret['metadata']['name']}"
                yield where, f"{name} is no table of hashed keys, and secrets don't belong in files"
    if manifests.cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions", "Ray takes orders from whoever reaches its ports"


def environment(manifests: Manifests) -> Found:
    """Variables have names that somebody reads."""
    variables = [
        (pod.where, variable["name"])
        for pod in manifests.pods
        for container in pod.containers
        for variable in container.get("env", [])
    ]
    for args in manifests.arguments:
        variables += [("serveConfigV2", name) for name in args.replica.env]
    for where, name in variables:
        if not is_read(name):
            yield where, f"nobody reads the variable {name}"
    given = {
        variable["name"]: variable.get("value", "")
        for pod in manifests.ray_pods
        for variable in pod.spec["containers"][0].get("env", [])
        if variable["name"].startswith(ENV_PREFIX)
    }
    try:
        load_config(environ=given)
    except ConfigError as error:
        yield "environment", str(error)


def commands(manifests: Manifests) -> Found:
    """What is run, imported or loaded in a pod is in its image."""
    for pod in manifests.pods:
        for container in pod.containers:
            recipe = images.recipe_of(container["image"])
            if recipe is not None and "command" in container:
                yield from ((pod.where, text) for text in recipe.misses(container["command"]))
    for pod in manifests.ray_pods:
        container = pod.spec["containers"][0]
        recipe = images.recipe_of(container["image"])
        if recipe is None:
            yield pod.where, f"no recipe in k8s/images makes {container['image']}"
            continue
        if container["image"].rpartition(":")[2] != __version__:
            yield pod.where, f"{container['image']} is not version {__version__}"
        if container["securityContext"].get("runAsUser") != recipe.user:
            yield pod.where, f"the image is made for user {recipe.user}"
        if _home(container) != recipe.home:
            yield pod.where, f"the image's home folder is {recipe.home}"
        for hook in container.get("lifecycle", {}).values():
            yield from ((pod.where, message) for message in recipe.misses(hook["exec"]["command"]))
        for application in manifests.serve_config["applications"]:
            module = application["import_path"].partition(":")[0]
            if not recipe.has_module(module):
                yield "serveConfigV2", f"{module} is not in the image"
            model = application["args"]["model"]
            if model.startswith("/") and not recipe.has_path(model):
                yield "serveConfigV2", f"the model {model} is not in the image"
        for function in manifests.serve_config.get("grpc_options", {}).get(
            "grpc_servicer_functions", []
        ):
            module = function.rpartition(".")[0]
            if not recipe.has_module(module) and find_spec(module.partition(".")[0]) is None:
                yield "serveConfigV2", f"{module} is not in the image"


def _holes(image: str) -> Iterator[str]:
    """What is wrong with an image of another project's."""
    name, _, tag = image.rpartition("/")[2].partition(":")
    if images.recipe_of(image) is not None:
        return
    version = tag.partition("-")[0]
    if version.count(".") < 2:
        yield f"{image} can change under the same name"
    elif name in PATCHED:
        oldest, holes = PATCHED[name]
        if Version(version) < Version(oldest):
            yield f"{image} has {holes}: {oldest} is the first without"


def _is_key_table(text: str) -> bool:
    try:
        parse_table(text, "secret")
    except ConfigError:
        return False
    return True


def _home(container: Manifest) -> str:
    return str({v["name"]: v.get("value") for v in container.get("env", [])}.get("HOME"))


@cache
def is_read(name: str) -> bool:
    """Whether MemShare, vLLM, Ray or a known library reads a variable of this name."""
    if name in PLAIN_VARIABLES:
        return True
    if name.startswith(ENV_PREFIX):
        return True  # `environment` reads them with MemShare's own loader
    if name.startswith("VLLM_"):
        return name in _vllm_variables()
    return name.startswith("RAY_") and _ray_knows(name)


@cache
def _vllm_variables() -> frozenset[str]:
    # Read, not imported: `import vllm` takes many seconds.
    source = _package("vllm") / "envs.py"
    return frozenset(re.findall(r'"(VLLM_\w+)"\s*:', source.read_text(encoding="utf-8")))


@cache
def _ray_knows(name: str) -> bool:
    """Whether Ray's Python names the variable, or its C++ core has an option of that name."""
    folder = _package("ray")
    word = re.compile(rb"\b" + name.encode() + rb"\b")
    files = [*(folder / "_private").glob("*.py"), *(folder / "_common").rglob("*.py")]
    for file in [*files, folder / "serve" / "_private" / "constants.py"]:
        if word.search(file.read_bytes()):
            return True
    core = (folder / "core" / "src" / "ray" / "raylet" / "raylet").read_bytes()
    return name.encode() + b"\0" in core or name.removeprefix("RAY_").encode() + b"\0" in core


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent

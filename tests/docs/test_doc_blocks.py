"""Every code block of the documentation is run, or checked as far as that goes without a server.

Python that calls a server, and requests by curl, run in ``tests/cluster/serve/test_documented.py``;
options of vLLM's server are parsed by vLLM in
``tests/memshare/engine/commands/test_doc_commands.py``; configurations are validated in
``tests/docs/test_docs.py``. A command that nothing here knows fails the test: it needs a check, or
a reason in ``UNCHECKED``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from google.protobuf.json_format import Parse, ParseError

from cluster.config import parse_cluster_args
from cluster.grpc_ingress import SERVICE
from cluster.http.asgi import FREE_PATHS, INFERENCE_PATHS, OPEN_PATHS
from cluster.processes import drain
from memshare.cli.main import COMMANDS, build_parser, load
from memshare.proto import memshare_pb2
from tests.documents import PAGES, Block, blocks, chat_bodies, commands, inline_code, option
from tests.documents import ROOT as TOP
from tools.setup_env import CPU_TORCH_INDEX

# Programs that are not here, or would need what is not here: a cluster, a registry, a network.
UNCHECKED = {
    "git diff": "any command whose output is piped",
    "aiperf profile": "a tool of others, in an environment of its own",
    "guidellm run": "a tool of others, in an environment of its own",
    "helm install": "needs a cluster",
    "helm repo": "needs the network",
    "kubectl -n": "needs a cluster",
    "kubectl create": "needs a cluster",
}
# What a reader replaces, and files that exist on the reader's machine only.
PLACEHOLDER = re.compile(r"^[A-Z]+$|^/etc/|^\.\.\.$|^(record|first|second)\.json$")
TOOL_FLAG = re.compile(r"--[a-z][a-z-]+")


def memshare(words: list[str]) -> None:
    for word in words:
        if word.endswith((".yaml", ".json")) and not PLACEHOLDER.search(word):
            assert (TOP / word).is_file(), word
    if words[1] == "serve":  # vLLM parses its options, in the tests of engines
        assert not words[2].startswith("-"), "the model first"
        return
    build_parser(words[1:]).parse_args(words[1:])


def make(words: list[str]) -> None:
    makefile = (TOP / "Makefile").read_text(encoding="utf-8")
    for word in words[1:]:
        name, assigned, value = word.partition("=")
        if assigned:
            assert re.search(rf"^{name}\s+\?=", makefile, re.MULTILINE), f"no variable {name}"
            assert not value.endswith(".yaml") or (TOP / value).is_file(), value
            if name == "GPU_ARGS":
                flags_of_tool(TOP / "tools" / "gpu_acceptance.py", value)
        else:
            assert re.search(rf"^{word}:", makefile, re.MULTILINE), f"no target {word}"


def serve(words: list[str]) -> None:
    assert words[1] in ("run", "deploy"), words
    document = yaml.safe_load((TOP / words[2]).read_text(encoding="utf-8"))
    for application in document["applications"]:
        parse_cluster_args(application["args"], environ={})


def flags_of_tool(file: Path, words: str) -> None:
    source = file.read_text(encoding="utf-8")
    for flag in set(TOOL_FLAG.findall(words)) - {"--help"}:
        assert f'"{flag}"' in source, f"{file.name} has no {flag}"


def file_of_tool(module: str) -> Path:
    """What ``python -m`` runs."""
    path = TOP / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def python(words: list[str]) -> None:
    if words[1] == "-c":
        take_options(words)
    elif words[1] == "-m" and words[2].startswith("tools."):
        flags_of_tool(file_of_tool(words[2]), " ".join(words[3:]))
    elif words[1] == "-m":
        # vLLM's options are parsed by vLLM, in the tests of engines.
        assert words[2] in ("vllm.entrypoints.openai.api_server", drain.__name__), words
    else:
        flags_of_tool(TOP / words[1], " ".join(words[2:]))


def take_options(words: list[str]) -> None:
    """Run the program only so far that it has read its options."""
    program = words[2].replace("main(p.parse_args())", "p.parse_args()")
    assert program != words[2], "nothing of it may run"
    done = subprocess.run(
        [sys.executable, "-c", program, *words[3:]], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


def lm_eval(words: list[str]) -> None:
    """It runs in tests/cluster/serve/test_documented.py; here its task is looked at."""
    assert words[1] == "run"
    task = Path(option(words, "--include_path") or "") / f"{option(words, '--tasks')}.yaml"
    assert yaml.safe_load((TOP / task).read_text(encoding="utf-8"))["task"] == task.stem


def kubectl(words: list[str]) -> None:
    assert words[1:3] == ["apply", "-k"], words
    assert (TOP / words[3] / "kustomization.yaml").is_file(), words[3]


def helm(words: list[str]) -> None:
    file = option(words, "--values")
    assert words[1] == "upgrade"
    assert file is not None
    assert (TOP / file).is_file(), file


def kind(words: list[str]) -> None:
    """Which image is loaded: ``tests/k8s/test_page.py``."""
    assert words[1:3] in (["create", "cluster"], ["load", "docker-image"]), words


def docker(words: list[str]) -> None:
    file = option(words, "--file")
    assert words[1] == "build"
    assert file is not None
    assert (TOP / file).is_file(), file


def pip(words: list[str]) -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[1] == "install"
    if "--extra-index-url" in words:
        at = words.index("--extra-index-url")
        assert words[at + 1] == CPU_TORCH_INDEX
        words = words[:at] + words[at + 2 :]
    assert words[2:-1] in ([], ["--constraint", "constraints.txt"]), words
    if (TOP / words[-1] / "pyproject.toml").is_file():
        return
    extra = re.fullmatch(r"(?:\.|memshare)\[([\w,]+)\]", words[-1])
    assert extra is not None, words
    assert set(extra[1].split(",")) <= project["optional-dependencies"].keys()


def curl(words: list[str]) -> None:
    url = next(word for word in words if word.startswith("http"))
    path = re.sub(r"^http://127\.0\.0\.1:8000", "", url)
    known = OPEN_PATHS | FREE_PATHS | INFERENCE_PATHS | {"/metrics", "/collective_rpc"}
    assert path in known, path
    body = option(words, "-d", "--data")
    if body is not None:
        json.loads(body)


def grpcurl(words: list[str]) -> None:
    if words[-1] == "list":
        return
    service, _, method = words[-1].partition("/")
    assert service == SERVICE.full_name
    called = SERVICE.methods_by_name[method]
    message = getattr(memshare_pb2, called.input_type.name)()
    Parse(option(words, "-d") or "{}", message)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "memshare": memshare,
    "make": make,
    "serve": serve,
    "python": python,
    "kubectl": kubectl,
    "docker": docker,
    "helm": helm,
    "kind": kind,
    "pip": pip,
    "curl": curl,
    "grpcurl": grpcurl,
    "lm_eval": lm_eval,
}


def flags_of_command(name: str, rest: list[str]) -> set[str]:
    """Options of a subcommand of ``memshare``, and of the one below it that ``rest`` names."""
    parser = argparse.ArgumentParser()
    load(name).add_arguments(parser)
    flags = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and rest:
            flags |= set(action.choices[rest[0]]._option_string_actions)
    return flags


def unchecked(words: list[str]) -> bool:
    return " ".join(words[:2]) in UNCHECKED


def loads_vllm(block: Block) -> bool:
    """Whether a command of it is a program that loads vLLM before it reads its options."""
    return any(words[:2] == ["python", "-c"] and "vllm" in words[2] for words in commands(block))


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, marks=pytest.mark.complete if loads_vllm(block) else ())
        for block in blocks("sh")
    ],
    ids=lambda block: block.place,
)
def test_every_command_exists_and_takes_its_arguments(block: Block) -> None:
    for words in commands(block):
        if unchecked(words):
            continue
        assert words[0] in CHECKS, f"{words[0]}: write a check, or a reason into UNCHECKED"
        try:
            CHECKS[words[0]](words)
        except SystemExit as error:  # argparse
            pytest.fail(f"{' '.join(words)}: exit {error.code}")


def test_nothing_is_left_out_silently() -> None:
    languages = {block.language for block in blocks()}
    # `text` is output of programs. A block in a language of which nothing is known fails here.
    assert languages == {"sh", "yaml", "json", "python", "text"}
    all_commands = [words for block in blocks("sh") for words in commands(block)]
    used = {" ".join(words[:2]) for words in all_commands if unchecked(words)}
    assert used == set(UNCHECKED), "reasons for what no page has any more"
    left_out = sum(map(unchecked, all_commands))
    assert left_out <= 11, "so many commands of the documentation are checked by nobody"
    assert len(all_commands) >= 70
    assert {words[0] for words in all_commands if not unchecked(words)} == set(CHECKS)
    for block in blocks("sh"):
        assert list(commands(block)) or re.search(r"^\w+=", block.text), f"{block.place} is empty"


@pytest.mark.parametrize(
    "block", [b for b in blocks("python") if "lient" not in b.text], ids=lambda block: block.place
)
def test_python_that_needs_no_server_runs(block: Block) -> None:
    exec(compile(block.text, block.place, "exec"), {})


@pytest.mark.parametrize("block", list(blocks("python")), ids=lambda block: block.place)
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.place, "exec")


def test_commands_in_running_text_have_the_options_that_they_name() -> None:
    seen = 0
    for page, text in inline_code():
        words = text.split()
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        flags = set(TOOL_FLAG.findall(" ".join(words)))
        if len(words) > 1 and words[0] == "memshare" and words[1] in COMMANDS:
            # An abbreviated command, so that its options are looked at one by one.
            assert flags <= flags_of_command(words[1], words[2:3]), (page, text)
            seen += bool(flags)
        elif len(words) > 1 and words[0] == "python" and words[1].startswith("tools/"):
            assert (TOP / words[1]).is_file(), (page, text)
            flags_of_tool(TOP / words[1], " ".join(words[2:]))
            seen += 1
        elif words[:2] == ["python", "-m"] and re.match(r"tools\.(?!bench\.NAME)", words[2]):
            flags_of_tool(file_of_tool(words[2]), " ".join(words[3:]))
            seen += 1
        elif len(words) > 1 and words[0] == "make" and "VENV" not in text:
            make(words)
            seen += 1
    assert seen >= 20


@pytest.mark.parametrize(
    "wrong",
    [
        "memshare replay --traces FOLDER --modle MODEL",
        "memshare check configs/nowhere.yaml",
        "make tset",
        "make serve CONFIGURATION=configs/demo.yaml",
        "serve run configs/nowhere.yaml",
        "kubectl apply -k k8s/overlays/nowhere",
        "pip install '.[tpu]'",
        "curl http://127.0.0.1:8000/v1/chat",
        "grpcurl -d '{\"txt\": 1}' localhost:9000 memshare.v1.MemShare/Generate",
        "python -m tools.bench.soak --huors 8",
        "lm_eval run --include_path docs/recipes --tasks reasnoer",
        "python -c 'import argparse; argparse.ArgumentParser().parse_args()' --huors 8",
        "docker build --file k8s/images/tpu.Dockerfile .",
    ],
)
def test_the_checks_find_planted_mistakes(wrong: str) -> None:
    (words,) = commands(Block("page", 1, "sh", wrong))
    with pytest.raises((AssertionError, SystemExit, OSError, ParseError)):
        CHECKS[words[0]](words)


def test_requests_and_pages_are_found() -> None:
    assert len(chat_bodies()) >= 3
    assert len(PAGES) > 25

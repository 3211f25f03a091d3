"""The documentation says what the code does: names, links, examples, the generated page."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from cluster.config import parse_cluster_args
from cluster.tenancy.keys import parse_table
from memshare.config import ENV_PREFIX, load_config
from memshare.engine.versions import TESTED_VLLM
from memshare.plug_in import CONNECTOR_MODULE
from memshare.request_options import RequestOptions
from memshare.telemetry.event_log import EventKind
from memshare.telemetry.metrics import METRICS
from tests.documents import DOCS, PAGES, ROOT, Block, blocks
from tools.docs.configuration import PAGE, anchor, render
from tools.make_docs import PAGES as GENERATED

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
TRANSFER = re.compile(r"--kv-transfer-config '(.*?)'", re.DOTALL)
VARIABLE = re.compile(rf"\b({ENV_PREFIX}\w+)=(\S+)")
METRIC = re.compile(r"vllm:memshare_\w+|(?:ray_vllm_|ray_)memshare_\w+|\bmemshare_\w+_total\b")
FIRST_CELL = re.compile(r"^\| `([\w:]+)` \|", re.MULTILINE)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def section(page: str, heading: str) -> str:
    """Text below ``heading``, up to the next one of any level."""
    text = (DOCS / page).read_text(encoding="utf-8")
    _, found, rest = text.partition(f"# {heading}\n")
    assert found, f"{page} has no heading {heading!r}"
    return re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize("walk", ["A chat request", "A remap", "A metric"])
def test_a_walk_goes_through_files_that_exist_each_once(walk: str) -> None:
    text = section("structure.md", walk)
    files = re.findall(r"^\d+\. `([\w./]+)`:", text, re.MULTILINE)
    assert len(files) == len(re.findall(r"^\d+\.", text, re.MULTILINE)) > 8
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert len(set(files)) == len(files)
    named = set(re.findall(r"`(\w*[A-Z]\w*[a-z]\w*)(?:\.\w+)?`", text))  # classes
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("[mc]*/**/*.py"))
    assert [name for name in named if f"class {name}" not in sources] == []


def test_the_configuration_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python -m tools.docs.configuration"


@pytest.mark.parametrize("name", ["cli", "grpc"])
def test_the_generated_reference_is_up_to_date(name: str) -> None:
    page, render = GENERATED[name]
    assert page.read_text(encoding="utf-8") == render(), f"run: python -m tools.make_docs {name}"


def test_the_compatibility_page_names_the_versions_that_the_code_wants() -> None:
    page = (DOCS / "compatibility.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pinned = dict(d.split("==") for d in extras["engine"] + extras["serve"] if "==" in d)
    assert f"| vLLM | {', '.join(TESTED_VLLM)} |" in page
    assert f"| Ray | {pinned['ray[serve]']} |" in page
    assert f"| PyTorch | {pinned['torch']} |" in page


@pytest.mark.engine  # vLLM is loaded
def test_the_compatibility_page_names_every_option_that_is_refused() -> None:
    from memshare.engine.compatibility import engine_facts, plug_in_faults, setup_faults
    from memshare.engine.speculation import speculation_faults

    page = (DOCS / "compatibility.md").read_text(encoding="utf-8")
    told = (plug_in_faults, setup_faults, engine_facts, speculation_faults)
    code = "".join(map(inspect.getsource, told))
    options = set(re.findall(r"(?:parallel|model|vllm_config|cache_config)\.(\w+)", code))
    options |= set(re.findall(r'"(\w+_context_parallel_size)"', code))
    # Not options: sections, and the model's own properties, which the page has in words.
    options -= {"kv_transfer_config", "parallel_config", "model_config", "cache_config", "model"}
    options -= {"is_encoder_decoder", "runner_type"}
    # Not refused: what the policy `auto` looks at.
    options -= {"get_num_layers", "get_num_kv_heads", "get_head_size"}
    options -= {"tensor_parallel_size", "hf_overrides", "lora_config"}
    options = {"kv_cache_dtype" if option == "cache_dtype" else option for option in options}
    assert len(options) >= 6
    assert {option for option in options if f"`{option}" not in page} == set()
    types = re.search(r"cache_type not in \((.*?)\)", code)
    assert types is not None
    for cache_type in re.findall(r'"(\w+)"', types[1]):
        assert f"`{cache_type}`" in page


def test_every_metric_that_a_page_names_exists() -> None:
    exist = {spelling for metric in METRICS for spelling in (metric.prometheus, metric.ray)}
    named = set()
    for file in PAGES:
        text = file.read_text(encoding="utf-8")
        here = set(
            re.findall(r"(?:vllm:|ray_vllm_|ray_|\b)memshare_\w+_total|vllm:memshare_\w+", text)
        )
        assert here <= exist, file.name
        named |= here
    assert len(named) > 10


def test_every_event_is_documented() -> None:
    log = section("metrics.md", "The event log")
    assert set(FIRST_CELL.findall(log)) == set(get_args(EventKind))


def test_the_readme_lists_every_request_option() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(RequestOptions.model_fields) <= set(FIRST_CELL.findall(readme))


# Messages of pip, torch, Hugging Face's libraries and Ray: nothing here could tell if they change.
OTHERS = {
    "No matching distribution found for torch==2.13.0+cpu",
    "operator torchvision::nms does not exist",
    "Task exception was never retrieved",
}


def test_every_message_that_troubleshooting_explains_is_one_of_ours() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    messages = {text for cell in cells for text in re.findall(r"`([^`]+)`", cell)}
    messages = {text for text in messages if text.count(" ") >= 2}
    assert messages >= OTHERS
    assert len(messages - OTHERS) >= 8
    folders = ("memshare", "cluster", "tools")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    assert {text for text in messages - OTHERS if text not in source} == set()


def test_a_page_that_is_written_by_hand_is_short() -> None:
    """About 200 lines: nobody reads a long one to its end. Records go to ``docs/experiments``."""
    generated = {page for page, _ in GENERATED.values()}
    long = {page for page in PAGES if len(page.read_text(encoding="utf-8").splitlines()) > 210}
    assert long <= generated


def anchors(page: Path) -> set[str]:
    return {anchor(heading) for heading in HEADING.findall(prose(page))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    links = LINK.findall(prose(page))
    for link in links:
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not fragment or fragment in anchors(target), link


def check_transfer_config(value: dict[str, Any]) -> None:
    assert value.pop("kv_connector") == "MemShareConnector"
    assert value.pop("kv_connector_module_path", CONNECTOR_MODULE) == CONNECTOR_MODULE
    assert value.pop("kv_role") == "kv_producer"
    load_config(value.pop("kv_connector_extra_config", None), environ={})
    assert not value, "unknown keys"


@pytest.mark.parametrize("example", list(blocks("yaml", "json")), ids=lambda e: e.place)
def test_every_configuration_example_is_valid(
    example: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    value = yaml.safe_load(example.text)  # JSON is YAML
    if example.language == "json":
        value = json.loads(example.text)
    if "applications" in value:
        for application in value["applications"]:
            assert application["import_path"] == "cluster.app:build"
            parse_cluster_args(application["args"], environ={})
    elif "kv_connector" in value:
        check_transfer_config(value)
    elif "tenants" in value:
        parse_table(example.text, example.place)
    else:
        load_config(value, environ={})


@pytest.mark.parametrize("example", list(blocks("sh")), ids=lambda e: e.place)
def test_every_configuration_on_a_command_line_is_valid(
    example: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for value in TRANSFER.findall(example.text):
        check_transfer_config(json.loads(value))
    load_config(environ=dict(VARIABLE.findall(example.text)))


def test_the_three_ways_to_write_a_configuration_mean_the_same() -> None:
    page = PAGE.read_text(encoding="utf-8")
    written: dict[str, str] = dict(reversed(FENCE.findall(page)))  # the first of each language
    from_file = load_config(yaml.safe_load(written["yaml"]), environ={})
    from_environment = load_config(environ=dict(VARIABLE.findall(written["sh"])))
    explicit = json.loads(written["json"])["kv_connector_extra_config"]
    assert from_file == from_environment == load_config(explicit, environ={})
    assert from_file != load_config(environ={}), "the example changes something"


def test_the_checks_see_the_blocks() -> None:
    """Negative control of the patterns above."""
    assert len(list(blocks("yaml", "json"))) >= 4
    shell = "".join(example.text for example in blocks("sh"))
    assert len(TRANSFER.findall(shell)) >= 2
    assert len(VARIABLE.findall(shell)) >= 8

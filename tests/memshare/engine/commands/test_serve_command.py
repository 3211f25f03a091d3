"""``memshare serve``: vLLM's own server with MemShare in it, and the connector's name in vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from memshare.cli import serve
from memshare.errors import UserError
from memshare.plug_in import CONNECTOR, CONNECTOR_MODULE, ROLE, WORKER_CLASS
from memshare.small_model.names import SMOLLM2
from tests.machine import DTYPE
from tests.memshare.agents.tiny import write_adapter
from tests.memshare.engine.harness import write_tiny_model
from tests.memshare.engine.server import ROOT, serving
from tools.bench.local_cluster import free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NAMED = f'{{"kv_connector": "{CONNECTOR}", "kv_role": "{ROLE}"}}'


@pytest.fixture(autouse=True)
def no_other_source(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("MEMSHARE_"):
            monkeypatch.delenv(name)


def fields(*words: str) -> dict[str, Any]:
    """MemShare's configuration that ``memshare serve`` makes of these words."""
    options = serve.parse(["some/model", *words])
    transfer = options.kv_transfer_config
    assert (transfer.kv_connector, transfer.kv_role) == (CONNECTOR, ROLE)
    assert transfer.kv_connector_module_path == CONNECTOR_MODULE
    assert options.worker_cls == WORKER_CLASS
    found: dict[str, Any] = transfer.kv_connector_extra_config
    return found


def test_options_are_vllms_own_wherever_the_model_stands() -> None:
    options = serve.parse(["--max-num-seqs", "3", "some/model", "--dtype=bfloat16", "-tp", "2"])
    assert (options.model, options.model_tag) == ("some/model", "some/model")
    assert (options.max_num_seqs, options.dtype) == (3, "bfloat16")
    assert options.tensor_parallel_size == 2
    assert options.served_model_name is None


def test_fields_of_a_file_of_json_and_one_by_one(tmp_path: Path) -> None:
    assert fields()["mode"] == "share"
    file = tmp_path / "mine.yaml"
    file.write_text("mode: observe\nbudget: {max_shared_fraction: 0.5}\n")
    found = fields(
        "--memshare", str(file), "--memshare", '{"policy": {"name": "random", "seed": 3}}',
        "--memshare.budget.max_shared_fraction", "0.1", "--memshare.policy.seed=7",
    )  # fmt: skip
    assert found["mode"] == "observe"
    assert found["budget"]["max_shared_fraction"] == 0.1, "what is said last wins"
    assert found["policy"] == {"name": "random", "seed": 7}
    assert fields("--memshare.mode", "off")["mode"] == "off"


def test_the_environment_is_heard_and_what_is_said_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSHARE_MODE", "observe")
    assert fields()["mode"] == "observe"
    assert fields("--memshare.mode=share")["mode"] == "share"


def test_vllms_configuration_file_may_hold_ours(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("model: some/other\nmax-num-seqs: 5\nmemshare: {mode: observe}\n")
    options = serve.parse(["--config", str(file)])
    assert (options.model, options.max_num_seqs) == ("some/other", 5)
    assert options.kv_transfer_config.kv_connector_extra_config["mode"] == "observe"


def test_a_kv_transfer_config_of_the_users_own_is_kept() -> None:
    own = json.loads(NAMED) | {"engine_id": "mine", "kv_connector_extra_config": {"mode": "off"}}
    options = serve.parse(
        ["m", "--kv-transfer-config", json.dumps(own), "--memshare.scope=request"]
    )
    assert options.kv_transfer_config.engine_id == "mine"
    assert options.kv_transfer_config.kv_connector_extra_config["mode"] == "off"
    assert (
        fields("--kv-transfer-config", json.dumps(own), "--memshare.mode=share")["mode"] == "share"
    )


@pytest.mark.parametrize(
    ("words", "other", "fields"),
    [
        (["--kv-offloading-size", "2"], "OffloadingConnector", {"cpu_bytes_to_use": 2 << 30}),
        (
            ["--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}'],
            "NixlConnector",
            {},
        ),
    ],
)
def test_another_connector_stands_beside_ours(
    words: list[str], other: str, fields: dict[str, Any]
) -> None:
    options = serve.parse(["some/model", *words, "--memshare.mode", "observe"])
    transfer = options.kv_transfer_config
    assert transfer.kv_connector == "MultiConnector"
    ours, theirs = transfer.kv_connector_extra_config["connectors"]
    assert ours["kv_connector"] == CONNECTOR
    assert ours["kv_connector_extra_config"]["mode"] == "observe"
    assert theirs["kv_connector"] == other
    assert theirs.get("kv_connector_extra_config", {}) == fields
    assert options.kv_offloading_size is None, "vLLM would put its connector in ours' place"
    assert options.async_scheduling is False


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--kv-transfer-config", '{"kv_connector": "MultiConnector", "kv_role": "kv_both"}'],
            "name the connector that is to stand beside it",
        ),
        (["--kv-offloading-size", "1", "--kv-offloading-backend", "lmcache"], "set it to 'native'"),
        (
            ["--kv-transfer-config", NAMED.replace(ROLE, "kv_both")],
            "set kv_role to 'kv_producer'",
        ),
        (["--worker-cls", "a.B"], "--worker-cls is 'a.B'"),
        (["--memshare.mode", "shar"], "mode = 'shar'"),
        (["--memshare.budgets.max_shared_fraction", "1"], "did you mean 'budget'?"),
        (["--memshare", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fix(words: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        serve.parse(["some/model", *words])
    assert told in str(caught.value)
    assert "fix: " in str(caught.value)


@pytest.mark.parametrize("words", [["--memshare", "{mode}"], ["--no-such-option"]])
def test_a_wrong_command_line_ends_with_status_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        serve.parse(["some/model", *words])
    assert stop.value.code == 2
    assert ": error:" in capsys.readouterr().err


def test_a_model_that_we_have_a_name_for_is_served_under_it() -> None:
    options = serve.parse([SMOLLM2.name])
    assert Path(options.model).is_dir()
    assert options.served_model_name == [SMOLLM2.name]
    assert serve.parse([SMOLLM2.name, "--served-model-name", "x"]).served_model_name == ["x"]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the metadata that an installation of this tree has, to go first on a path."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tmp_path / "installed" / "memshare-0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: memshare\nVersion: 0\n")
    lines = [
        line
        for group, names in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in names.items()))
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder.parent


def test_vllm_knows_the_connector_by_name(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import plugins
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from memshare.engine.connector import MemShareConnector

    others = {n: c for n, c in KVConnectorFactory._registry.items() if n != CONNECTOR}
    monkeypatch.setattr(KVConnectorFactory, "_registry", others)
    monkeypatch.syspath_prepend(str(installed))
    for _ in range(2):  # vLLM warns that plug-ins may be loaded several times
        monkeypatch.setattr(plugins, "plugins_loaded", False)
        plugins.load_general_plugins()
    found = KVConnectorFactory.get_connector_class_by_name(CONNECTOR)
    assert found is MemShareConnector


@pytest.mark.complete
def test_registering_loads_nothing_of_ours() -> None:
    """Every vLLM process of a machine with MemShare on it calls this, MemShare or not."""
    code = (
        "import sys, vllm.engine.arg_utils; before = set(sys.modules)\n"
        "from memshare.plug_in import register_connector; register_connector()\n"
        "ours = {m for m in sys.modules if m.startswith('memshare')}\n"
        "sys.exit(f'{ours}' if ours != {'memshare', 'memshare.plug_in'} else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=["memshare", pytest.param("by name", marks=pytest.mark.complete)])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, installed: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server started by our command, and one by vLLM's with the connector named alone."""
    port = free_port()
    options = [
        "--served-model-name=tiny", f"--port={port}", f"--dtype={DTYPE}", "--block-size=32",
        "--max-model-len=320", "--num-gpu-blocks-override=12", "--enforce-eager",
        "--load-format=dummy",
    ]  # fmt: skip
    model = str(write_tiny_model(tmp_path / "tiny"))
    if request.param == "memshare":
        command = ["memshare.cli.main", "serve", model, "--memshare.policy.name=oldest", *options]
    else:
        extra = '"kv_connector_extra_config": {"policy": {"name": "oldest"}}'
        command = [
            "vllm.entrypoints.openai.api_server", "--model", model, *options,
            "--kv-transfer-config", NAMED.replace("}", f", {extra}}}"),
            "--worker-cls", WORKER_CLASS,
        ]  # fmt: skip
    with serving(command, port, tmp_path, f"{installed}:{ROOT}") as served:
        yield served


def test_the_server_reclaims(server: tuple[str, subprocess.Popen[bytes]]) -> None:
    url, process = server
    body = {
        "model": "tiny", "prompt": ["a b c"] * 3, "max_tokens": 300, "temperature": 0,
        "ignore_eos": True, "vllm_xargs": {"memshare_max_shared_fraction": 0.2},
    }  # fmt: skip
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 900
    metrics = httpx.get(f"{url}/metrics", timeout=60).text
    (line,) = (
        x for x in metrics.splitlines() if x.startswith("vllm:memshare_blocks_reclaimed_total{")
    )
    assert float(line.rpartition(" ")[2]) > 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def test_adapters_of_the_configuration_are_models_of_the_server(tmp_path: Path) -> None:
    plan = write_adapter(tmp_path / "plan", seed=1, rank=12)
    act = write_adapter(tmp_path / "act", seed=2)
    file = tmp_path / "agents.yaml"
    file.write_text(
        f"mode: off\nagents: {{scheme: stacked, adapters: {{plan: {plan}, act: {act}}}}}\n"
    )
    words = ["some/model", "--memshare", str(file)]
    options = serve.parse(words)
    assert (options.enable_lora, options.max_loras, options.max_lora_rank) == (True, 3, 16)
    served = {module.name: module.path for module in options.lora_modules}
    assert served == {"plan": str(plan), "act": str(act)}
    options = serve.parse([*words, "--max-loras", "8", "--lora-modules", f"plan={plan}"])
    assert options.max_loras == 8
    assert [module.name for module in options.lora_modules] == ["plan", "act"]
    (act / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"agents.adapters.act = .* has no adapter_config.json"):
        serve.parse(words)
    assert not serve.parse(["some/model"]).enable_lora

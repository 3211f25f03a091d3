"""vLLM's own parser takes the options with which pages start its server. No engine starts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memshare.engine.beside.children import own_transfer
from tests.documents import ROOT, Block, blocks, commands

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SERVERS = [
    Block(block.page, block.line, "sh", "\0".join(words[3:]))
    for block in blocks("sh")
    for words in commands(block)
    if words[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"] and words[3] != "..."
]


COMMANDS = [
    Block(block.page, block.line, "sh", "\0".join(words[2:]))
    for block in blocks("sh")
    for words in commands(block)
    if words[:2] == ["memshare", "serve"]
]


@pytest.fixture
def newest_policy() -> Iterator[None]:
    """As if the example of a policy were installed."""
    from memshare.config import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs/examples/newest_policy")
        patch.setitem(registry.BUILT_IN, "newest", "newest_policy:Newest")
        registry.forget_packages()
        yield
    registry.forget_packages()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda block: block.place)
@pytest.mark.usefixtures("newest_policy")
def test_our_own_command_takes_them(command: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    from memshare.cli.serve import parse

    monkeypatch.chdir(ROOT)
    options = parse(command.text.split("\0"))
    ours = own_transfer(options.kv_transfer_config)
    assert ours is not None
    assert ours.kv_connector == "MemShareConnector"


@pytest.mark.parametrize("server", SERVERS, ids=lambda block: block.place)
def test_vllm_takes_the_options(server: Block) -> None:
    from cluster.engine.options import parse_words
    from memshare.config import ConfigError

    options = parse_words(server.text.split("\0"))
    assert options.kv_transfer_config.kv_connector == "MemShareConnector"
    assert options.worker_cls == "memshare.engine.worker.MemShareWorker"
    with pytest.raises(ConfigError):
        parse_words([*server.text.split("\0"), "--no-such-option"])


def test_they_are_found() -> None:
    assert len(SERVERS) >= 2
    assert len(COMMANDS) >= 5

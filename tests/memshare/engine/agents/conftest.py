"""What all tests of adapters in engines work with."""

from __future__ import annotations

import pytest

from tests.memshare.engine.agents.served import Roles, write_roles


@pytest.fixture(scope="session")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    """A base model, and adapters of it."""
    return write_roles(tmp_path_factory.mktemp("roles"))

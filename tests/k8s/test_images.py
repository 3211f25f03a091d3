"""Recipes of the images: linted, pinned, unprivileged, and complete. No image is built here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import memshare
from tools.kubernetes.images import ImageRecipe, recipe_of, recipes
from tools.kubernetes.layout import ROOT

HADOLINT = Path(sys.executable).parent / "hadolint"


@pytest.mark.parametrize("recipe", recipes().values(), ids=recipes())
class TestRecipes:
    def test_hadolint_has_nothing_to_say(self, recipe: ImageRecipe) -> None:
        done = subprocess.run([HADOLINT, recipe.path], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")

    def test_bases_are_pinned(self, recipe: ImageRecipe) -> None:
        for base in recipe.bases:
            version = base.partition(":")[2]
            assert version.count(".") >= 2, f"{base} can change under the same name"

    def test_runs_unprivileged_with_a_health_check(self, recipe: ImageRecipe) -> None:
        assert recipe.user >= 1000
        assert "/-/healthz" in recipe.final("HEALTHCHECK")[0]

    def test_everything_that_is_copied_exists_and_reaches_the_build(
        self, recipe: ImageRecipe
    ) -> None:
        ignored = (recipe.path.parent / f"{recipe.path.name}.dockerignore").read_text()
        for source in recipe.copied:
            assert (ROOT / source).exists(), source
            assert f"!{source.split('/')[0]}" in ignored, source

    def test_what_it_starts_is_in_it(self, recipe: ImageRecipe) -> None:
        command = json.loads(recipe.final("CMD")[0])
        assert list(recipe.misses(command)) == []
        assert list(recipe.misses(["serve", "run", "/opt/memshare/configs/none.yaml"])) != []
        assert list(recipe.misses(["curl"])) != []

    def test_packages_are_constrained(self, recipe: ImageRecipe) -> None:
        installs = [
            i.value for i in recipe.instructions if i.name == "RUN" and "pip install" in i.value
        ]
        for install in installs:
            assert "--constraint constraints.txt" in install or "--no-deps" in install, install


def test_kuberay_finds_openssl_in_every_image() -> None:
    """With ``tlsOptions`` it waits for a pod's certificate with that program."""
    for recipe in recipes().values():
        assert recipe.installs("openssl")
        assert not recipe.installs("openss")


def test_names_of_images() -> None:
    assert recipe_of("ghcr.io/example/memshare-cpu:0.1.0") is recipes()["memshare-cpu"]
    assert recipe_of("localhost:5000/memshare-gpu@sha256:0") is recipes()["memshare-gpu"]
    assert recipe_of("redis:7") is None


def test_the_demo_image_carries_its_model_and_every_config() -> None:
    cpu = recipes()["memshare-cpu"]
    assert cpu.has_path("/opt/memshare/models/smollm2-135m")
    for config in (ROOT / "configs").glob("*.yaml"):
        assert cpu.has_path(f"/opt/memshare/configs/{config.name}")
    assert cpu.has_module("cluster.app")
    assert not cpu.has_module("cluster.nothing")
    assert not cpu.has_module("tests.conftest"), "tests are not in it"


def test_manifests_name_the_version_of_the_package() -> None:
    text = (ROOT / "k8s" / "base" / "kustomization.yaml").read_text(encoding="utf-8")
    assert f'newTag: "{memshare.__version__}"' in text

"""The guest image's builder: its recipe, Apple's init image, and the Buildroot tree's agreement with the recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from images.common import oci
from images.common.tools import BuildError
from images.common.wheels import normalized, pins

CHECKOUT = Path(__file__).parents[2]
sys.path.insert(0, str(CHECKOUT / "images/guest-initfs"))

from guest_image import apple, buildroot, recipe  # noqa: E402 - the folder is on the path only now


def test_every_wheel_of_the_recipe_is_pinned() -> None:
    found = recipe.read_recipe()
    assert {normalized(name) for name in found.wheels} <= set(pins(recipe.LOCK))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name = "guest-initfs"', ""), "name must be there, of type str"),
        (('name = "guest-initfs"', "name = 3"), "name must be there, of type str"),
        (("lazy = [", "lazy = [3,"), "lazy must be a list of strings"),
        (("[buildroot]", "[buildroot]\nsurplus = 1"), "nothing is called surplus"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = (recipe.FOLDER / "image.toml").read_text()
    assert change[0] in text
    (tmp_path / "image.toml").write_text(text.replace(*change))
    with pytest.raises(BuildError, match=message):
        recipe.read_recipe(tmp_path / "image.toml")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tree = tmp_path / "root"
    (tree / "usr/sbin").mkdir(parents=True)
    (tree / "etc/taploom").mkdir(parents=True)
    (tree / "sbin").symlink_to("usr/sbin")
    (tree / "usr/sbin/taploom-init").write_text("our init")
    (tree / "etc/taploom/init.conf").write_text("control = vsock:any:5555\n")
    return tree


def vminit(tmp_path: Path, architecture: str, files: dict[str, str]) -> Path:
    tree = tmp_path / "vminit-tree"
    (tree / "sbin").mkdir(parents=True)
    for name, text in files.items():
        (tree / "sbin" / name).write_text(text)
    oci.write_layout([oci.Image(architecture, [tree])], tmp_path / "vminit")
    return tmp_path / "vminit"


def test_apples_init_image_has_our_init_in_front_of_apples(root: Path, tmp_path: Path) -> None:
    layout = vminit(
        tmp_path, "arm64", {"vminitd": "apple's init", "vmexec": "apple's exec", "taploom-init": "not ours"}
    )
    (tmp_path / "work").mkdir()
    apple.write_init_image(root, "arm64", tmp_path / "work", tmp_path / "oci", vminit=layout, version="1.0")
    [config] = oci.check_layout(tmp_path / "oci")
    assert (config["architecture"], config["variant"]) == ("arm64", "v8")
    tree = tmp_path / "work/tree"
    assert (tree / "sbin/vminitd").read_text() == "our init"
    assert (tree / "sbin/vminitd.real").read_text() == "apple's init"
    assert (tree / "sbin/vmexec").read_text() == "apple's exec"
    assert (tree / "sbin/taploom-init").read_text() == "our init"
    assert "exec = /sbin/vminitd.real" in (tree / "etc/taploom/init.conf").read_text()
    assert not (root / "sbin/vminitd").exists()
    top = json.loads((tmp_path / "oci/index.json").read_text())["manifests"]
    assert top[0]["annotations"]["org.opencontainers.image.ref.name"] == "taploom-guest-init:1.0"


def test_a_layout_without_apples_init_is_refused(root: Path, tmp_path: Path) -> None:
    layout = vminit(tmp_path, "amd64", {"vminitd": "for another architecture"})
    (tmp_path / "work").mkdir()
    with pytest.raises(BuildError, match="has no /sbin/vminitd for arm64"):
        apple.write_init_image(root, "arm64", tmp_path / "work", tmp_path / "oci", vminit=layout, version="1.0")


def test_the_buildroot_package_selects_every_wheel_of_the_recipe() -> None:
    package = (buildroot.EXTERNAL / "package/taploom-guest/Config.in").read_text()
    betterproto2 = (buildroot.EXTERNAL / "package/python-betterproto2/Config.in").read_text()
    for name in recipe.read_recipe().wheels:
        symbol = f"select BR2_PACKAGE_PYTHON_{name.removeprefix('python-').upper().replace('-', '_')} #"
        assert symbol in package or symbol in betterproto2


def test_a_directory_that_is_no_buildroot_tree_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="is no Buildroot tree"):
        buildroot.check(recipe.read_recipe(), tmp_path, lambda _: None)
    (tmp_path / "Makefile").write_text("export BR2_VERSION := 2024.02\n")
    with pytest.raises(BuildError, match=r"is Buildroot 2024\.02; the defconfigs are for 2026\.08"):
        buildroot.check(recipe.read_recipe(), tmp_path, lambda _: None)

"""What is installed: every package of the tree, under `specdec` alone, and the promised names."""

import importlib.util
import tomllib
from importlib import metadata, resources
from pathlib import Path

import specdec

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]

PUBLIC = {
    "Engine",
    "Proposer",
    "RequestOutput",
    "RunStats",
    "SamplingParams",
    "SpecModel",
    "StepRecord",
    "TokenTree",
    "__version__",
    "acceptance",
    "errors",
    "kernels",
    "wrap",
}


def packages_in_tree() -> set[str]:
    found = set()
    for package, folder in SETUPTOOLS["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    return found


def test_every_package_of_the_tree_is_listed() -> None:
    assert packages_in_tree() == set(SETUPTOOLS["packages"])


def test_no_package_is_listed_twice() -> None:
    assert len(SETUPTOOLS["packages"]) == len(set(SETUPTOOLS["packages"]))


def test_every_source_folder_is_a_package() -> None:
    folders = {
        path.parent
        for folder in SETUPTOOLS["package-dir"].values()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()


def test_only_specdec_is_installed_at_top_level() -> None:
    assert {package.split(".")[0] for package in SETUPTOOLS["packages"]} == {"specdec"}
    top_level = metadata.distribution("specdec").read_text("top_level.txt")
    assert top_level is not None
    assert top_level.split() == ["specdec"]


def test_top_level_kernels_is_not_ours() -> None:
    found = importlib.util.find_spec("kernels")
    assert found is None or ROOT not in Path(found.origin or ROOT).parents


def test_package_says_it_is_typed() -> None:
    assert (resources.files("specdec") / "py.typed").is_file()


def test_public_names_are_the_promised_ones() -> None:
    assert set(specdec.__all__) == PUBLIC
    assert len(specdec.__all__) == len(PUBLIC)


def test_public_names_equal_what_is_importable() -> None:
    for name in specdec.__all__:
        assert getattr(specdec, name) is not None
    ours = {
        name
        for name, value in vars(specdec).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("specdec")
    }
    assert ours <= set(specdec.__all__)


def test_version_is_the_one_installed() -> None:
    assert specdec.__version__ == PROJECT["project"]["version"] == metadata.version("specdec")

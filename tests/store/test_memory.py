"""How much memory is left, where a control group bounds it."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from store.memory import available_bytes

GB = 1 << 30


def machine(root: Path, groups: str, files: Mapping[str, object]) -> Path:
    """A /proc of a machine with 8 GB left, and `files` in /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {8 * GB >> 10} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return root


def test_the_memory_of_this_machine_is_found() -> None:
    assert 0 < available_bytes() < 1 << 50


@pytest.mark.parametrize("limit", ["max", 100 * GB])
def test_without_a_limit_it_is_what_the_machine_has_left(tmp_path: Path, limit: int | str) -> None:
    files = {"memory.max": limit, "memory.current": GB, "memory.stat": "inactive_file 0"}
    assert available_bytes(machine(tmp_path, "0::/\n", files)) == 8 * GB


def test_the_tightest_group_counts_and_what_it_has_cached_is_free(tmp_path: Path) -> None:
    outer = {"a/memory.max": 3 * GB, "a/memory.current": 2 * GB, "a/memory.stat": f"inactive_file {GB}"}
    inner = {"a/b/memory.max": 4 * GB, "a/b/memory.current": GB, "a/b/memory.stat": "inactive_file 0"}
    assert available_bytes(machine(tmp_path, "0::/a/b\n", outer | inner)) == 2 * GB


@pytest.mark.parametrize(
    ("limit", "left"), [(2 * GB, 3 * GB // 2), (0x7FFFFFFFFFFFF000, 8 * GB), (GB // 4, 0)],
    ids=["some", "none", "lowered below what is used"],
)  # fmt: skip
def test_version_1_is_read_also_in_a_container_that_sees_only_the_top(tmp_path: Path, limit: int, left: int) -> None:
    stat = f"inactive_file 5\ntotal_inactive_file {GB}"
    files = {"limit_in_bytes": limit, "usage_in_bytes": 3 * GB // 2, "stat": stat}
    groups = "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/\n"
    found = machine(tmp_path, groups, {f"memory/memory.{name}": content for name, content in files.items()})
    assert available_bytes(found) == left

"""How much memory this process may take, and how much it has taken."""

import os
import resource
from pathlib import Path

LIMITS = (  # of a container, where it has one
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
LIMITS_OF_PROCESS = (resource.RLIMIT_AS, resource.RLIMIT_DATA)


def memory_bytes() -> int:
    """The memory of this machine, or what a container or a limit leaves of it."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    found += [int(text) for path in LIMITS if (text := _text(path)).isdecimal()]
    of_process = (resource.getrlimit(kind)[0] for kind in LIMITS_OF_PROCESS)
    found += [limit for limit in of_process if limit != resource.RLIM_INFINITY]
    return min(found)


def taken_bytes() -> int:
    """The memory that this process has now."""
    pages = int(_text(Path("/proc/self/statm")).split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def anonymous_bytes() -> int:
    """The part of it that no file stands behind; all of it where the system does not say."""
    lines = _text(Path("/proc/self/status")).splitlines()
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 if found else taken_bytes()


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

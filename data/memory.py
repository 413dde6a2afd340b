"""How much memory this machine, its container or its batch system allows."""

import contextlib
import os
from pathlib import Path, PurePosixPath

LIMITS = {"": "memory.max", "memory": "memory.limit_in_bytes"}  # files of control groups, versions 2 and 1


def memory(root: Path = Path("/")) -> float:
    """Return the bytes of memory that this process may take, the least of all limits; infinite if unknown."""
    sizes = [float("inf"), *control_group_limits(root)]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(ImportError):
        import resource

        limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
        sizes += [limit for limit in limits if limit != resource.RLIM_INFINITY]
    return min(sizes)


def control_group_limits(root: Path) -> list[int]:
    """Return the limits of this process's control group and of those above it, of Linux below `root`."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()  # NUMBER:CONTROLLERS:/PATH
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in LIMITS.keys() & set(controllers.split(",")):
            group = PurePosixPath(path.lstrip("/"))
            for folder in (group, *group.parents):  # a container may see its own group as the root
                file = root / "sys/fs/cgroup" / controller / folder / LIMITS[controller]
                with contextlib.suppress(OSError, ValueError):  # "max" if there is no limit
                    found.append(int(file.read_text(encoding="utf-8")))
    return found

"""Folders that a user names: `~` is expanded, and URLs are refused; names in files of others beside them."""

import re
from pathlib import Path
from typing import Any

LONGEST = 255  # bytes of a name on common file systems
MOUNTS = {"gs": "gcsfuse BUCKET /mnt/BUCKET", "s3": "mount-s3 BUCKET /mnt/BUCKET"}


def local(path: Path | str, name: str) -> Path:
    """Path on a file system, with `~` expanded.

    Raises ValueError, naming the argument, for the URL of a bucket, and for `~NAME` if there is no such user.
    """
    url = re.match(r"([a-z][a-z0-9+.-]+):/+(.*)", str(path))  # Path has made one slash of two
    if url is None:
        try:
            return Path(path).expanduser()
        except RuntimeError:
            user = Path(path).parts[0]
            raise ValueError(
                f"{name}={path}: {user} is no user's home folder; a folder of that name is ./{user}"
            ) from None
    scheme, inside = url.groups()
    bucket, _, rest = inside.partition("/")
    mount = MOUNTS.get(scheme)
    how = "" if mount is None else f", e.g. with {mount.replace('BUCKET', bucket or 'BUCKET')}"
    raise ValueError(
        f"{name}={scheme}://{inside} must be a folder of a file system: mount it{how}, and name "
        f"{name}=/mnt/{bucket or 'BUCKET'}/{rest}"
    )


def is_plain(name: Any) -> bool:
    """True for a string that names one file or folder beside the file in which it stands, and nothing elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        return False
    return len(name.encode("utf-8", "surrogatepass")) <= LONGEST

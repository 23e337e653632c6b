"""File systems: which kind holds a path, and whether that is known to be a local disk.

Input: a path, and the mounts of this process. Output: the kind ("ext4", "fuse.juicefs", ...), and a reason against it.
Errors: none; what cannot be found out is "unknown".

LMDB's locks and memory maps do not work over a network, and a kind that nobody has tried may be one. So a build refuses
kinds that are not known to be local; reading a store on one logs a warning, once a path.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from pathlib import Path

import psutil

logger = logging.getLogger("tierstore")

UNKNOWN = "unknown"
MOUNTS = Path("/proc/self/mountinfo")
_LOCAL_KINDS = """
    ext2 ext3 ext4 xfs btrfs zfs bcachefs f2fs jfs reiserfs nilfs2 ubifs tmpfs ramfs rootfs devtmpfs overlay aufs
    virtiofs ntfs ntfs3 fuseblk exfat vfat hfsplus udf ecryptfs squashfs erofs iso9660 fuse.fuse-overlayfs fuse.ntfs-3g
"""
_REMOTE_KINDS = """
    nfs nfs4 cifs smb3 smbfs 9p ceph lustre glusterfs afs beegfs gpfs orangefs pvfs2 gfs2 ocfs2 coda ncpfs vboxsf vmhgfs
    wekafs panfs fuse.sshfs fuse.glusterfs fuse.juicefs fuse.ceph fuse.ceph-fuse fuse.s3fs fuse.rclone fuse.gcsfuse
    fuse.goofys fuse.geesefs fuse.mountpoint-s3 fuse.blobfuse fuse.blobfuse2 fuse.ossfs fuse.cosfs fuse.seaweedfs
    fuse.weed fuse.moosefs fuse.mfs fuse.lizardfs fuse.curlftpfs fuse.davfs2 fuse.gvfsd-fuse fuse.alluxio-fuse
    fuse.cvmfs2 fuse.vmhgfs-fuse
"""
LOCAL = frozenset(_LOCAL_KINDS.split())
REMOTE = frozenset(_REMOTE_KINDS.split())  # only for the words: what is in neither list is not taken for local either


def file_system_of(path: Path) -> str:
    """Returns the kind of the file system that holds `path` ("ext4", "nfs4", ...), "unknown" if nothing says it."""
    resolved = path.resolve()
    best = ("", UNKNOWN)
    for mountpoint, kind in _mounts():
        if resolved.is_relative_to(mountpoint) and len(mountpoint) >= len(best[0]):
            best = (mountpoint, kind)
    return best[1]


def why_not_local(kind: str) -> str:
    """Returns why a kind of file system is not taken for a local disk; "" if it is one."""
    if kind in LOCAL:
        return ""
    if kind in REMOTE:
        return f"a network file system ({kind})"
    if kind == UNKNOWN:
        return "a file system whose kind nothing says"
    return f"a file system that is not known to be local ({kind})"


def warn_unless_local(path: Path) -> None:
    """Logs, once for each path, that a store is read from a file system that is not known to be local."""
    reason = why_not_local(file_system_of(path))
    if reason:
        _warn_once(str(path), reason)


@lru_cache(maxsize=256)
def _warn_once(path: str, reason: str) -> None:
    logger.warning(
        "%s is on %s: reads may be slow, and fail if the network does; copy the store to a local disk to be sure",
        path, reason,
    )  # fmt: skip


def _mounts() -> list[tuple[str, str]]:
    """Returns (mount point, kind) of every mount, in the order in which they were made; [] if nothing says them."""
    try:
        return [(partition.mountpoint, partition.fstype) for partition in psutil.disk_partitions(all=True)]
    except OSError:  # it also wants /proc/filesystems, which a /proc of processes only does not have
        pass
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    mounts = []
    for line in lines:  # "36 35 98:0 /root /mount/point options ... - ext4 /dev/sda options", see proc(5)
        fields, _, rest = line.partition(" - ")
        point = fields.split(" ")[4]
        unescaped = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
        mounts.append((unescaped, rest.split(" ")[0]))
    return mounts

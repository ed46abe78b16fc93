"""Who works on a run: a lock file with a heartbeat, so that processes and machines that share a folder divide the work.

A lock is stale if its process is gone from this host, or if nobody has touched it for a while. Its age is measured by
the clock of the file system, since those of two machines may differ.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

from lit_dsunet.files import create_json, read_json, write_json

__all__ = ["Claim"]


class Claim:
    """A claim on one piece of work.

    Args:
        path: The lock file.
        stale_after: Seconds without a heartbeat after which a lock of another host is nobody's any more; 0 takes it at
            once.

    Attributes:
        lost: Another process has taken the work over, because the heartbeat stopped for too long (a machine asleep).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "lock"
        >>> mine, yours = Claim(path), Claim(path)
        >>> mine.acquire(), yours.acquire()
        (True, False)
        >>> mine.release()
        >>> yours.acquire()
        True
        >>> yours.release()
    """

    def __init__(self, path: str | Path, stale_after: float = 600.0) -> None:
        self.path, self.stale_after = Path(path), stale_after
        self.lost = False
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> bool:
        """Take the lock, if it is free or stale."""
        content = {**_place(), "pid": os.getpid(), "started": _started(os.getpid()), "token": self._token}
        if not create_json(self.path, content) and not self._take_over(content):
            return False
        self.lost = False
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()
        return True

    def release(self) -> None:
        """Give it back."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._holder() == self._token:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def owner(self) -> str:
        """Who holds it, for a message."""
        content = self._content()
        return f"process {content.get('pid', '?')} on {content.get('host', 'an unknown host')}"

    # ---- inside --------------------------------------------------------------------------------------------------

    def _content(self) -> dict[str, object]:
        try:
            content = read_json(self.path)
        except ValueError:  # gone, or written by something else
            return {}
        return content if isinstance(content, dict) else {}

    def _holder(self) -> object:
        return self._content().get("token")

    def _take_over(self, content: dict[str, object]) -> bool:
        """Put this claim in the place of a stale one."""
        judged = self._content()
        if not self._is_stale(judged):
            return False
        # One at a time, and the lock is never absent meanwhile: somebody who judged the same lock finds another in its
        # place afterwards, and gives up.
        guard = self.path.with_name(f"{self.path.name}.taken")
        with contextlib.suppress(OSError):  # whoever made it died within these lines
            if self._now() - guard.stat().st_mtime > max(60.0, self.stale_after):
                guard.unlink()
        if not create_json(guard, content):
            return False
        try:
            if self._content().get("token") != judged.get("token"):
                return False
            write_json(self.path, content)
            return True
        finally:
            guard.unlink(missing_ok=True)

    def _is_stale(self, content: dict[str, object]) -> bool:
        try:
            touched = self.path.stat().st_mtime
        except FileNotFoundError:
            return False
        pid = content.get("pid")
        if isinstance(pid, int) and all(content.get(key) == value for key, value in _place().items()):
            started = _started(pid)
            if started is None or started != content.get("started"):  # gone, or its number is another's by now
                return True
        return self._now() - touched >= self.stale_after

    def _now(self) -> float:
        probe = self.path.with_name(f".{uuid.uuid4().hex[:8]}.now")
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(min(60.0, self.stale_after / 5) or 60.0):
            if self._holder() not in (self._token, None):
                self.lost = True
                return
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                os.utime(self.path)


def _place() -> dict[str, str]:
    """Where a process number means something: containers of one host name each count their own."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return {"host": socket.gethostname(), "space": space}


def _started(pid: int) -> str | None:
    """What tells a process from a later one of the same number; None if there is no such process."""
    try:
        # The name in parentheses may hold spaces; the 20th field after it is the start time in clock ticks.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
    except (OSError, IndexError):
        return "?"
    try:  # a system without /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "?"

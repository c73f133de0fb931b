"""What stands where a Python is asked for: `preloaded_client.py SOCKET ARGUMENTS...`; see `preloaded_python`.

It imports next to nothing, and is started without site-packages.
"""

import json
import os
import signal
import socket
import sys


def main(address: str, *arguments: str) -> int:
    if arguments[:1] != ("-m",):
        os.execv(sys.executable, [sys.executable, *arguments])
    files = [number for number in map(int, os.listdir("/proc/self/fd")) if is_open(number)]
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ), "files": files}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
        asked.connect(address)
        socket.send_fds(asked, [json.dumps(request).encode()], files)
        status = int(asked.recv(64))
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def is_open(number: int) -> bool:
    """Not so the one by which they were listed."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

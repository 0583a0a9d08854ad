"""Runs a module as if the kernel had been booted anew: `python -m other_boot BOOT_ID_FILE MODULE [ARGUMENT...]`."""

import os
import sys

ENTER = 'mount --bind "$1" /proc/sys/kernel/random/boot_id && shift && exec "$@"'


def main() -> None:
    boot_id_file, *module = sys.argv[1:]
    inside = ["/bin/sh", "-c", ENTER, "enter", boot_id_file, sys.executable, "-m", *module]
    os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", *inside])


if __name__ == "__main__":
    main()

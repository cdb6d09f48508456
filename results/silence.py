"""The longest silences of a command on a terminal. Linux and macOS alone.

    python results/silence.py python train.py --tiny --iterations 5
    python results/silence.py --busy 1 python train.py --tiny      beside a process that only counts

Runs the command under a pseudo-terminal of 100 columns and notes when each piece of output comes.
Prints its output to --log, then the longest silences, and for each what stood on the screen's last
line before it and what ended it. The exit status is 1 where one is longer than --limit seconds.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

try:
    import fcntl
    import pty
    import struct
    import termios
except ImportError:
    sys.exit("silence.py needs pseudo-terminals: Linux or macOS")

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours, and what erases a line
SIZE = struct.pack("HHHH", 40, 100, 0, 0)  # rows, columns, unused


def run(command):
    """Run a command under a terminal: its [(seconds since the start, text), ...] and exit status.

    The last piece is empty and stands at the command's end.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, SIZE)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    pieces = []
    try:
        while not pieces or pieces[-1][1]:
            text = read(ours)
            pieces.append((time.perf_counter() - start, text))
    finally:
        os.close(ours)
        is_interrupted = not pieces or pieces[-1][1]
        if is_interrupted:
            process.terminate()
    return pieces, process.wait()


def read(terminal):
    """What comes next from the other side; empty where it is closed."""
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # Linux's way to say so
        return ""


def silences(pieces):
    """[(length, when it began, text until then, the piece that ended it), ...], longest first."""
    found = []
    before = 0.0
    text = ""
    for time_of, piece in pieces:
        found.append((time_of - before, before, text, piece))
        before = time_of
        text += piece
    return sorted(found, key=lambda silence: -silence[0])


def last_line(text):
    """What the last line of a terminal shows that was sent this text."""
    for line in reversed(CONTROL.sub("", text).split("\n")):
        shown = [part for part in line.split("\r") if part.strip()]
        if shown:
            return shown[-1].strip()
    return "nothing yet"


def first_line(text):
    lines = re.split(r"[\r\n]+", CONTROL.sub("", text))
    return next((line.strip() for line in lines if line.strip()), "the end")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=2, help="seconds that a silence may last")
    parser.add_argument("--busy", type=int, default=0, help="processes that count beside it")
    parser.add_argument("--show", type=int, default=8, help="silences to print")
    parser.add_argument("--log", type=Path, help="a file for the output, each piece with its time")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if not args.command:
        parser.error("which command?")
    counting = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(counting) for _ in range(args.busy)]
    try:
        pieces, status = run(args.command)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
    if args.log:
        args.log.write_text("".join(f"{when:8.2f} {text!r}\n" for when, text in pieces))
    found = silences(pieces)
    too_long = sum(length > args.limit for length, *_ in found)
    print(
        f"{pieces[-1][0]:.1f} s in all, exit status {status}; longest silence {found[0][0]:.2f} s, "
        f"{too_long} over {args.limit:g} s"
    )
    for length, began, text, piece in found[: args.show]:
        print(f"{length:6.2f} s from {began:7.2f} on, after: {last_line(text)[:90]}")
        print(f"{'':26}until: {first_line(piece)[:90]}")
    sys.exit(too_long > 0)


if __name__ == "__main__":
    main()

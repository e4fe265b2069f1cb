#!/usr/bin/env python3
"""soak.py: after a million commands, rfw holds no more memory and descriptors than before.

    tests/soak.py target/release/rfw [COUNT]

COUNT (1,000,000) PUT, DELETE and GET /list, pipelined, on eight connections that are reopened now
and then, half with an expiry, some invalid; real iptables-legacy in its own namespace, and the
environment of contrib/rfw.service. There must be as many descriptors as at the beginning, and memory
within 1 MB (1,000,000 bytes) of that after the first tenth. Exit status 1 if not.
"""

import random, select, signal, sys, time
from lab import *

CONNECTIONS, PIPELINED, ADDRESSES, RENEWED = 8, 25, 300, 40


def command(at):
    """-> a request, and how its response begins."""
    address = f"10.{at}.{random.randrange(2)}.{random.randrange(ADDRESSES // 2)}"
    kind = random.random()
    if kind < 0.45:
        return request("PUT", f"/drop/input/any/{address}?expire={random.choice(['0', '1h', '2s', '5s'])}"), b"HTTP/1.1 200"
    if kind < 0.9:
        return request("DELETE", f"/drop/input/any/{address}"), b"HTTP/1.1 200"
    if kind < 0.99:
        return request("PUT", f"/drop/input/any/2001:db8:{at}::{random.randrange(ADDRESSES):x}?expire=3s"), b"HTTP/1.1 200"
    if kind < 0.995:
        return request("GET", "/list/output"), (b"HTTP/1.1 200", b"HTTP/1.1 503")  # four at a time
    return request("PUT", "/drop/input/any/127.0.0.1"), b"HTTP/1.1 409"


class Worker:
    """A connection with this many requests in flight."""

    def __init__(self, at):
        self.at, self.conn = at, None
        self.turn()

    def turn(self):
        """Sends another request, now and then on a new connection."""
        if self.conn is None or random.randrange(RENEWED) == 0:
            if self.conn:
                self.conn.close()
            self.conn = connect()
        asked = [command(self.at) for _ in range(PIPELINED)]
        self.wanted, self.data = [want for _, want in asked], b""
        self.conn.sendall(b"".join(bytes_ for bytes_, _ in asked))

    def take(self):
        """-> how many responses have arrived."""
        more = self.conn.recv(1 << 18)
        if not more:
            raise RuntimeError("rfw closed a connection")
        self.data, done = self.data + more, 0
        while self.wanted:
            end = self.data.find(b"\r\n\r\n") + 4
            head = self.data[:end].lower()
            at = head.find(b"content-length: ")
            if end < 4 or at < 0:
                break
            end += int(head[at + 16:head.index(b"\r", at)])
            if len(self.data) < end:
                break
            if not self.data.startswith(self.wanted[0]):
                raise RuntimeError(f"not {self.wanted[0]}: {self.data[:end]!r}")
            self.data, done = self.data[end:], done + 1
            self.wanted.pop(0)
        if not self.wanted:
            self.turn()
        return done


def stall(rfw):
    """With twice as many rules, many expire at once: for a moment, rfw needs much more memory."""
    body = "".join(f"10.99.{n >> 8}.{n & 255}\n" for n in range(1000)).encode()
    for method in "PUT", "DELETE":
        exchange(connect(), request(method, "/drop/input/any", f"Content-Length: {len(body)}\r\n") + body)
        rfw.process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        rfw.process.send_signal(signal.SIGCONT)


def main(program, count=1000000):
    inside()
    count = int(count)
    # As in the unit. Otherwise one large allocation, once freed, doubles what glibc keeps for each thread.
    with open(ROOT + "/contrib/rfw.service") as f:
        os.environ.update(line.strip().removeprefix("Environment=").split("=") for line in f if line.startswith("Environment="))
    rfw = Rfw(program, "", "/usr/sbin/iptables-legacy")
    before = rfw.idle()
    workers = {}
    for at in range(CONNECTIONS):
        worker = Worker(at)
        workers[worker.conn.fileno()] = worker
    done, tenth, begin, memory = 0, 1, time.monotonic(), []
    print(f"{'commands':>10}{'a second':>10}{'memory':>12}{'descriptors':>13}{'rules':>8}", flush=True)
    while done < count:
        ready, _, _ = select.select(list(workers), [], [], 30)
        if not ready:
            raise RuntimeError("no answer in 30 s")
        for fd in ready:
            worker = workers.pop(fd)
            done += worker.take()
            workers[worker.conn.fileno()] = worker
        if done >= count * tenth // 10:
            tenth += 1
            if tenth == 4:
                stall(rfw)
            memory.append(rfw.memory())
            rules = subprocess.run(["/usr/sbin/iptables-legacy", "-w", "-S"], capture_output=True).stdout.count(b"rfw")
            print(f"{done:>10}{done / (time.monotonic() - begin):>10.0f}{memory[-1] / 1e6:>9.2f} MB{rfw.descriptors():>13}{rules:>8}", flush=True)
    for worker in workers.values():
        worker.conn.close()
    growth, after = memory[-1] - memory[0], rfw.idle()
    print(f"memory grew by {growth / 1e6:.2f} MB (at most 1); descriptors and threads: {after}, at first {before}")
    rfw.stop()
    return 0 if after == before and growth < 1e6 else 1


if len(sys.argv) < 2:
    sys.exit(__doc__)
sys.exit(main(os.path.abspath(sys.argv[1]), *sys.argv[2:]))

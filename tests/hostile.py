#!/usr/bin/env python3
"""hostile.py: an honest client among 4,000 hostile connections, in its own namespace.

    tests/hostile.py target/release/rfw [WORD...]     only the rows with one of the words in them

Two waves of 4,000 connections, 10 s apart, each from its own whitelisted address but for one row, to
the local and to the outward server. They start within a second and are never closed by the client.
Meanwhile, an honest client sends a PUT on a new connection every 50 ms. Exit status 1 if a goal
is missed; 1 MB is 1,000,000 bytes.
"""

import base64, itertools, json, mmap, os, random, select, signal, socket, ssl, struct, sys, time
from lab import *

HOSTILE, FLOODERS, SECONDS = 4000, 4, 15
WAVES = [0.5, 10.5]  # for each, the seconds between two connections of a flooder
PACE = FLOODERS / HOSTILE
THREADS = 256  # 128 places of a server, and threads that are about to end
LINGER = 1.5  # a second in which rfw waits for a peer to take its last words, and some slack
RESET = struct.pack("ii", 1, 0)
GET = request("GET", "/", BASIC)
BODY = request("PUT", "/drop/input/any", BASIC + "Content-Length: 60000000\r\n")


# --- What hostile connections do -------------------------------------------------------------------
#
# Each kind: whether it finishes a TLS handshake first, what it sends at once, and every second.

def hello():
    """The first bytes of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="a").do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()


def garbage():
    """Invalid TLS records, or bytes that look like some."""
    kind, length = random.choice(b"\x14\x15\x16\x17\x18\xff"), random.randrange(1, 0x4001)
    return bytes([kind, 3, random.randrange(5)]) + length.to_bytes(2, "big") + random.randbytes(length)


DRIP, NEVER, ENDLESS, RESETS, LEAVES = "drip", "never reads", "endless", "resets", "leaves"
KINDS = {  # name: (servers, finishes the handshake, bytes at once, what then, after how many s it is gone)
    "idle": ("lo", False, lambda: b"", None, 10),
    "idle from one address": ("lo", False, lambda: b"", None, 30),  # the kernel hands over some late
    "idle after the handshake": ("o", True, lambda: b"", None, 10),
    "drip heads": ("lo", True, lambda: b"GET / HTTP/1.1\r\n", DRIP, 10),
    "drip bodies": ("lo", True, lambda: BODY, DRIP, 40),
    "never read": ("lo", True, lambda: GET * 300, NEVER, 20),
    "stall the handshake": ("o", False, lambda: hello()[:-9], None, 10),
    "drip the handshake": ("o", False, lambda: b"\x16\x03\x01\x3f\xff", DRIP, 10),
    "send garbage": ("lo", False, lambda: random.randbytes(999), None, 10),
    "send garbage records": ("o", False, garbage, None, 10),
    "pipeline without end": ("lo", True, lambda: b"", ENDLESS, None),
    "reset": ("lo", False, lambda: b"PUT /drop", RESETS, 10),
    "connect and leave": ("lo", False, lambda: b"", LEAVES, 10),
}


# From one address only, while the honest client is far away: so many s pass until its request arrives.
ONE_ADDRESS = {"idle from one address": 0.1}


class Flood:
    """A share of the hostile connections, in its own process."""

    def __init__(self, kind, port, first, count, last):
        _, handshake, self.first_bytes, self.then, _ = KINDS[kind]
        self.port, self.sources = port, [f"127.1.{n >> 8}.{n & 255}" for n in range(first, first + count)]
        if kind in ONE_ADDRESS:
            self.sources = ["127.1.0.0"] * count
        self.context = tls() if handshake and port == OUTWARD else None
        self.poll, self.open, self.last = select.epoll(), {}, last
        if self.then in (RESETS, LEAVES):  # these make no use of their places: more of them
            self.waves = [at + more for at in WAVES for more in (0, 2, 4, 6)]
        else:
            self.waves = WAVES

    def run(self):
        os.nice(10)  # as from another host: its work is not the server's
        begin, drip = time.monotonic(), time.monotonic()
        waves = list(self.waves)
        while True:
            if waves and time.monotonic() - begin > waves[0]:
                waves.pop(0)
                self.wave()
            self.turn(0.02)
            if self.then == DRIP and time.monotonic() - drip > 1:
                drip = time.monotonic()
                for conn in list(self.open.values()):
                    self.send(conn, b"X")

    def wave(self):
        for conn in list(self.open.values()):
            self.drop(conn)
        start = time.monotonic()
        for n, source in enumerate(self.sources):
            conn = socket.socket()
            conn.setblocking(False)
            if self.then == NEVER:
                conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            conn.setsockopt(socket.SOL_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
            conn.bind((source, 0))
            try:
                conn.connect(("127.0.0.1", self.port))
            except BlockingIOError:
                pass
            if self.context:
                conn = self.context.wrap_socket(conn, do_handshake_on_connect=False, server_hostname="127.0.0.1")
            self.open[conn.fileno()] = conn
            self.poll.register(conn, select.EPOLLOUT | select.EPOLLONESHOT)
            self.turn(max(0, start + n * PACE - time.monotonic()))

    def turn(self, wait):
        for fd, _ in self.poll.poll(wait, 64):
            conn = self.open.get(fd)
            if conn:
                try:
                    self.ready(conn)
                except ssl.SSLWantReadError:
                    self.poll.modify(fd, select.EPOLLIN | select.EPOLLONESHOT)
                except ssl.SSLWantWriteError:
                    self.poll.modify(fd, select.EPOLLOUT | select.EPOLLONESHOT)
                except OSError:
                    self.drop(conn)

    def ready(self, conn):
        """It is connected, or its handshake can go on."""
        self.last[:] = struct.pack("d", time.monotonic())
        if self.context:
            conn.do_handshake()  # nothing, where it is done
        if self.then == LEAVES:
            return self.drop(conn)
        if self.then == ENDLESS:
            return self.go_on(conn)
        self.send(conn, self.first_bytes())
        if self.then == RESETS:
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.drop(conn)

    def go_on(self, conn):
        """Reads all received bytes and sends as many requests as possible."""
        try:
            while conn.recv(1 << 18):
                pass
            return self.drop(conn)
        except (ssl.SSLWantReadError, BlockingIOError):
            pass
        self.send(conn, GET * 50)
        self.poll.modify(conn, select.EPOLLIN | select.EPOLLOUT | select.EPOLLONESHOT)

    def send(self, conn, data):
        try:
            conn.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            pass
        except OSError:
            self.drop(conn)

    def drop(self, conn):
        self.open.pop(conn.fileno(), None)
        socket.socket.close(conn)


# --- The honest client -----------------------------------------------------------------------------

def honest(port, out, away):
    """Sends a PUT on a new connection every 50 ms, or one after another, `away` s after it has connected;
    records the rest of the time of each, and the failures."""
    context = tls() if port == OUTWARD else None
    took, wrong, begin = [], [], time.monotonic()
    for n in itertools.count():
        at = begin + n * 0.05
        if at > begin + SECONDS:
            break
        time.sleep(max(0, at - time.monotonic()))
        start = time.monotonic()
        try:
            conn = connect(port, None, context)
            time.sleep(away)
            said = exchange(conn, request("PUT", f"/drop/input/any/10.0.{n >> 8}.{n & 255}", BASIC))
            if not said.startswith(b"HTTP/1.1 200 "):
                wrong.append(said[:40].decode() or "closed")
        except OSError as error:
            wrong.append(repr(error))
        took.append(time.monotonic() - start - away)
    with open(out, "w") as f:
        json.dump([sorted(took), wrong], f)


def kind_rows(program, table, kind, server):
    name, port = ("local", LOCAL) if server == "l" else ("outward", OUTWARD)
    what, limit = f"{kind}, {name} server", KINDS[kind][4]
    if not table.wants(what):
        return
    rfw = Rfw(program, OUTWARD_CONF)
    exchange(connect(OUTWARD, None, tls()), GET)
    time.sleep(0.3)
    idle = rfw.threads(), rfw.descriptors(), rfw.memory()
    out, last = os.path.join(RUN, "honest"), mmap.mmap(-1, 8)  # when a hostile one began
    each = HOSTILE // FLOODERS
    floods = [fork(Flood(kind, port, n * each, each, last).run) for n in range(FLOODERS)]
    client = fork(honest, port, out, ONE_ADDRESS.get(kind, 0))
    threads = descriptors = 0
    while os.waitpid(client, os.WNOHANG) == (0, 0):
        threads = max(threads, rfw.threads())
        descriptors = max(descriptors, rfw.descriptors())
        time.sleep(0.02)
    with open(out) as f:
        took, wrong = json.load(f)
    back = lambda: rfw.descriptors() <= idle[1] and rfw.threads() <= idle[0]
    while limit and not back() and time.monotonic() < struct.unpack("d", last)[0] + 60:
        time.sleep(0.02)
    gone = time.monotonic() - struct.unpack("d", last)[0]
    for pid in floods:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    ended = time.monotonic()
    while not back() and time.monotonic() < ended + 60:
        time.sleep(0.02)
    after, peak = time.monotonic() - ended, rfw.memory("VmHWM")
    p99 = took[int(len(took) * 0.99)]
    goal = "0, p99 50 ms, 64 MB" + (f", {limit} s" if limit else "")
    latency = f"{len(wrong)} of {len(took)}, p50 {took[len(took) // 2] * 1e3:.1f} p99 {p99 * 1e3:.1f} max {took[-1] * 1e3:.0f} ms"
    left = f"gone in {gone:.1f} s, " if limit else ""
    met = not wrong and p99 < 0.05 and peak < 64e6 and threads <= THREADS and after < 5
    table.row(what, goal, f"{latency}; {peak / 1e6:.1f} MB, {threads} threads, {descriptors} files; "
              f"{left}idle after {after:.1f} s", met and (not limit or gone < limit + LINGER))
    for text, count in sorted((w, wrong.count(w)) for w in set(wrong)):
        print(f"    {count} x {text!r}", flush=True)
    rfw.stop()


# --- Guessing --------------------------------------------------------------------------------------

SAMPLES, AUTHENTICATE = 5000, f"local.server.authentication\nauth.username = {USER}\nauth.password = {PASSWORD}\n"


def basic(user, password):
    return f"Authorization: Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}\r\n"


def ranks_z(a, b):
    """Mann and Whitney's z: in how many standard deviations two samples differ."""
    ordered = sorted([(x, 0) for x in a] + [(x, 1) for x in b])
    n, m = len(a), len(b)
    u = sum(rank for rank, (_, which) in enumerate(ordered, 1) if which == 0) - n * (n + 1) / 2
    return (u - n * m / 2) / (n * m * (n + m + 1) / 12) ** 0.5


def timing(program, table):
    """Refusals of guesses that are right to different degrees, in turns; from new addresses, because each may
    guess ten times. All get the same response, unlike correct credentials. With the most users possible, the
    first is compared before all others, the last after them."""
    what = "timing of unknown user, wrong password, right password"
    if not table.wants(what):
        return
    write("users", "".join(f"user{n}:{'p' * (n % 40 + 1)} read\n" for n in range(254)) + f"zz:{PASSWORD} all\n")
    rfw = Rfw(program, AUTHENTICATE + "auth.file = users\n")
    wrong = "x" * len(PASSWORD)
    kinds = {"unknown user": ("xx", wrong), "wrong password": (USER, wrong), "unknown user, right password": ("xx", PASSWORD),
             "last letter wrong": (USER, PASSWORD[:-1] + "x"), "last of 256 users, last letter wrong": ("zz", PASSWORD[:-1] + "x")}
    asked = {name: request("GET", "/nothing", basic(*pair)) for name, pair in kinds.items()}
    took = {name: [] for name in kinds}
    for n in range(SAMPLES // 2):
        with connect(source=f"127.2.{n >> 8}.{n & 255}") as conn:
            conn.sendall(request("GET", "/nothing"))
            answer(conn)
            for name in random.sample(list(asked), len(asked)) + random.sample(list(asked), len(asked)):
                begin = time.perf_counter()
                conn.sendall(asked[name])
                said = answer(conn)
                took[name].append(time.perf_counter() - begin)
                if not said.startswith(b"HTTP/1.1 401"):
                    raise RuntimeError(f"{name}: {said[:40]}")
    for a, b in itertools.combinations(kinds, 2):
        z = abs(ranks_z(took[a], took[b]))
        table.row(f"timing: {a} : {b}", "z under 3", f"{z:.1f}", z < 3)
    rfw.stop()


def guessing(program, table):
    what = "guessing: 429, others unaffected, memory"
    if not table.wants(what):
        return
    rfw = Rfw(program, AUTHENTICATE)
    right, wrong = request("GET", "/list", BASIC), request("GET", "/list", basic(USER, "guess"))
    ask = lambda source, bytes_: exchange(connect(source=source), bytes_)
    guesses = [ask("127.3.0.1", wrong)[9:12] for _ in range(12)]
    table.row("guessing: the 12th wrong one, then a right one", "429, with Retry-After",
              f"{guesses[-1].decode()}, {ask('127.3.0.1', right)[9:12].decode()}",
              guesses[:10] == [b"401"] * 10 and guesses[-1] == b"429" and b"Retry-After: " in ask("127.3.0.1", right))
    for n in range(5000):  # more addresses than are remembered
        ask(f"127.4.{n >> 8}.{n & 255}", wrong)
    before = rfw.memory()
    for n in range(20000):
        ask(f"127.{5 + (n >> 16)}.{n >> 8 & 255}.{n & 255}", wrong)
        if n % 100 == 0 and not ask("127.0.0.1", right).startswith(b"HTTP/1.1 200"):
            raise RuntimeError("another address was refused")
    grown = rfw.memory() - before
    table.row("guessing: 20,000 addresses more; another address with the right one", "1 MB; 200", f"{grown / 1e6:.2f} MB; 200", grown < 1e6)
    rfw.stop()


def main(program, *words):
    inside()
    keys()
    table = Table(words)
    timing(program, table)
    guessing(program, table)
    for kind, (servers, *_) in KINDS.items():
        for server in servers:
            kind_rows(program, table, kind, server)
    return 1 if table.missed else 0


if len(sys.argv) < 2:
    sys.exit(__doc__)
sys.exit(main(os.path.abspath(sys.argv[1]), *sys.argv[2:]))

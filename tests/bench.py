#!/usr/bin/env python3
"""bench.py: what rfw costs compared with the bare tools, measured in one run, in its own namespaces.

    [TAGS=N] tests/bench.py target/release/rfw [WORD...]

WORD: only the rows with one of the words in them. TAGS: rules with this number of tags are in use
meanwhile; where rfw keeps sets, each tag has one.

Each iptables variant has its own network, mount and process namespaces: no process outlives the
script. Compared figures are measured in turns, and the median counts. A slow figure is printed, and
is not a failure; 1 MB is 1,000,000 bytes.
"""

import asyncio, ctypes, json, os, re, select, shutil, socket, statistics, struct, subprocess, sys, tempfile, time
from collections import namedtuple
from lab import LOCAL, OUTWARD, ROOT, await_true, private

VARIANTS = ["nft", "legacy"]
SET = "rfw4:drop:in:any"
DEADLINE = 120  # seconds for an answer, a start or a repair: far more than any goal allows
Row = namedtuple("Row", "what goal measure")  # measure(Box) -> (rfw, bare, ratio), texts


# --- The two sides ---------------------------------------------------------------------------------

class Box:
    """One variant's tools, and the rfw that runs with them."""

    def __init__(self, rfw, keys, variant):
        self.rfw, self.dir, self.pid = rfw, keys, None
        self.iptables, self.ipset = "/usr/sbin/iptables-" + variant, "/usr/sbin/ipset"
        self.conf = os.path.join(keys, variant + ".conf")
        self.configure()

    def configure(self, more="", outward="outward.server"):
        with open(self.conf, "w") as f:
            f.write(f"""[config]
{outward}
outward.server.port = {OUTWARD}
outward.server.ip = 127.0.0.1
outward.server.certfile = server_127.0.0.1/server.crt
outward.server.keyfile = server_127.0.0.1/server.key
local.server
local.server.port = {LOCAL}
auth.username = bench
auth.password = bench
whitelist.file = white.list
iptables.path = {self.iptables}
{more}
""")
        os.chmod(self.conf, 0o600)  # it holds a password

    def start(self, *tracer):
        self.stop()
        log = os.path.join(self.dir, "log")
        self.pid = spawn([*tracer, self.rfw, "-f", self.conf, "--logfile", log], setpgroup=0)

    def stop(self):
        """Kills rfw and waits for the programs it was running: their parent is now this process, 1."""
        group, self.pid = self.pid, None
        if group:
            os.kill(group, 9)
            await_true("all programs of rfw have ended", 60, lambda: not reap(group))

    def ended(self):
        """How rfw ended, if it was not stopped."""
        pid, status = os.waitpid(self.pid, os.WNOHANG) if self.pid else (0, 0)
        if pid:
            self.pid = None
        return f" (rfw had ended: {os.waitstatus_to_exitcode(status)})" if pid else ""

    def fresh(self, rules=0, comment="rfw", start=True):
        """Starts rfw with nothing in the kernel but `rules` of its rules, and waits until it responds."""
        self.stop()
        for program in (self.iptables, self.iptables.replace("iptables", "ip6tables")):
            subprocess.run([program, "-F"], check=True)
        subprocess.run([self.ipset, "destroy"], check=True)
        self.load([rule("A", "20", i, comment) for i in range(rules)])
        if start:
            self.start()
            client = Client()
            client.ask(request("GET", "/"))
            for n in range(int(os.environ.get("TAGS") or 0)):
                client.ask(request("PUT", f"/drop/input/any/192.0.2.{n}?tag=source{n}"))
            return client

    def with_sets(self):
        """The same, with sets, all of them empty."""
        self.configure(f"ipset.path = {self.ipset}")
        return self.fresh()

    def load(self, lines):
        """All at once, or 200 at a time if an ordinary user's netlink accepts no more."""
        restore = [self.iptables + "-restore", "--noflush"]
        if subprocess.run(restore, input=table(lines), stderr=subprocess.DEVNULL).returncode:
            for i in range(0, len(lines), 200):
                subprocess.run(restore, input=table(lines[i:i + 200]), check=True)

    def flush(self):
        subprocess.run([self.iptables, "-w", "-F"], check=True)

    def size(self, chain="INPUT"):
        """The rules of a chain in the kernel, by one system call: a listing of 90,000 takes seconds."""
        return nft_rules(chain) if self.iptables.endswith("nft") else legacy_bytes(chain)

    def await_size(self, size, chain="INPUT"):
        await_true(f"{chain} holds what it did", DEADLINE, lambda: self.size(chain) == size)

    def entries(self):
        """How many entries the set has; 0 if there is no set."""
        listing = subprocess.run([self.ipset, "list", "-terse", SET], capture_output=True).stdout
        return int((re.findall(rb"Number of entries: (\d+)", listing) or [0])[0])

    def listing(self, chain="INPUT"):
        return subprocess.run([self.iptables, "-w", "-S", chain], capture_output=True, check=True).stdout

    def await_check(self):
        """Waits until rfw has run programs, as each check of the kernel does, and none for half a second."""
        begin = since = time.monotonic()
        first = last = self.programs()
        while last == first or time.monotonic() < since + 0.5:
            if time.monotonic() > begin + DEADLINE:
                raise RuntimeError("rfw does not check the kernel")
            time.sleep(0.02)
            now = self.programs()
            if now != last or now[1]:
                last, since = now, time.monotonic()

    def programs(self):
        """-> (page faults of the programs that rfw has run: only more of them add any, those running now)"""
        with open(f"/proc/{self.pid}/stat") as f:
            faults = f.read().rpartition(")")[2].split()[8]
        running = ""
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            try:
                with open(f"/proc/{self.pid}/task/{thread}/children") as f:
                    running += f.read()
            except (FileNotFoundError, ProcessLookupError):
                pass  # the thread has just ended
        return faults, running

    def resident(self, what="VmRSS"):
        """Bytes in memory: now, or with VmHWM the most so far."""
        with open(f"/proc/{self.pid}/status") as f:
            return int(re.search(what + r":\s+(\d+) kB", f.read()).group(1)) * 1024

    def write(self, name, lines):
        path = os.path.join(self.dir, name)
        with open(path, "wb") as f:
            f.write("\n".join([*lines, ""]).encode())
        return path


def address(net, i):
    return f"{net}.{i >> 16 & 255}.{i >> 8 & 255}.{i & 255}"


def rule(verb, net, i, comment):
    return f"-{verb} INPUT -s {address(net, i)}/32 -m comment --comment {comment} -j DROP"


def table(lines):
    return "\n".join(["*filter", *lines, "COMMIT", ""]).encode()


def nft_rules(chain):
    """NFT_MSG_GETCHAIN with NFTA_CHAIN_TABLE and _NAME -> NFTA_CHAIN_USE; 0 if there is no such chain."""
    body = struct.pack("=BBH", socket.AF_INET, 0, 0)
    for kind, text in (1, "filter"), (3, chain):
        body += struct.pack("=HH", 5 + len(text), kind) + text.encode().ljust(len(text) + 4 & ~3, b"\0")
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netfilter:
        netfilter.send(struct.pack("=IHHII", 16 + len(body), 10 << 8 | 4, 1, 0, 0) + body)
        reply, at = netfilter.recv(65536), 20
    while int.from_bytes(reply[4:6], sys.byteorder) == 10 << 8 | 3 and at < len(reply):
        length, kind = struct.unpack_from("=HH", reply, at)
        if kind == 6:
            return int.from_bytes(reply[at + 4:at + 8], "big")
        at += length + 3 & ~3
    return 0


def legacy_bytes(chain):
    """IPT_SO_GET_INFO: from the start of a chain to its policy."""
    info, length = ctypes.create_string_buffer(b"filter", 84), ctypes.c_uint32(84)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        if ctypes.CDLL(None).getsockopt(raw.fileno(), socket.IPPROTO_IP, 64, info, ctypes.byref(length)):
            raise RuntimeError("the size of a chain cannot be read")
    hook = ["", "INPUT", "FORWARD", "OUTPUT"].index(chain)
    begins, policies = struct.unpack_from("5I5I", info, 36)[:5], struct.unpack_from("5I", info, 56)
    return policies[hook] - begins[hook]


def spawn(argv, stdin=None, **options):
    """The cheapest way to start a program: vfork and exec."""
    files = [(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
             (os.POSIX_SPAWN_OPEN, 0, stdin or "/dev/null", os.O_RDONLY, 0)]
    return os.posix_spawn(argv[0], argv, {}, file_actions=files, **options)


def reap(group):
    """-> whether a process group still has processes."""
    try:
        os.waitpid(-group, os.WNOHANG)
        return True
    except ChildProcessError:
        return False


def seconds_of(argv, stdin=None):
    begin = time.perf_counter()
    _, status = os.waitpid(spawn(argv, stdin), 0)
    took = time.perf_counter() - begin
    if status:
        raise RuntimeError(f"{argv} failed")
    return took


class Client:
    """A persistent connection to the local server; connects as soon as rfw listens."""

    def __init__(self):
        limit = time.monotonic() + DEADLINE
        while True:
            self.socket = socket.socket()
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Not settimeout, for which Python makes one more system call for each recv.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", DEADLINE, 0))
            try:
                self.socket.connect(("127.0.0.1", LOCAL))
                return
            except ConnectionRefusedError:
                self.socket.close()
                if time.monotonic() > limit:
                    raise RuntimeError("rfw does not start") from None
                time.sleep(0.0002)

    def answer(self):
        """The body of one response; any status but 200 ends the row."""
        data = self.receive()
        end = data.find(b"\r\n\r\n") + 4
        if not data.startswith(b"HTTP/1.1 200") or end < 4:
            raise RuntimeError(f"rfw answered {data[:300]!r}")
        length = int(re.search(rb"(?i)content-length: *(\d+)", data[:end]).group(1))
        while len(data) < end + length:
            data += self.receive()
        return data[end:]

    def receive(self):
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            raise RuntimeError(f"no answer in {DEADLINE} s") from None
        if not data:
            raise RuntimeError("rfw closed the connection")
        return data

    def ask(self, request):
        begin = time.perf_counter()
        self.socket.sendall(request)
        self.answer()
        return time.perf_counter() - begin


def request(method, path):
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def feed(count, blocks=True):
    """Addresses all over the world, one in a hundred a block, of 14 sizes; each once, none whitelisted."""
    prefix = lambda i: f"/{16 + i // 100 % 14}" if blocks and i % 100 == 0 else ""
    step = 2654435761  # odd, so that no address comes twice
    first = [n for n in range(1, 224) if n != 127]
    return [address(first[(i * step >> 24 & 255) % len(first)], i * step) + prefix(i) for i in range(count)]


def put_list(lines, path="/drop/input/any"):
    body = "\n".join([*lines, ""]).encode()
    return f"PUT {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def drop(method, net, i):
    return request(method, "/drop/input/any/" + address(net, i))


# --- The rows --------------------------------------------------------------------------------------

def times(rfw, bare):
    rfw, bare = statistics.median(rfw), statistics.median(bare)
    return f"{rfw * 1e3:.2f} ms", f"{bare * 1e3:.2f} ms", f"{rfw / bare:.2f} x"


def one_put(rules, outward=""):
    """To insert after the guards of the outward server, iptables-nft reads the chain."""
    def measure(box):
        box.configure(outward=outward)
        rfw, bare, insert = [], [], os.path.join(box.dir, "insert")
        for _ in range(6):
            client = box.fresh(rules)
            for i in range(30):  # no deletions between: what they leave to the kernel slows what follows
                with open(insert, "wb") as f:  # -A costs what -I does, and leaves rfw's rules in front
                    f.write(table([rule("A", "30", i, "bare")]))
                bare.append(seconds_of([box.iptables + "-restore", "--noflush"], insert))
                put = drop("PUT", "40", i)
                rfw.append(client.ask(put))
        return times(rfw, bare)
    return measure


def many_clients(outward=""):
    def measure(box):
        box.configure(outward=outward)
        rfw, bare, each = [], [], 16  # as many rules as the loop makes: each change costs more
        for _ in range(5):
            box.fresh()
            clients = [Client() for _ in range(32)]
            todo = {c.socket.fileno(): (c, [drop("PUT", str(50 + n), i) for i in range(each)])
                    for n, c in enumerate(clients)}
            poll = select.epoll()
            begin = time.perf_counter()
            for fd, (client, puts) in todo.items():
                poll.register(fd, select.EPOLLIN)
                client.socket.sendall(puts.pop())
            while todo:
                for fd, _ in poll.poll():
                    client, puts = todo[fd]
                    client.answer()
                    if puts:
                        client.socket.sendall(puts.pop())
                    else:
                        poll.unregister(fd)
                        del todo[fd]
            rfw.append(32 * each / (time.perf_counter() - begin))
            box.fresh(start=False)
            loop = f'i=0; while [ $i -lt 512 ]; do i=$((i + 1)); {box.iptables} -w -I INPUT -s 30.0.$((i / 256)).$((i % 256)) -j DROP; done'
            bare.append(512 / seconds_of(["/bin/sh", "-c", loop]))
        rfw, bare = statistics.median(rfw), statistics.median(bare)
        return f"{rfw:.0f} /s", f"{bare:.0f} /s", f"{rfw / bare:.2f} x"
    return measure


def same_put(box):
    """Eight requests are in flight at a time: one alone measures how fast two idle processors wake
    each other, which on virtual machines takes longer than the request."""
    client, put, rates = box.fresh(), drop("PUT", "40", 1), []
    client.ask(put)
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(10000 // 8):
            client.socket.sendall(put * 8)
            data = b""
            while data.count(b"\r\n\r\n") < 8 or not data.endswith(b"}\n"):
                data += client.receive()
            if data.count(b"HTTP/1.1 200") != 8:
                raise RuntimeError(f"rfw answered {data[:300]!r}")
        rates.append(10000 / (time.perf_counter() - begin))
    return f"{statistics.median(rates):.0f} /s", "", ""


def expiry(others):
    def measure(box):
        due = int(time.time()) + 8
        box.fresh(5000, f"rfw:{due}", start=False)
        box.load([rule("I", "10", i, "rfw") for i in range(others)])
        box.start()
        Client().ask(request("GET", "/"))
        time.sleep(max(0, due - time.time() - 0.2))
        if box.listing().count(b"rfw:%d" % due) != 5000:
            raise RuntimeError("the rules did not live until they were due")
        while b"rfw:%d" % due in box.listing():
            if time.time() > due + 60:
                raise RuntimeError("not gone after 60 s")
            time.sleep(0.1)
        return f"{time.time() - due:.1f} s", "", ""
    return measure


def expiry_beside_list(box):
    """100 rules fall due while a list is written: how long after the list they are deleted. rfw's counter
    shows when, because each look at the kernel would take seconds, too; then the kernel confirms it."""
    late, later = [], []
    for ahead in 1, 0.5, 0.2:
        box.fresh(60000)
        box.await_check()
        guards, client = box.size("OUTPUT"), Client()  # rfw closes an idle connection
        client.ask(put_list([address("10", i) for i in range(100)], "/drop/output/any?expire=5s"))
        due = int(re.search(rb"rfw:(\d+)", box.listing("OUTPUT")).group(1))
        time.sleep(max(0, due - ahead - time.time()))
        monitor = Client()
        client.socket.sendall(put_list([address("40", i) for i in range(30000)]))
        gone = answered = None
        while not (gone and answered):
            if not answered and select.select([client.socket], [], [], 0.02)[0]:
                client.answer()
                answered = time.time()
            monitor.socket.sendall(request("GET", "/metrics"))
            if b"rfw_expired_rules_total 100\n" in monitor.answer() and not gone:
                gone = time.time()
            if time.time() > due + DEADLINE:
                raise RuntimeError(f"after {DEADLINE} s: list applied: {bool(answered)}, expired: {bool(gone)}")
        if box.size("OUTPUT") != guards:
            raise RuntimeError("rules that rfw counts as expired are in the kernel")
        late.append(gone - (answered if due < answered <= gone else due))
        later.append(gone - due)
    return f"{max(late):.1f} s", f"{max(later):.1f} s", ""


def start_up(box):
    rfw, bare = [], []
    box.fresh(10000)
    for _ in range(9):
        box.stop()
        begin = time.perf_counter()
        box.start()
        Client().ask(request("GET", "/"))
        rfw.append(time.perf_counter() - begin)
        bare.append(seconds_of([box.iptables, "-S"]))
    return times(rfw, bare)


def start_from_file(sets):
    """As after a reboot: nothing in the kernel, and a state file of 120,000."""
    def measure(box):
        rfw, bare, size = [], [], box.entries if sets else box.size
        v4 = [f"50.{i >> 16}.{i >> 8 & 255}.{i & 255}" for i in range(120000 if sets else 60000)]
        v6 = [] if sets else [f"2001:db8::{i:x}" for i in range(60000)]
        box.write("state", ["rfw state 1", *(f"+ 0 /drop/input/any/{line}" for line in v4 + v6)])
        if sets:
            create = f"create {SET} hash:net maxelem 1048576 timeout 0 counters"
            restores = [([box.ipset, "restore"], [create, *(f"add {SET} {line} timeout 0" for line in v4)])]
        else:
            rule = "-I INPUT -s {} -m comment --comment rfw -j DROP".format
            restores = [([program + "-restore", "--noflush"], ["*filter", *map(rule, lines), "COMMIT"])
                        for program, lines in ((box.iptables, v4), (box.iptables.replace("iptables", "ip6tables"), v6))]
        restores = [(argv, box.write(f"restore{n}", lines)) for n, (argv, lines) in enumerate(restores)]
        for _ in range(5):
            for own in True, False:
                box.configure()
                box.fresh(start=False)
                if not own:
                    bare.append(sum(seconds_of(*restore) for restore in restores))
                    if held < size():
                        raise RuntimeError("rfw answered before the kernel held the list")
                    continue
                box.configure("state.file = state\n" + (f"ipset.path = {box.ipset}" if sets else ""))
                begin = time.perf_counter()
                box.start()
                Client().ask(request("GET", "/"))
                rfw.append(time.perf_counter() - begin)
                held = size()
        return times(rfw, bare)
    return measure


def flushed_rules(box):
    box.fresh(10000)
    box.await_check()
    before, size = box.listing(), box.size()
    took = recovery(box, box.flush, lambda: box.await_size(size))
    if box.listing() != before:
        raise RuntimeError("other rules came back, or in another order")
    return took


def flushed_set(box):
    box.with_sets().ask(put_list(feed(120000)))
    box.await_check()
    size = box.entries()
    all_back = lambda: await_true(f"the set holds {size}", DEADLINE, lambda: box.entries() == size)
    return recovery(box, lambda: seconds_of([box.ipset, "flush", SET]), all_back)


def recovery(box, flush, await_all):
    """Each flush happens at a different moment between two checks."""
    took = []
    for n in range(6):
        box.await_check()
        time.sleep(n * 0.4)
        flush()
        begin = time.perf_counter()
        await_all()
        took.append(time.perf_counter() - begin)
    return f"{statistics.median(took):.2f} s", f"max {max(took):.2f}", ""


def put_after_flush(box):
    """The time until all rules are back; what the PUT answered, and whether the kernel held its rule then."""
    took, results, held = [], set(), True
    for _ in range(3):
        box.fresh(90000)
        box.await_check()
        client = Client()  # rfw closes an idle connection
        whole = box.size()
        box.flush()
        begin = time.perf_counter()
        client.socket.sendall(drop("PUT", "20", 0))
        results.add(json.loads(client.answer())["result"])
        if box.size() != whole:
            held &= b"-s 20.0.0.0/32 " in box.listing()
        try:
            box.await_size(whole)
        except RuntimeError as error:
            raise RuntimeError(f"{error}; the PUT was answered {results}, the rule held: {held}") from None
        took.append(time.perf_counter() - begin)
    return f"{max(took):.2f} s", "/".join(sorted(results)), "held" if held else "NOT HELD"


def many_to_sets_and_disk(box):
    """What 64 PUTs at once cost, by strace; with -D it is the child and rfw keeps its process ID."""
    trace, state = os.path.join(box.dir, "trace"), box.write("state64", [])
    box.configure(f"ipset.path = {box.ipset}\nstate.file = {state}")
    box.fresh(start=False)
    words = f"-D -f -qq -ttt --seccomp-bpf -e signal=none -e trace=execve,fsync,fdatasync -o {trace}"
    box.start(shutil.which("strace") or "strace", *words.split())
    clients, spans = [Client() for _ in range(64)], []
    clients[0].ask(drop("PUT", "40", 0))  # makes the set
    for n in range(5):
        box.await_check()
        begin = time.time()
        for i, client in enumerate(clients):
            client.socket.sendall(drop("PUT", str(50 + n), i))
        for client in clients:
            client.answer()
        spans.append((begin, time.time()))
    box.stop()
    with open(trace) as f:
        calls = [(float(at), name) for at, name in re.findall(r"(?m)^\d+ +([\d.]+) (execve|fsync|fdatasync)\(", f.read())]
    count = lambda names: statistics.median(
        sum(begin <= at <= end and name in names for at, name in calls) for begin, end in spans)
    return f"{count(['execve']):.0f} run", f"{count(['fsync', 'fdatasync']):.0f} syncs", ""


def one_put_to_disk(box):
    rfw, bare, insert = [], [], os.path.join(box.dir, "insert")
    box.configure(f"state.file = state-{os.path.basename(box.iptables)}")
    client, line = box.fresh(), b"+ 0 /drop/input/any/30.0.0.1\n"
    with open(os.path.join(box.dir, "line"), "ab") as beside:
        for i in range(100):
            with open(insert, "wb") as f:
                f.write(table([rule("A", "30", i, "bare")]))
            begin = time.perf_counter()
            os.write(beside.fileno(), line)
            os.fdatasync(beside.fileno())
            bare.append(time.perf_counter() - begin + seconds_of([box.iptables + "-restore", "--noflush"], insert))
            rfw.append(client.ask(drop("PUT", "40", i)))
    return times(rfw, bare)


def list_of_rules(box):
    rfw, bare = [], []
    lines = [rule("I", "40", i, "rfw") for i in range(10000)]
    restore = box.write("restore", ["*filter", *lines, "COMMIT"])
    put = put_list([address("40", i) for i in range(10000)])
    for _ in range(5):
        rfw.append(box.fresh().ask(put))
        box.fresh(start=False)
        bare.append(seconds_of([box.iptables + "-restore", "--noflush"], restore))
    return times(rfw, bare)


def list_in_set(again):
    """The daily feed: the first time, or a second time with a later expiry."""
    def measure(box):
        rfw, bare, lines = [], [], feed(120000)
        create = f"create {SET} hash:net maxelem 1048576 timeout 0 counters"
        restores = [(exist, box.write(f"restore{hours}", [*first, *(f"add {SET} {line} timeout {hours * 3600}" for line in lines)]))
                    for exist, first, hours in (([], [create], 25), (["-exist"], [], 26))]
        for _ in range(5):
            client = box.with_sets()
            rfw.append([client.ask(put_list(lines, f"/drop/input/any?expire={hours}h")) for hours in (25, 26)][again])
            box.fresh(start=False)
            bare.append([seconds_of([box.ipset, *exist, "restore"], path) for exist, path in restores][again])
        return times(rfw, bare)
    return measure


def huge_list(box):
    client = box.with_sets()
    took = client.ask(put_list(feed(550000)))
    return f"{took:.2f} s", "", ""


def huge_list_memory(what):
    """After the list: single changes and a check of the kernel."""
    def measure(box):
        client = box.with_sets()
        client.ask(put_list(feed(550000)))
        for method in "PUT", "DELETE":
            client.ask(drop(method, "250", 1))
        box.await_check()
        return megabytes(box.resident(what))
    return measure


def one_among_many(method, verb, net, tags=0):
    """The addresses are untagged, or divided among this many tags; the change then has another tag."""
    def measure(box):
        rfw, bare, client = [], [], box.with_sets()
        lines = feed(550000) + [address("250", i) for i in range(100)]
        put_in_tags(client, lines, tags)
        create = "create bare hash:net maxelem 1048576 timeout 0 counters"
        seconds_of([box.ipset, "restore"], box.write("restore", [create, *(f"add bare {line}" for line in lines)]))
        for i in range(100):
            rfw.append(client.ask(drop(method, net, i)))
            bare.append(seconds_of([box.ipset, verb, "bare", address(net, i)]))
        return times(rfw, bare)
    return measure


def put_in_tags(client, lines, tags):
    for n in range(max(tags, 1)):
        query = f"?tag=feed{n}" if tags else ""
        client.ask(put_list(lines[n::max(tags, 1)], "/drop/input/any" + query))


def rules_about(box):
    """GET /list?ip= among 550,000 addresses in sets of 16 tags."""
    rfw, bare, client, lines = [], [], box.with_sets(), feed(550000)
    put_in_tags(client, lines, 16)
    for line in [line for line in lines[::16] if "/" not in line][::700]:
        rfw.append(client.ask(request("GET", "/list?ip=" + line)))
        bare.append(seconds_of([box.ipset, "test", SET + "@feed0", line]))
    return times(rfw, bare)


def packets(blocks):
    """UDP from a neighbour at full speed, with the set and without it."""
    return lambda box: flood(box, feed(120000, blocks))


def flood(box, lines):
    ip = lambda words: subprocess.run(["ip", *words.split()], check=True)
    neighbour = subprocess.Popen(["unshare", "-n", "sleep", "600"])
    server = subprocess.Popen(["iperf3", "-s"], stdout=subprocess.DEVNULL)
    try:
        here, there = (f"/proc/{pid}/ns/net" for pid in ("self", neighbour.pid))
        await_true("the neighbour has its own network", 5, lambda: os.readlink(there) != os.readlink(here))
        await_true("iperf3 listens", 5, lambda: ":1451 " in open("/proc/net/tcp6").read())
        ip(f"link add us type veth peer name eth0 netns {neighbour.pid}")
        ip("addr add 192.0.2.1/24 dev us")
        ip("link set us up")
        enter = ["nsenter", "--net=" + there]
        for words in "addr add 192.0.2.2/24 dev eth0", "link set eth0 up":
            subprocess.run([*enter, "ip", *words.split()], check=True)
        rates = {True: [], False: []}
        for blocked in [True, False] * 5:
            client = box.with_sets()
            if blocked:
                client.ask(put_list(lines))
            words = "iperf3 -J -c 192.0.2.1 -u -b 0 -l 64 -t 2"
            out = subprocess.run([*enter, *words.split()], capture_output=True).stdout
            sum_ = json.loads(out)["end"]["sum"]
            rates[blocked].append((sum_["packets"] - sum_["lost_packets"]) / sum_["seconds"])
        with_, without = statistics.median(rates[True]), statistics.median(rates[False])
        return f"{with_:.0f} /s", f"{without:.0f} /s", f"{with_ / without:.2f} x"
    finally:
        for process in server, neighbour:
            process.kill()
            process.wait()
        subprocess.run(["ip", "link", "del", "us"], stderr=subprocess.DEVNULL)


def listing_of_set(box):
    client, rfw, bare = box.with_sets(), [], []
    client.ask(put_list(feed(120000)))
    curl = ["/usr/bin/curl", "-s", f"http://127.0.0.1:{LOCAL}/list"]
    before = box.resident("VmHWM")
    for _ in range(5):
        rfw.append(seconds_of(curl))
        bare.append(seconds_of([box.ipset, "save", SET]))
    if box.resident("VmHWM") > before + 1e6:
        raise RuntimeError("memory was not flat")
    return times(rfw, bare)


def memory(rules):
    def measure(box):
        client = box.fresh(rules)
        client.ask(request("GET", "/"))
        box.await_check()
        return megabytes(box.resident())
    return measure


def fleet(box):
    """rfwc with 200 servers: stand-ins that accept the whole list and take half a second longer."""
    urls = [f"http://127.0.1.{n}" for n in range(1, 201)]
    one, all_, list_ = (box.write(name, lines) for name, lines in
                        [("one", urls[:1]), ("all", urls), ("feed", feed(10000))])
    stand_ins = os.fork()
    if stand_ins == 0:
        asyncio.run(half_a_second([url[7:] for url in urls]))
    try:
        send = lambda servers: seconds_of([box.rfw, "client", "--servers", servers, "put", "/drop/input/any",
                                           "--list", list_])
        send(all_)  # until all of them are there
        many, single = zip(*[(send(all_), send(one)) for _ in range(5)])
    finally:
        os.kill(stand_ins, 9)
        os.waitpid(stand_ins, 0)
    return times(many, single)


def batch(sets):
    """PUTs of rfwc batch, compared with one curl for each."""
    def measure(box):
        rfw, bare = [], []
        lines = feed(3000)
        path = box.write("lines", [f"put /drop/input/any/{line}?expire=1h&tag=feed" for line in lines])
        loop = box.write("loop", [f"curl -sfX PUT 'http://127.0.0.1:{LOCAL}/drop/input/any/{line}?expire=1h&tag=feed'" for line in lines[:300]])
        for _ in range(3):
            box.with_sets() if sets else box.fresh()
            rfw.append(3000 / seconds_of([box.rfw, "client", "batch", path]))
            box.with_sets() if sets else box.fresh()
            bare.append(300 / seconds_of(["/bin/sh", "-e", loop]))
        rfw, bare = statistics.median(rfw), statistics.median(bare)
        return f"{rfw:.0f} /s", f"{bare:.0f} /s", f"{rfw / bare:.2f} x"
    return measure


async def half_a_second(addresses):
    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"Content-Length: (\d+)", head).group(1)))
        await asyncio.sleep(0.5)
        body = b'{"result":"applied","inserted":10000}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()
    for address in addresses:
        await asyncio.start_server(answer, address, LOCAL, limit=1 << 20)
    await asyncio.Event().wait()


def megabytes(size):
    return f"{size / 1e6:.2f} MB", "", ""


# A start reads the kernel twice, because one listing may lack rules; once would allow 1.3 x and 1.5 x.
ROWS = [
    Row("one PUT on a kept connection: one restore, 0 rules", "at most 1.2 x", one_put(0)),
    Row("one PUT on a kept connection: one restore, 10,000 rules", "at most 1.3 x", one_put(10000)),
    Row("the same, 10,000 rules, behind guards", "", one_put(10000, "outward.server")),
    Row("32 clients PUT at once: loop of iptables -w -I", "at least 6 x", many_clients()),
    Row("the same 32 clients, behind guards", "", many_clients("outward.server")),
    Row("PUT of a rule that is there", "at least 10000 /s", same_put),
    Row("5,000 rules expire in one second", "at most 3 s", expiry(0)),
    Row("5,000 of 10,000 rules expire in one second", "", expiry(5000)),
    Row("60,000 rules, 30,000 more come, 100 expire: since due", "at most 2 s after the list", expiry_beside_list),
    Row("all back after a flush of 10,000 rules", "at most 2 s", flushed_rules),
    Row("all back after a flush of a set of 120,000", "at most 3 s", flushed_set),
    Row("all back after a flush of 90,000 rules, and a PUT", "held when answered", put_after_flush),
    Row("64 PUT at once, sets and state file: syncs", "at most 8 programs run, 8 syncs", many_to_sets_and_disk),
    Row("start to first answer, 10,000 rules: one iptables -S", "at most 2.2 x (nft), 2.4 x (legacy)", start_up),
    Row("memory, both servers on, idle", "at most 4 MB", memory(0)),
    Row("memory, both servers on, 10,000 rules", "at most 8 MB", memory(10000)),
    Row("start, 120,000 rules in the state file: two restores", "at most 1.3 x", start_from_file(False)),
    Row("start, 120,000 in the state file, sets: ipset restore", "at most 1.3 x", start_from_file(True)),
    Row("one PUT with a state file: one restore and one fdatasync", "", one_put_to_disk),
    Row("list of 10,000, rules: iptables-restore --noflush", "at most 1.3 x", list_of_rules),
    Row("list of 120,000, sets: ipset restore", "at most 1.2 x", list_in_set(False)),
    Row("the same 120,000 again, new expiry: ipset -exist restore", "at most 1.3 x", list_in_set(True)),
    Row("list of 550,000, sets", "at most 5 s", huge_list),
    Row("memory after a list of 550,000, sets", "at most 40 MB", huge_list_memory("VmRSS")),
    Row("memory at most by then, 550,000, sets", "at most 80 MB", huge_list_memory("VmHWM")),
    Row("one PUT among 550,000, sets: one ipset add", "at most 2 ms", one_among_many("PUT", "add", "251")),
    Row("one DELETE among 550,000, sets: one ipset del", "at most 2 ms", one_among_many("DELETE", "del", "250")),
    Row("one PUT among 550,000 of 16 tags: one ipset add", "at most 2 ms", one_among_many("PUT", "add", "251", 16)),
    Row("GET /list?ip= among 550,000 of 16 tags: one ipset test", "at most 10 ms", rules_about),
    Row("packets a second, 120,000 hosts in sets: none", "at least 0.9 x", packets(False)),
    Row("the same, 1,200 of them blocks of 14 sizes: none", "", packets(True)),
    Row("GET /list of 120,000, sets: ipset save", "at most 2 x", listing_of_set),
    Row("rfwc batch, rules: one curl for each change", "", batch(False)),
    Row("rfwc batch, sets: one curl for each change", "", batch(True)),
    Row("rfwc: a list of 10,000 to 200 servers: to one", "", fleet),
    Row("size of the program", "at most 1.6 MB", lambda box: megabytes(os.stat(box.rfw).st_size)),
]


# --- The run ---------------------------------------------------------------------------------------

def main(rfw, words):
    with tempfile.TemporaryDirectory() as keys:
        subprocess.run([ROOT + "/contrib/rfwgen", "127.0.0.1", keys], stdout=subprocess.DEVNULL, check=True)
        with open(keys + "/white.list", "w") as f:
            f.write("127.0.0.1\n")
        print(f"{'':7}{'what: compared with':58}{'rfw':>10}{'bare':>11}{'ratio':>10}   goal", flush=True)
        again = [sys.executable, os.path.abspath(__file__), "--inside", os.readlink("/proc/self/ns/net")]
        return max(private([*again, os.path.abspath(rfw), keys, variant, *words]) for variant in VARIANTS)


def inside(outer, rfw, keys, variant, *words):
    if os.readlink("/proc/self/ns/net") == outer:
        sys.exit("bench: not in a network namespace of its own")
    box, failed = Box(rfw, keys, variant), 0
    for row in ROWS:
        if words and not any(word in row.what for word in words):
            continue
        try:
            figures = "{:>10} {:>10} {:>9}".format(*row.measure(box))
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            failed, figures = 1, f"NOT MEASURED: {error}{box.ended()}"
        finally:
            box.stop()
            box.configure()
        print(f"{variant:7}{row.what:58}{figures}   {row.goal}", flush=True)
    return failed


if sys.argv[1:2] == ["--inside"]:
    sys.exit(inside(*sys.argv[2:]))
if len(sys.argv) < 2:
    sys.exit(__doc__)
sys.exit(main(sys.argv[1], sys.argv[2:]))

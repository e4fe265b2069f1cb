#!/usr/bin/env python3
"""firewalls.py: rfw next to the real Docker, ufw, firewalld and netfilter-persistent.

    tests/firewalls.py target/release/rfw PACKAGES [FIREWALL] [nft|legacy] [rules|sets]

PACKAGES contains Debian's packages, unpacked but not installed (`make firewalls` does that). Needs root.
Each case has its own network, mount and process namespaces, where the packages overlay /usr and /etc:

    the packets' source              the host: rfw, the other firewall        Docker's container
    10.99.0.2  fd99::2   (allowed)
    10.99.0.66 fd99::66  (blocked) --- 10.99.0.1 fd99::1, UDP port 9000 --- (the published port)

The source sends a packet from each address 100 times a second, while the other firewall starts, reloads and
stops. Each case runs once without rfw, to see which rules the other one makes alone. Exit status 1 if a row
misses its goal: rfw's rules are in front again, the other's rules are the same as without rfw, and packets from
blocked addresses get through only where the manual says so.
"""

import itertools, json, re, select, shutil
from lab import *

PORT = 9000
ALLOWED, BLOCKED = ("10.99.0.2", "fd99::2"), ("10.99.0.66", "fd99::66")
TAGGED = re.compile(r'--comment "?rfw[":@ ]')
CHAINS = ("INPUT", "FORWARD", "OUTPUT")
# Seconds within which rfw's rules must be in front again, and for which blocked addresses may get through until then.
# It is 1 to 2 beside other work: rfw pauses for 20 times a check's processor time.
SLACK, GAP = 6.0, 4.0
OVERLAYS = [  # the target, the package's folder, whether it is read-only
    ("/usr", "/usr", False), ("/usr/lib", "/lib", False), ("/usr/bin", "/bin", False), ("/etc", "/etc", True), ("/var", None, True),
]
BUS = """<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>"""


def run(*words, check=True):
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    with open(RUN + "/commands.log", "a") as log:
        log.write(f"$ {' '.join(words)}\n{done.stdout}{done.stderr}")
    if check and done.returncode:
        raise RuntimeError(f"{words}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def start(name, *words):
    log = open(f"{RUN}/{name}.log", "ab")
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent)


def end(process, kill=False):
    (process.kill if kill else process.terminate)()
    process.wait()


def overlay(packages, kind):
    for number, (over, from_, writable) in enumerate(OVERLAYS):
        lower = f"{packages}{from_}:{over}" if from_ else over
        options = f"lowerdir={lower}"
        if writable:
            upper = f"{RUN}/layers/{number}"
            for name in "upper", "work":
                os.makedirs(f"{upper}/{name}")
            options += f",upperdir={upper}/upper,workdir={upper}/work"
        run("mount", "-t", "overlay", "lab", "-o", options, over)
    for family in "iptables", "ip6tables":
        for suffix in "", "-save", "-restore":
            run("ln", "-sf", f"/usr/sbin/{family}-{kind}{suffix}", f"/etc/alternatives/{family}{suffix}")
    os.environ["PATH"] = "/usr/sbin:/usr/bin"


# The packets

def send():
    """In the source's namespace: packets from each address, a new flow each time."""
    die_with_parent()
    while True:
        for address in ALLOWED + BLOCKED:
            family, target = (socket.AF_INET6, "fd99::1") if ":" in address else (socket.AF_INET, "10.99.0.1")
            with socket.socket(family, socket.SOCK_DGRAM) as conn:
                try:
                    conn.bind((address, 0))
                    conn.sendto(f"rfw {address} {time.monotonic():.4f}".encode(), (target, PORT))
                except OSError:
                    pass  # no route for a moment
        time.sleep(0.01)


def receive(forwarded):
    """Logs the packets that arrive at the host's port, or that leave the host for a container."""
    if forwarded:
        sockets = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))]
    else:
        sockets = [socket.socket(family, socket.SOCK_DGRAM) for family in (socket.AF_INET, socket.AF_INET6)]
        for conn, address in zip(sockets, ("10.99.0.1", "fd99::1")):
            conn.bind((address, PORT))
    with open(RUN + "/arrived", "ab", 0) as log:
        while True:
            for conn in select.select(sockets, [], [])[0]:
                data, sender = conn.recvfrom(2048)
                ours = re.search(rb"rfw (\S+) ([\d.]+)$", data)
                to_container = forwarded and sender[0].startswith("veth") and sender[2] == socket.PACKET_OUTGOING
                if ours and (to_container or not forwarded):
                    log.write(b" ".join(ours.groups()) + b"\n")


def network(forwarded):
    run("ip", "netns", "add", "peer")
    run("ip", "link", "add", "lab0", "type", "veth", "peer", "name", "lab1", "netns", "peer")
    for address in "10.99.0.1/24", "fd99::1/64":
        run("ip", "address", "add", address, "dev", "lab0", *["nodad"] * (":" in address))
    for address in *ALLOWED, *BLOCKED:
        words = [address + "/64", "nodad"] if ":" in address else [address + "/24"]
        run("ip", "-n", "peer", "address", "add", *words, "dev", "lab1")
    run("ip", "link", "set", "lab0", "up")
    run("ip", "-n", "peer", "link", "set", "lab1", "up")
    fork(receive, forwarded)
    start("source", "ip", "netns", "exec", "peer", sys.executable, os.path.abspath(__file__), "--send")


def arrived(addresses, since):
    """The times at which the packets from these addresses that got through were sent."""
    with open(RUN + "/arrived") as log:
        rows = (line.split() for line in log if line.endswith("\n"))
        return [float(sent) for address, sent in rows if address in addresses and float(sent) >= since]


# The rules

class Case:
    """One firewall, one variant of iptables, one form of rfw's rules (or no rfw)."""

    def __init__(self, program, packages, firewall, kind, form, alone):
        self.program, self.firewall, self.kind, self.form, self.alone_file = program, firewall, kind, form, alone
        self.forwarded, self.rfw, self.missed = firewall == "docker", None, 0
        self.alone = json.load(open(alone)) if form != "alone" else {}
        overlay(packages, kind)
        network(self.forwarded)

    def start_rfw(self, more=""):
        if self.form == "alone":
            return
        sets = "ipset.path = /usr/sbin/ipset\n" if self.form == "sets" else ""
        self.rfw = Rfw(self.program, sets + more, f"/usr/sbin/iptables-{self.kind}")

    def ask(self, method, path):
        if self.rfw:
            reply = exchange(connect(), request(method, path))
            if b" 200 " not in reply[:20]:
                raise RuntimeError(f"{method} {path}: {reply}")
            return reply

    def block(self):
        """Inserts the rules that must remain, including those for the source's addresses."""
        chain = "forward" if self.forwarded else "input"
        for number in range(20):
            self.ask("PUT", f"/drop/{chain}/any/198.51.100.{number}" + "?expire=1h" * (number % 2))
        for address in BLOCKED:
            self.ask("PUT", f"/drop/{chain}/any/{address}")
        self.ask("PUT", "/reject/output/any/203.0.113.1?tag=x")
        self.wanted = self.own()

    def listing(self, family):
        return run(f"/usr/sbin/{family}-{self.kind}", "-w", "5", "-S").splitlines()

    def own(self):
        """rfw's rules, and the content of its sets."""
        rules = [line for family in ("iptables", "ip6tables") for line in self.listing(family) if TAGGED.search(line)]
        sets = run("ipset", "list", "-o", "save") if self.form == "sets" else ""
        return rules, sorted(line.split(" timeout ")[0] for line in sets.splitlines() if line.startswith("add rfw"))

    def blocked(self):
        return self.ask("GET", "/list").decode()

    def is_right(self):
        """Whether all of rfw's rules exist, and no foreign rule precedes one."""
        for family in "iptables", "ip6tables":
            lines = self.listing(family)
            for chain in CHAINS:
                marks = [bool(TAGGED.search(line)) for line in lines if line.startswith(f"-A {chain} ")]
                if marks != sorted(marks, reverse=True):
                    return False
        return self.own() == self.wanted

    def others(self):
        """All other rules, without the parts that differ from run to run."""
        found = []
        for family in "iptables", "ip6tables":
            table = ""
            for line in run(f"/usr/sbin/{family}-{self.kind}-save").splitlines():
                line = re.sub(r" \[\d+:\d+\]$", "", re.sub(r"\bbr-[0-9a-f]{12}\b", "br-x", line))
                table = line if line.startswith("*") else table
                plain = re.match(r":(INPUT|FORWARD|OUTPUT|PREROUTING|POSTROUTING) ACCEPT", line)
                if line.startswith(("-A", ":")) and not plain and not TAGGED.search(line):
                    found.append(f"{family} {table} {line}")
        return found + [line for name in ("firewalld", "filter")
                        for line in run("nft", "list", "table", "inet", name, check=False).splitlines()]

    def step(self, what, action, may_open=0.0, wait_for=lambda: None):
        """Performs an action while packets arrive, and checks the outcome. Blocked addresses may get through for at
        most `may_open` seconds."""
        begun = time.monotonic()
        action()
        wait_for()
        done = time.monotonic()
        if self.form == "alone":
            self.alone[what] = self.others()
            json.dump(self.alone, open(self.alone_file, "w"))
            return
        try:
            await_true("in front", SLACK, self.is_right)
            back, right = time.monotonic() - done, True
        except RuntimeError:
            back, right = SLACK, False
        time.sleep(1.5)
        right = right and self.is_right()
        through, allowed = arrived(BLOCKED, begun), arrived(ALLOWED, begun)
        open_for = through[-1] - through[0] + 0.01 if through else 0.0
        others = self.others()
        unharmed = others == self.alone[what]
        is_closed = self.forwarded and what in ("start", "stop")
        met = right and unharmed and open_for <= may_open and (allowed or is_closed)
        self.missed += not met
        rfws = f"back +{back:.1f} s" if right else "NOT BACK"
        print(f"{self.firewall:21}{self.kind:7}{self.form:6} {what:26}took {done - begun:4.1f} s  {rfws:13}"
              f" open {open_for:5.2f} s ({len(through):3} packets; {len(allowed):4} allowed)  others' "
              f"{'unharmed' if unharmed else 'CHANGED'}{'' if met else '   MISSED'}", flush=True)
        if not unharmed:
            for mark, a, b in ("-", self.alone[what], others), ("+", others, self.alone[what]):
                print("".join(f"    {mark} {line}\n" for line in a if line not in b), end="", flush=True)

    def accept(self, close, reopen, opens):
        """Checks whether rfw's `accept` admits packets that the other firewall does not."""
        close()
        self.ask("PUT", f"/accept/input/any/{ALLOWED[0]}")
        begun = time.monotonic()
        time.sleep(1)
        got = [len(arrived([address], begun)) > 0 for address in ALLOWED]
        self.fact("`accept` admits what the other firewall does not; nothing does without it", [opens, False], got)
        self.ask("DELETE", f"/accept/input/any/{ALLOWED[0]}")
        self.wanted = self.own()  # an empty set may stay
        reopen()

    def fact(self, what, want, got):
        """Checks a statement of the manual."""
        if self.form != "alone":
            self.missed += want != got
            missed = "" if want == got else f"   MISSED: not {want}"
            print(f"{self.firewall:21}{self.kind:7}{self.form:6} {what}: {got}{missed}", flush=True)


# The firewalls

def docker(case):
    os.makedirs(RUN + "/image/bin")
    shutil.copy("/bin/busybox", RUN + "/image/bin/busybox")
    daemon = None

    def up():
        nonlocal daemon
        daemon = start("dockerd", "dockerd", "-s", "vfs", "--iptables=true", "--data-root", RUN + "/docker",
                       "--cgroup-parent", "/rfw-lab")
        await_true("dockerd answers", 60, lambda: subprocess.run(["docker", "info"], capture_output=True).returncode == 0)

    def again(kill):
        end(daemon, kill)
        up()

    def flows():
        """Waits until packets of the allowed address reach a container."""
        begun = time.monotonic()
        await_true("the published port", 60, lambda: arrived(ALLOWED, begun))

    def publish(*words):
        run("docker", "run", "-d", "--restart=always", "--stop-timeout", "1", "--name", "web", "-p", f"{PORT}:{PORT}/udp", *words,
            "lab", "/bin/busybox", "sleep", "100000")

    def new_network():
        run("docker", "network", "create", "other")
        publish("--network", "other")

    def through_proxy():
        """Docker's proxy receives through `input` what is not translated: IPv6, and flows older than the container."""
        begun = time.monotonic()
        await_true("the published port, IPv4 and IPv6", 20, lambda: all(len(arrived([address], begun)) > 50 for address in ALLOWED))
        v4, v6 = (len(arrived([address], begun)) for address in BLOCKED)
        case.fact("`forward` alone: IPv6 gets through, of IPv4 a few packets at most", [True, True], [v6 > 25, v4 < 10])
        for address in BLOCKED:
            case.ask("PUT", f"/drop/input/any/{address}")
        case.wanted = case.own()

    case.start_rfw()
    case.block()
    try:
        case.step("start", up)
        run("sh", "-c", f"tar -C {RUN}/image -c . | docker import - lab")
        publish()
        through_proxy()
        run("docker", "rm", "-f", "web")
        case.step("a published port", publish, wait_for=flows)
        case.step("restart", lambda: again(False), GAP, flows)
        case.step("kill -9, start", lambda: again(True), GAP, flows)
        run("docker", "rm", "-f", "web")
        case.step("a new network", new_network, GAP, flows)
        case.step("restart, two networks", lambda: again(False), GAP, flows)
        run("docker", "rm", "-f", "web")
        case.step("stop", lambda: end(daemon))
    finally:
        run("sh", "-c", "find /sys/fs/cgroup -depth -type d -path '*/rfw-lab*' -exec rmdir {} +", check=False)


def ufw(case):
    for name in os.listdir("/usr/share/ufw/iptables"):
        shutil.copy("/usr/share/ufw/iptables/" + name, "/etc/ufw/" + name)
    for name in "before.init", "after.init", "ufw.conf":
        shutil.copy("/usr/share/ufw/" + name, "/etc/ufw/" + name)
    run("ufw", "allow", f"{PORT}/udp")
    case.start_rfw()
    case.block()
    case.step("enable", lambda: run("ufw", "--force", "enable"))
    case.step("allow", lambda: run("ufw", "allow", "22/tcp"))
    case.step("reload", lambda: run("ufw", "reload"))
    case.step("ufw-init restart", lambda: run("/lib/ufw/ufw-init", "restart"))
    case.accept(lambda: run("ufw", "delete", "allow", f"{PORT}/udp"), lambda: run("ufw", "allow", f"{PORT}/udp"), True)
    case.step("disable", lambda: run("ufw", "--force", "disable"))


def firewalld(case, backend):
    os.mkdir("/run/dbus")
    start("dbus", "dbus-daemon", "--nofork", "--config-file=" + write("bus.conf", BUS))
    await_true("the bus", 20, lambda: os.path.exists("/run/dbus/system_bus_socket"))
    run("sed", "-i", f"s/^FirewallBackend=.*/FirewallBackend={backend}/", "/etc/firewalld/firewalld.conf")
    run("firewall-offline-cmd", f"--add-port={PORT}/udp")
    daemon = None

    def up():
        nonlocal daemon
        daemon = start("firewalld", "firewalld", "--nofork", "--nopid")
        await_true("firewalld answers", 60, lambda: run("firewall-cmd", "--state", check=False) == "running\n")

    case.start_rfw()
    case.block()
    case.step("start", up, GAP)
    case.step("--add-port", lambda: run("firewall-cmd", "--add-port=22/tcp"))
    case.step("--reload", lambda: run("firewall-cmd", "--reload"), GAP)
    case.step("--complete-reload", lambda: run("firewall-cmd", "--complete-reload"), GAP)
    case.accept(lambda: run("firewall-cmd", f"--remove-port={PORT}/udp"), lambda: run("firewall-cmd", f"--add-port={PORT}/udp"),
                backend == "iptables")
    case.step("stop", lambda: end(daemon), GAP)


def nftables(case):
    """Debian's nftables.service: its file begins with `flush ruleset`."""
    gap = GAP if case.kind == "nft" else 0
    case.start_rfw()
    case.block()
    for what in "start", "reload":
        case.step(what, lambda: run("nft", "-f", "/etc/nftables.conf"), gap)
    case.step("stop", lambda: run("nft", "flush", "ruleset"), gap)


OWN = ("iptables", "192.0.2.77"), ("ip6tables", "2001:db8::77")


def persistent(case):
    """The administrator's own rules, saved before rfw was started; then saved together with rfw's."""
    plugins = RUN + "/plugins"
    shutil.copytree("/usr/share/netfilter-persistent/plugins.d", plugins)
    if not case.firewall.endswith("ipset"):
        for name in "10-ipset", "40-ipset":
            os.remove(f"{plugins}/{name}")
    run("mount", "--bind", plugins, "/usr/share/netfilter-persistent/plugins.d")
    os.makedirs("/etc/iptables", exist_ok=True)
    tool = lambda verb: lambda: run("netfilter-persistent", verb)
    for family, address in OWN:
        run(family, "-A", "INPUT", "-s", address, "-j", "DROP")
    run("netfilter-persistent", "save")
    case.start_rfw()
    case.block()
    case.step("start", tool("start"), GAP)
    case.step("reload", tool("reload"), GAP)
    case.step("save", tool("save"))
    case.step("start, saved with rfw's", tool("start"))
    case.step("restart, saved with rfw's", tool("restart"))
    case.step("stop", tool("stop"))
    # It exits with 1 if rfw has restored a set's rule before it destroys the sets.
    case.step("flush", lambda: run("netfilter-persistent", "flush", check=False), GAP)
    if case.rfw:
        for state in "", f"state.file = {RUN}/state\n":
            boot(case, state, cleaned=False)
        boot(case, state, cleaned=True)


def boot(case, state, cleaned):
    """Saves the tables with rfw's rules, changes these, and boots: the tables are loaded, then rfw starts."""
    wipe(case)
    for family, address in OWN:
        run(family, "-A", "INPUT", "-s", address, "-j", "DROP")
    case.start_rfw(state)
    for path in "10.1.1.1", "10.1.1.2", "10.1.1.3?expire=6s", "10.1.1.4?expire=1h":
        case.ask("PUT", "/drop/input/any/" + path)
    run("netfilter-persistent", "save")
    if cleaned:
        run("sed", "-Ei", r'/--comment ("rfw[:@"]|rfw[ :@])/d', "/etc/iptables/rules.v4", "/etc/iptables/rules.v6")
    case.ask("DELETE", "/drop/input/any/10.1.1.2")
    case.ask("PUT", "/drop/input/any/10.1.1.5")
    await_true("the expiry", 12, lambda: "10.1.1.3" not in case.blocked())
    wipe(case)
    loaded = subprocess.run(["netfilter-persistent", "start"], capture_output=True, text=True)
    own = [run(family, "-S", "INPUT").count(address) for family, address in OWN]
    case.start_rfw(state)
    sets, kept = case.form == "sets", case.firewall.endswith("ipset")
    fails = sets and not kept and not cleaned
    what = f"boot{', state file' if state else ''}{', cleaned' if cleaned else ''}:"
    case.fact(f"{what} the load fails, with exit status 0", fails, "doesn't exist" in loaded.stderr and not loaded.returncode)
    case.fact(f"{what} the administrator's rules, IPv4 and IPv6", [0 if fails else 1, 1], own)
    want = {"1", "4", "5"} if state else set() if fails else {"1", "2", "3", "4"} if sets else {"1", "2", "4"}
    got = set(re.findall(r"10\.1\.1\.(\d)", case.blocked()))
    case.fact(f"{what} of 1, 2 (deleted), 3 (expired), 4, 5 (new) are blocked", sorted(want), sorted(got))


def wipe(case):
    """Removes all rules and sets, as a reboot does."""
    case.rfw.stop()
    for family, _ in OWN:
        run(family, "-F")
        run(family, "-X")
    run("ipset", "destroy")


FIREWALLS = {
    "docker": docker,
    "ufw": ufw,
    "firewalld-nftables": lambda case: firewalld(case, "nftables"),
    "firewalld-iptables": lambda case: firewalld(case, "iptables"),
    "nftables.service": nftables,
    "netfilter-persistent": persistent,
    "persistent+ipset": persistent,
}


def one(program, packages, firewall, kind, form, alone):
    """Runs a case in its own namespaces, under a process 1 that reaps orphans, because Docker waits for its own to end."""
    inside()
    work = os.fork()
    while work:
        pid, status = os.wait()
        if pid == work:
            sys.exit(os.waitstatus_to_exitcode(status) != 0)
    case = Case(program, packages, firewall, kind, form, alone)
    with logs("commands.log", "dockerd.log", "firewalld.log", "rfw.log"):
        FIREWALLS[firewall](case)
    sys.exit(case.missed > 0)


def main():
    if sys.argv[1:] == ["--send"]:
        send()
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    if "--case" in sys.argv:
        one(*sys.argv[2:])
    if os.getuid():
        sys.exit("needs root")
    program, packages, *words = sys.argv[1:]
    os.environ["RFW_LAB_OUTSIDE"] = os.readlink("/proc/self/ns/net")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for firewall, kind, form in itertools.product(FIREWALLS, ("nft", "legacy"), ("alone", "rules", "sets")):
            names = {firewall, kind, *(["rules", "sets"] if form == "alone" else [form])}
            if names.issuperset(words):
                paths = os.path.abspath(program), os.path.abspath(packages)
                case = firewall, kind, form, folder + "/alone"
                failed |= private([sys.executable, os.path.abspath(__file__), "--case", *paths, *case])
    sys.exit(failed != 0)


main()

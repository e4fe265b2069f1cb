#!/usr/bin/env python3
"""peers.py: rfw, fail2ban, firewalld and CrowdSec's firewall bouncer, measured by packets, in one run.

    tests/peers.py target/release/rfw PACKAGES [WORD...]     only the peers with one of the words in their name

PACKAGES contains Debian's packages, unpacked but not installed (`make peers` does that). Each peer has its own network,
mount and process namespaces, where an overlay puts its files in place. The speeds are measured one peer after another,
the effects of accidents on all peers at once.

A ban is in force when a UDP packet from its address does not reach a socket of this host: the test writes the packet
to a tun device, and the kernel has delivered or dropped it before write(2) returns. Progress goes to standard error,
the result to standard output, as Markdown. Needs root; takes ten minutes.
"""

import concurrent.futures, fcntl, http.client, json, platform, random, re, socket, struct
from lab import *

ME = "192.0.2.2"
MANY, FEW, COMMANDS, CALLS = 10_000, 500, 10, 500
HEAL, LOAD = 30, 300  # seconds: how long the recovery after an accident is observed; how long a list may take
LISTED = [f"30.{i >> 8}.{i & 255}.7" for i in range(MANY)]
KERNEL = re.compile(rb"\b30\.\d+\.\d+\.7\b")
FLUSHES = ["iptables -F", "ipset flush", "nft flush ruleset"]


# --- The truth -------------------------------------------------------------------------------------

class Packets:
    """Tests with real packets whether an address gets in."""

    def __init__(self):
        self.tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.tun, 0x400454CA, struct.pack("16sH", b"tun0", 0x1001))  # TUNSETIFF, IFF_TUN | IFF_NO_PI
        sh(f"ip address add {ME}/24 dev tun0; ip link set tun0 up; ip route add default dev tun0")
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((ME, 9))
        self.socket.setblocking(False)
        self.count = self.last = 0  # the number of packets; when the last one of `await_all` got in
        if not self.gets_in("30.0.0.7"):
            raise RuntimeError("packets do not arrive before any ban")

    def gets_in(self, address):
        self.count += 1
        body = struct.pack("!Q", self.count)
        head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + len(body), 0, 0, 64, 17, 0,
                           socket.inet_aton(address), socket.inet_aton(ME))
        total = sum(struct.unpack("!10H", head))
        total = (total & 0xFFFF) + (total >> 16)
        head = head[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[12:]
        os.write(self.tun, head + struct.pack("!HHHH", 4000, 9, 8 + len(body), 0) + body)
        try:
            while self.socket.recv(64) != body:
                pass
            return True
        except BlockingIOError:
            return False

    def open(self, addresses):
        return [address for address in addresses if self.gets_in(address)]

    def await_all(self, addresses, seconds):
        """Waits until all are in force; -> how many are not. An address that was in force is not tested again."""
        left, limit = random.sample(addresses, len(addresses)), time.monotonic() + seconds
        while left:
            if not self.gets_in(left[-1]):
                left.pop()
                continue
            self.last = time.monotonic()
            if self.last > limit:
                return len(self.open(left))
            time.sleep(0.005)
        return 0


def sh(command, check=True):
    done = subprocess.run(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{command}: {done.stdout[-500:]} {done.stderr[-500:]}")
    return done.stdout


def in_kernel():
    """-> (how many times addresses of the list are in the kernel's tables and sets, how many of them differ)"""
    text = b""
    for command in ["nft", "list", "ruleset"], ["ipset", "save"]:
        text += subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    found = KERNEL.findall(text)
    return len(found), len(set(found))


def settled():
    """The result of `in_kernel`, once it has been stable for a second."""
    before, now = None, in_kernel()
    while before != now:
        time.sleep(1)
        before, now = now, in_kernel()
    return now


def memory(process):
    with open(f"/proc/{process.pid}/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmRSS"))


# --- The peers -------------------------------------------------------------------------------------

class Peer:
    """How to use a peer, according to its manual; contrib/PEERS.md names the settings that differ from Debian's."""
    name, patience = "", 2  # the maximum number of seconds from a response until the ban is in force

    def __init__(self, rfw):
        self.rfw, self.daemon = rfw, None

    def spawn(self, *command):
        log = open(RUN + "/log", "ab")
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def install(self):
        """Writes the configuration."""

    def stop(self):
        self.daemon.terminate()
        self.daemon.wait()

    def memory(self):
        return f"{memory(self.daemon) / 1e6:.1f}"

    def keep(self, path):
        """Does what is also necessary for a list to survive a restart."""


class RfwRules(Peer):
    name, more = "rfw, rules", ""

    def start(self):
        self.server = Rfw(self.rfw, self.more)
        self.daemon = self.server.process

    def command(self, address):
        return [RUN + "/rfwc", "put", f"/drop/input/any/{address}"]

    def install(self):
        os.symlink(os.path.abspath(self.rfw), RUN + "/rfwc")

    def open(self):
        conn = connect()

        def ban(address):
            conn.sendall(request("PUT", f"/drop/input/any/{address}"))
            if b" 200 " not in answer(conn)[:16]:
                raise RuntimeError("rfw refuses")
        return ban

    def many(self, path):
        return [RUN + "/rfwc", "put", "/drop/input/any", "--list", path]


class RfwSets(RfwRules):
    name, more = "rfw, sets", "ipset.path = /usr/sbin/ipset"


class Fail2ban(Peer):
    client, patience = ["/usr/bin/python3", "/usr/bin/fail2ban-client"], 5

    def install(self):
        os.makedirs("/run/fail2ban")
        sh("rm -f /etc/fail2ban/jail.d/*")
        write("service.log", "")
        with open("/etc/fail2ban/filter.d/lab.conf", "w") as f:
            f.write("[Definition]\nfailregex = ^ failed from <ADDR>$\n")
        with open("/etc/fail2ban/jail.local", "w") as f:
            f.write("[DEFAULT]\nbackend = polling\nbantime = 1d\nprotocol = udp\nignoreself = false\n"
                    f"banaction = {self.action}\n[lab]\nenabled = true\nlogpath = {RUN}/service.log\n")

    def start(self):
        self.daemon = self.spawn("/usr/bin/python3", "/usr/bin/fail2ban-server", "-xf", "start")
        await_true("fail2ban runs", 60, lambda: "lab" in sh(" ".join(self.client) + " status", check=False))

    def stop(self):
        sh(" ".join(self.client) + " stop")
        self.daemon.wait()

    def command(self, address):
        return [*self.client, "set", "lab", "banip", address]

    def open(self):
        sys.path.insert(0, "/usr/lib/python3/dist-packages")  # before tests/fail2ban.py
        from fail2ban.client.csocket import CSocket
        conn = CSocket("/run/fail2ban/fail2ban.sock")

        def ban(address):
            if conn.send(["set", "lab", "banip", address])[0] != 0:
                raise RuntimeError("fail2ban refuses")
        return ban

    def many(self, path):
        with open(path) as f:
            return [*self.client, "set", "lab", "banip", *f.read().split()]


class Fail2banIptables(Fail2ban):
    name, action = "fail2ban, iptables", "iptables-allports"


class Fail2banIpset(Fail2ban):
    name, action = "fail2ban, ipset", "iptables-ipset-proto6-allports"


class Fail2banNftables(Fail2ban):
    name, action = "fail2ban, nftables", "nftables-allports"


BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow send_type="method_return"/><allow send_type="error"/>
<allow receive_type="*"/><allow send_type="signal"/><allow send_destination="org.freedesktop.DBus"/></policy>
<includedir>/usr/share/dbus-1/system.d</includedir></busconfig>
"""


class Firewalld(Peer):
    """An ipset as a source of the zone drop, according to `man firewalld.ipset` and the project's documentation."""
    client = ["/usr/bin/python3", "/usr/bin/firewall-cmd", "-q", "--ipset=blocklist"]

    def install(self):
        os.makedirs("/run/dbus")
        self.bus = self.spawn("dbus-daemon", "--nofork", "--config-file", write("bus.conf", BUS))
        await_true("the bus", 10, lambda: os.path.exists("/run/dbus/system_bus_socket"))
        sh(f"sed -i 's/^FirewallBackend=.*/FirewallBackend={self.backend}/' /etc/firewalld/firewalld.conf")
        for words in ["--new-ipset=blocklist --type=hash:ip", "--zone=drop --add-source=ipset:blocklist", "--add-port=9/udp"]:
            sh(f"/usr/bin/python3 /usr/bin/firewall-offline-cmd {words}")

    def start(self):
        self.daemon = self.spawn("/usr/bin/python3", "/usr/sbin/firewalld", "--nofork", "--nopid")
        await_true("firewalld runs", 60, lambda: "running" == sh("/usr/bin/python3 /usr/bin/firewall-cmd --state", check=False).strip())

    def command(self, address):
        return [*self.client, f"--add-entry={address}"]

    def open(self):
        import dbus
        proxy = dbus.SystemBus(private=True).get_object("org.fedoraproject.FirewallD1", "/org/fedoraproject/FirewallD1")
        add = proxy.get_dbus_method("addEntry", "org.fedoraproject.FirewallD1.ipset")
        return lambda address: add("blocklist", address)

    def many(self, path):
        return [*self.client, f"--add-entries-from-file={path}"]

    def keep(self, path):
        sh(" ".join([*self.client, "--permanent", f"--add-entries-from-file={path}"]))


class FirewalldNftables(Firewalld):
    name, backend = "firewalld, nftables", "nftables"


class FirewalldIptables(Firewalld):
    name, backend = "firewalld, iptables", "iptables"


class Crowdsec(Peer):
    """Debian's files with only the local API: no logs are read, and the Central API is not used."""
    api, frequency, mode, patience = "http://127.0.0.1:8080/", "10s", "nftables", 12

    def install(self):
        os.makedirs("/etc/crowdsec/notifications", exist_ok=True)
        sh("sed -i -e '/online_client/,/credentials_path/d' -e '/console_path/d' -e 's/log_media: file/log_media: stdout/' "
           "-e '/^prometheus/,$d' /etc/crowdsec/config.yaml; touch /etc/crowdsec/local_api_credentials.yaml; "
           "echo '{}' >/var/lib/crowdsec/hub/.index.json; "
           f"cscli machines add lab --password lab -f /etc/crowdsec/local_api_credentials.yaml -u {self.api}; cscli bouncers add lab -k key")
        self.server = self.spawn("crowdsec", "-c", "/etc/crowdsec/config.yaml", "-no-cs", "-no-capi")
        await_true("CrowdSec answers", 30, lambda: not subprocess.run(["curl", "-so", "/dev/null", self.api]).returncode)
        with open("/etc/crowdsec/bouncers/crowdsec-firewall-bouncer.yaml") as f:
            text = f.read()
        for old, new in [("${BACKEND}", self.mode), ("${API_KEY}", "key"), ("update_frequency: 10s", f"update_frequency: {self.frequency}"),
                         ("daemonize: true", "daemonize: false"), ("log_mode: file", "log_mode: stdout")]:
            if old not in text:
                raise RuntimeError(f"the shipped bouncer's configuration has no {old}")
            text = text.replace(old, new)
        self.conf = write("bouncer.yaml", text)

    def start(self):
        self.daemon = self.spawn("crowdsec-firewall-bouncer", "-c", self.conf)

    def command(self, address):
        return ["cscli", "decisions", "add", "--ip", address]

    def open(self):
        conn = http.client.HTTPConnection("127.0.0.1", 8080)

        def post(path, body, **fields):
            conn.request("POST", path, json.dumps(body), {"Content-Type": "application/json", "User-Agent": "lab/1", **fields})
            reply = conn.getresponse()
            text = reply.read()
            if reply.status not in (200, 201):
                raise RuntimeError(f"CrowdSec: {text[:200]}")
            return json.loads(text)
        token = post("/v1/watchers/login", {"machine_id": "lab", "password": "lab", "scenarios": []})["token"]

        def ban(address):
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            decision = {"duration": "4h", "origin": "lab", "scenario": "lab", "scope": "Ip", "type": "ban", "value": address}
            post("/v1/alerts", [{"capacity": 0, "decisions": [decision], "events": [], "events_count": 1, "leakspeed": "0", "message": "lab",
                 "scenario": "lab", "scenario_hash": "", "scenario_version": "", "simulated": False, "start_at": now, "stop_at": now,
                 "source": {"scope": "Ip", "value": address, "ip": address}}], Authorization=f"Bearer {token}")
        return ban

    def many(self, path):
        with open(path) as f:
            lines = "".join(f"4h,ip,{address}\n" for address in f.read().split())
        return ["cscli", "decisions", "import", "-i", write("import.csv", "duration,scope,value\n" + lines)]

    def memory(self):
        return f"{memory(self.daemon) / 1e6:.1f} + {memory(self.server) / 1e6:.1f}"


class CrowdsecNftables(Crowdsec):
    name = "CrowdSec, nftables, 10 s"


class CrowdsecQuick(Crowdsec):
    name, frequency, patience = "CrowdSec, nftables, 1 s", "1s", 3


class CrowdsecIptables(CrowdsecQuick):
    name, mode, patience = "CrowdSec, iptables, 1 s", "iptables", 8


PEERS = [Fail2banIptables, Fail2banIpset, Fail2banNftables, FirewalldNftables, FirewalldIptables, CrowdsecNftables, CrowdsecQuick,
         CrowdsecIptables, RfwRules, RfwSets]


# --- What is measured ------------------------------------------------------------------------------

def one_by_one(peer, packets, ban, addresses):
    """-> bans per second until the last is in force; how many were in force when their response arrived"""
    true, begin = 0, time.monotonic()
    for address in addresses:
        ban(address)
        true += not packets.gets_in(address)
    answered = time.monotonic()
    left = packets.await_all(addresses, peer.patience + 30)
    took = time.monotonic() - begin
    return {"rate": len(addresses) / took, "answers": len(addresses) / (answered - begin), "true": true, "lost": left,
            "of": len(addresses), "late": time.monotonic() - answered if true < len(addresses) else 0}


def run(command):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[:5]}: {done.stdout[-300:]} {done.stderr[-300:]}")


def load(peer, packets, addresses):
    """Loads a list with one command; -> seconds until the command ends, and until all are in force; how many are not"""
    command, begin = peer.many(write("list", "\n".join([*addresses, ""]))), time.monotonic()
    run(command)
    answered = time.monotonic() - begin
    true = not packets.open(random.sample(addresses, 20))
    left = packets.await_all(addresses, LOAD)
    return {"answered": answered, "held": answered if true and not left else time.monotonic() - begin, "left": left, "true": true}


def speed(peer, packets):
    peer.start()
    ban, idle = peer.open(), peer.memory()
    single = one_by_one(peer, packets, lambda address: run(peer.command(address)), [f"31.0.{i}.7" for i in range(COMMANDS)])
    calls = one_by_one(peer, packets, ban, [f"32.{i >> 8}.{i & 255}.7" for i in range(CALLS)])
    held = load(peer, packets, LISTED)
    time.sleep(5)  # until rfw has checked the kernel, which takes memory, too
    return {"single": single, "calls": calls, "load": held, "idle": idle, "memory": peer.memory()}


def watch(packets, addresses, action):
    """Observes which packets get in after the start of an action, until all bans are in force again, or for HEAL
    seconds, or 3 if none does.
    -> (seconds from the first packet that gets in to the last; how many still do)"""
    first = last = ended = None
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        worker = pool.submit(action)
        while True:
            now = time.monotonic()
            if packets.open(addresses[::len(addresses) // 20]):
                first, last = first or now, time.monotonic()
            if ended is None and worker.done():
                worker.result()  # raises the worker's exception
                ended = now
            if ended is not None and now > min(max(ended, last + 1) if last else ended + 3, ended + HEAL):
                left = packets.await_all(addresses, ended + HEAL - now)
                return max(last, packets.last) - first if first else 0, left
            time.sleep(0.005)


def ends(peer, packets):
    """Kills the daemon and starts it again; then restarts it as its unit does."""
    few, found = LISTED[:FEW], {}
    peer.start()
    load(peer, packets, few)
    peer.keep(RUN + "/list")
    peer.daemon.kill()
    peer.daemon.wait()
    time.sleep(1)
    found["killed"] = len(packets.open(few))
    found["started"] = watch(packets, few, peer.start), settled()
    found["restart"] = watch(packets, few, lambda: (peer.stop(), peer.start())), settled()
    return found


def flushes(flush):
    def measure(peer, packets):
        few, heals = LISTED[:FEW // 2], []
        peer.start()
        load(peer, packets, few)
        peer.keep(RUN + "/list")
        gap, left = watch(packets, few, lambda: sh(flush))
        if left:
            found = next_ban(peer, packets, few)
            return {**found, "restarted": watch(packets, few, lambda: (peer.stop(), peer.start()))}
        while gap and not left and len(heals) < 3:
            time.sleep(random.random())  # not in step with the peer's own work every second
            heals.append(gap)
            gap, left = watch(packets, few, lambda: sh(flush))
        return {"heals": heals, "left": left}
    return measure


def next_ban(peer, packets, few):
    """After a flush that is not repaired: whether one more ban is reported and in force; how many others are not."""
    try:
        peer.open()("33.0.0.7")
        reported = True
    except Exception as error:  # any exception of the peer's library
        print(f"{peer.name}, the next ban: {str(error).splitlines()[0]}", file=sys.stderr)
        reported = False
    time.sleep(peer.patience)
    return {"reported": reported, "true": not packets.gets_in("33.0.0.7"), "others": len(packets.open(few))}


PHASES = {"speed": speed, "ends": ends, **{flush: flushes(flush) for flush in FLUSHES}}


# --- The table -------------------------------------------------------------------------------------

def times(gap):
    seconds, left = gap
    return f"{left:,} still let in after {HEAL} s" if left else f"let in for {seconds:.1f} s" if seconds else "no gap"


def shown(bans):
    digits = lambda rate: f"{rate:.0f}" if rate >= 20 else f"{rate:.1f}"
    answers = f" ({digits(bans['answers'])} answers)" if bans["answers"] > 1.5 * bans["rate"] else ""
    return digits(bans["rate"]) + answers + (f", {bans['lost']} never" if bans["lost"] else "")


def after_flush(found):
    if "heals" in found and not found["heals"]:
        return "unharmed"
    if "heals" in found:
        return f"heals in {min(found['heals']):.1f} to {max(found['heals']):.1f} s" + (", not always" if found["left"] else "")
    one = "fails" if not found["reported"] else "is in force" if found["true"] else "is reported, not in force"
    others = "" if found["others"] else " and brings all back"
    return f"never; the next ban {one}{others}; a restart {'does not heal' if found['restarted'][1] else 'heals'}"


def doubled(kernel):
    return f", {kernel[0]:,} entries for {kernel[1]:,} addresses" if kernel[0] != kernel[1] else ""


def cells(found):
    speeds, end = found["speed"], found["ends"]
    if speeds:
        single, calls, held = speeds["single"], speeds["calls"], speeds["load"]
        late = max(single["late"], calls["late"])
        true = single["true"] + calls["true"] == single["of"] + calls["of"] and held["true"]
        yield shown(single)
        yield shown(calls)
        yield "yes" if true else f"no: {calls['true']} of {calls['of']}, the last {late:.1f} s later"
        yield f"{held['left']:,} not in {LOAD} s" if held["left"] else f"{held['held']:.2f}" + ("" if held["true"] else f", reported after {held['answered']:.2f}")
        yield f"{speeds['idle']}; {speeds['memory']}"
    else:
        yield from ["failed"] * 5
    if end:
        killed = f"{end['killed']:,} of {FEW:,} let in" if end["killed"] else "all in force"
        yield f"{killed}; started again: {times(end['started'][0])}{doubled(end['started'][1])}"
        yield times(end["restart"][0]) + doubled(end["restart"][1])
    else:
        yield from ["failed"] * 2
    for flush in FLUSHES:
        yield after_flush(found[flush]) if found[flush] else "failed"


def report(found, rfw, packages):
    """Markdown: the machine, the versions, the table."""
    versions = dict(re.findall(r"(?m)^(fail2ban|firewalld|crowdsec|crowdsec-firewall-bouncer|nftables)_([^_]*)_", "\n".join(os.listdir(packages))))
    with open("/proc/cpuinfo") as f:
        model = re.search(r"model name\s*: (.*)", f.read()).group(1)
    tools = sh(rfw + " --version"), sh("iptables -V"), sh("ipset -v").partition(",")[0]
    print(f"Measured on {time.strftime('%Y-%m-%d')}: {os.cpu_count()} x {model}, Linux {platform.release()};",
          ", ".join([*(tool.strip() for tool in tools), *(f"{name} {version}" for name, version in sorted(versions.items()))]) + ".\n")
    heads = ["", "bans/s, a command each", "bans/s, one connection", "in force when reported", f"{MANY:,} in one command, s",
             f"MB at first; with {MANY:,}", "`kill -9`", "restart", *(f"`{flush}`" for flush in FLUSHES)]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for i in found:
        print(f"| {PEERS[i].name} | {' | '.join(cells(found[i]))} |")


# --- The run ---------------------------------------------------------------------------------------

def inner(number, phase, rfw, packages, result):
    """Runs one phase of a peer in its own namespaces."""
    for folder in "usr", "etc", "var":
        layers = f"{RUN}/{folder}", f"{RUN}/{folder}.work"
        for layer in layers:
            os.mkdir(layer)
        sh(f"mount -t overlay peers -o lowerdir={packages}/{folder}:/{folder},upperdir={layers[0]},workdir={layers[1]} /{folder}")
    os.environ.update(PATH="/usr/sbin:/usr/bin:/sbin:/bin", LC_ALL="C", PYTHONNOUSERSITE="1")
    peer, packets = PEERS[number](rfw), Packets()
    try:
        peer.install()
        found = PHASES[phase](peer, packets)
    except Exception:
        subprocess.run(["sh", "-c", f"tail -n 30 {RUN}/log {RUN}/rfw.log /var/log/fail2ban.log >&2"])
        raise
    with open(result, "w") as f:
        json.dump(found, f)


def outer(number, phase, rfw, packages, folder):
    begin, result = time.monotonic(), f"{folder}/{phase} {number}"
    status = private([sys.executable, os.path.abspath(__file__), "--inner", str(number), phase, rfw, packages, result])
    print(f"{PEERS[number].name}: {phase}, {time.monotonic() - begin:.0f} s{f', FAILED ({status})' if status else ''}", file=sys.stderr)
    if status == 0:
        with open(result) as f:
            return json.load(f)


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    if sys.argv[1] == "--inner":
        return inner(int(sys.argv[2]), *sys.argv[3:])
    if os.getuid():
        sys.exit("peers.py mounts and makes a tun device: run it as root")
    rfw, packages = (os.path.abspath(word) for word in sys.argv[1:3])
    wanted = [i for i, peer in enumerate(PEERS) if not sys.argv[3:] or any(word in peer.name for word in sys.argv[3:])]
    if not wanted:
        sys.exit(f"the peers are: {'; '.join(peer.name for peer in PEERS)}")
    # Debian's installation does this; without it, each command would compile its modules again.
    subprocess.run([sys.executable, "-m", "compileall", "-q", packages + "/usr/lib/python3"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        one = lambda i, phase: outer(i, phase, rfw, packages, folder)
        found = {i: {phase: one(i, phase) for phase in ("speed", "ends")} for i in wanted}
        jobs = [(i, flush) for i in wanted for flush in FLUSHES]
        with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
            results = list(pool.map(one, *zip(*jobs)))
        for (i, flush), result in zip(jobs, results):
            healed = result and result.get("heals")
            found[i][flush] = one(i, flush) if healed else result  # measures the recovery time alone
    report(found, rfw, packages)
    sys.exit(any(result is None for row in found.values() for result in row.values()))


main()

#!/usr/bin/env python3
"""argv.py: each path reaches iptables as exactly the arguments that it stands for, or not at all.

    tests/argv.py target/release/rfw [COUNT [SEED]]

Sends COUNT (100,000) random paths and queries, most of them invalid, some with hostile bytes, and
compares every program that rfw starts, argument by argument and line by line of its input, with
`meaning` below: a second, independent description of the REST API. Then COUNT / 100 batches of
eight, and COUNT / 4 requests with sets. Runs in its own namespaces, with the real iptables and ipset
behind stand-ins that record their input. Exit status 1 if any of them differs.
"""

import collections, ipaddress, random, re, sys, time
from lab import *

WHITE = [ipaddress.ip_network(net) for net in ("192.0.2.1", "127.0.0.0/8", "::1")]
HOST = {4: 32, 6: 128}
WIDEST = {4: 9, 6: 17}


# --- What a request means --------------------------------------------------------------------------

class Nothing(Exception):
    """The request changes nothing."""


def need(condition):
    if not condition:
        raise Nothing


def decode(segment):
    """Decodes percent-escapes once."""
    need(not re.search(rb"%(?![0-9A-Fa-f]{2})", segment))
    text = re.sub(rb"%(..)", lambda m: bytes([int(m[1], 16)]), segment)
    need(text.isascii())  # no word of the grammar has other letters
    return text.decode("ascii")


def words(texts, text):
    need(text.lower() in texts and text.isascii())
    return text.upper()


def interface(text):
    """-> its name in iptables; None for every interface."""
    if text == "any":
        return None
    need(text.lower() not in ("any", "all"))
    name = text if text[-1:].isdigit() or text.endswith("+") else text + "+"
    need(re.fullmatch(r"[A-Za-z0-9_@][A-Za-z0-9._@-]*\+?", name) and len(name) <= 15)
    return name


def block(text, mask, may_be_any):
    """-> a canonical network, None for any address."""
    need("%" not in text and "/" not in text)
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        raise Nothing from None
    if ip.version == 6 and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    need(mask is None or str(int(mask)) == mask)
    length = HOST[ip.version] if mask is None else int(mask)
    if int(ip) == 0 and length == HOST[ip.version]:
        need(may_be_any and mask is None)
        return ip.version, None
    need(WIDEST[ip.version] <= length <= HOST[ip.version])
    net = ipaddress.ip_network((ip, length), strict=False)
    need(not any(net.overlaps(white) for white in WHITE if white.version == net.version))
    return ip.version, net


def blocks(segments, may_be_any):
    """Takes an address, and a mask if there is one, from the front."""
    need(segments)
    text = segments.pop(0)
    mask = segments.pop(0) if segments and segments[0].isdigit() else None
    return block(text, mask, may_be_any)


def seconds(text):
    number = re.fullmatch("([0-9]{1,9})([smhd]?)", text)
    need(number)
    result = int(number[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[number[2]]
    need(result <= 3650 * 86400)
    return result


Meaning = collections.namedtuple("Meaning", "put chain target inp out source destination version expire tag")


def meaning(method, target, sets):
    """-> what a request must do; raises Nothing."""
    need(method in ("PUT", "DELETE") and not re.search(rb"[^!-~]", target))
    path, _, query = target.partition(b"?")
    need(not re.search(rb"[\"#<>\\^`{|}\[\]]", target) and path.startswith(b"/"))
    values = {}
    for pair in filter(None, query.split(b"&") if query else []):
        name, _, value = pair.partition(b"=")
        need(name in (b"expire", b"wait", b"tag") and name not in values)
        values[name] = decode(value)
    need(not (query and b"" in query.split(b"&")))
    need(values.get(b"wait", "true") == "true")
    need(method == "PUT" or b"expire" not in values)
    expire = seconds(values[b"expire"]) if b"expire" in values else 0
    tag = values.get(b"tag", "")
    need(b"tag" not in values or re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,19}", tag) or tag == "*" and method == "DELETE")

    segments = [decode(segment) for segment in path.removesuffix(b"/").split(b"/")[1:]]
    need(len(segments) >= 4)
    target, chain = words(("drop", "accept", "reject"), segments[0]), words(("input", "output", "forward"), segments[1])
    first, rest = interface(segments[2]), segments[3:]
    version, net = blocks(rest, chain == "FORWARD")
    inp = out = source = destination = None
    if chain == "INPUT":
        inp, source = first, net
    elif chain == "OUTPUT":
        out, destination = first, net
    else:
        inp, source = first, net
        if rest:
            out = interface(rest.pop(0))
        if rest:
            other, destination = blocks(rest, True)
            need(other == version)
    need(not rest)
    need(source or destination or method == "DELETE")
    if sets and (source is None) != (destination is None):
        need(expire <= 2147483)
    return Meaning(method == "PUT", chain, target, inp, out, source, destination, version, expire, tag and "@" + tag)


def plain(net):
    return str(net.network_address if net.prefixlen == net.max_prefixlen else net)


def rule(m, verb):
    """The arguments of iptables, with COMMENT for the comment."""
    line = [verb, m.chain]
    for option, value in ("-i", m.inp), ("-o", m.out):
        line += [option, value] if value else []
    for option, net in ("-s", m.source), ("-d", m.destination):
        line += [option, plain(net)] if net else []
    return [*line, "-m", "comment", "--comment", "COMMENT", "-j", m.target]


def in_set(m):
    return (m.source is None) != (m.destination is None)


def set_name(m):
    at = {"INPUT": "in:", "OUTPUT": "out:", "FORWARD": "fwd:"}[m.chain]
    ends = [m.inp or "any"] if m.chain == "INPUT" else [m.out or "any"] if m.chain == "OUTPUT" else \
        [m.inp or "any", m.out or "any", "src" if m.source else "dst"]
    name = f"rfw{m.version}:{m.target.lower()}:{at}{':'.join(ends)}{m.tag}"
    return name if len(name) <= 31 and "@" not in name.removesuffix(m.tag) else name.split(at)[0] + at + "~HASH"


# --- What reached the programs ---------------------------------------------------------------------

class Recorder:
    """Stand-ins that record each call that may change something, and run the real program."""

    def __init__(self):
        os.makedirs(RUN + "/bin")
        for name in "iptables", "iptables-restore", "ip6tables", "ip6tables-restore", "ipset":
            real = re.sub(r"(ip6?tables)", r"/usr/sbin/\1-legacy", name).replace("ipset", "/usr/sbin/ipset")
            # rfw runs the tools of both families at once. So each call has its own files, and only when
            # they are complete does its line, a single short write in any shell, tell `take` of them.
            os.chmod(write("bin/" + name, f"""#!/bin/sh
case " $* " in *" -S "*|*" list "*|*" save "*|*" -V "*|*" --version "*|*" -L "*) exec {real} "$@";; esac
printf '%s\\0' {name} "$@" >{RUN}/call.$$
case "{name} $*" in *restore*)
/bin/cat >{RUN}/input.$$
exec <{RUN}/input.$$
esac
echo $$ >>{RUN}/calls
exec {real} "$@"
"""), 0o755)
        self.file = open(write("calls", ""))

    def take(self):
        """-> the calls since then: [(program, arguments, lines of input)]."""
        calls = []
        for pid in self.file.read().split():
            name, *args = self.content("call." + pid).split("\0")[:-1]
            calls.append((name, args, self.content("input." + pid).splitlines()))
        return calls

    @staticmethod
    def content(name):
        """The content of a file, which is then removed; "" if there is none."""
        path = f"{RUN}/{name}"
        if not os.path.exists(path):
            return ""
        with open(path, encoding="latin-1", newline="") as f:
            text = f.read()
        os.unlink(path)
        return text


def changes(calls):
    """The single changes among them: (program, words), whether by argument or by input."""
    for name, args, lines in calls:
        if name == "ipset" and args[-1] != "restore":
            if args[:1] != ["-exist"]:
                yield name, ["not -exist:", *args]
            yield name, args[1:]
        elif name == "ipset":
            yield from ((name, line.split(" ")) for line in lines)
        elif name.endswith("-restore"):
            if args != ["--noflush", "-w", "5"] or lines[:1] != ["*filter"] or lines[-1:] != ["COMMIT"]:
                yield name, ["not a restore:", *args, *lines]
            yield from ((name.removesuffix("-restore"), line.split(" ")) for line in lines[1:-1])
        else:
            if args[:2] != ["-w", "5"]:
                yield name, ["not -w 5:", *args]
            yield name, args[2:]


def uncomment(words_, m, since):
    """Replaces rfw's comment by COMMENT, if it is right for a request made since then."""
    out = list(words_)
    for i, word in enumerate(out):
        if i and out[i - 1] == "--comment" and m:
            timed = re.fullmatch(r"rfw:(\d+)" + re.escape(m.tag), word)
            if not m.expire and word == "rfw" + m.tag or m.expire and timed and since - 1 <= int(timed[1]) - m.expire <= time.time() + 2:
                out[i] = "COMMENT"
    return out


# --- Requests --------------------------------------------------------------------------------------

FACES = ["any", "eth0", "ppp", "ppp+", "wlan0.12", "all+", "br-lan", "eth0@if3", "a" * 14 + "1", "a" * 14, "a" * 15, "x_1", "any+",
         "Any", "all", "ALL", "-i", "--jump", ".1", "eth0/", "", "+", "eth 0", "lo;id", "$(id)", "`id`", "eth0\n-j", "0", "veth@9"]
TAGS = ["feed", "feed", "0", "a.b_c-d", "a-tag-of-20-letters.", "a-tag-of-21-letters..", "Feed", "-a", ".a", "*", "", "rfw", "guard", "a@b", "a%20b"]
MASKS = ["/8", "/9", "/16", "/24", "/31", "/32", "/33", "/64", "/128", "/129", "/0", "/16/16", "/024", "/-1", "/+24", "/a", "/"]
EVIL = [b"%00", b"%0a", b"%0d%0a", b"%20", b" ", b"\t", b"\0", b"\r\n", b"\n", b"%2f", b"%2F", b"%252f", b"..", b"./", b"//", b"/",
        b"%", b"%2", b"%zz", b";", b"|", b"&", b"$(reboot)", b"`reboot`", b"'", b'"', b"\\", b"<", b">", b"#", b"?", b"=", b"!",
        b"-j", b"--", b" -j ACCEPT ", b"%20-j%20ACCEPT", b"%2d", b"-", b"+", b"*", b"%e9", b"\xe9", b"%c3%a9", b"\xff", b"%ff",
        b"%u0031", b"%31", b"%30", b"0", b"0x", b"00", b"1", b"9" * 30, b":", b"::", b"[", b"]", b"@", b"~", b"%7f", b"\x7f",
        b"COMMIT", b"%0aCOMMIT%0a", b"%0a-F%0a", b"-A", b"-F", b"any", b"e", b"m", b"expire=1", b"wait=true", b"%26", b"%3f"]


class Requests:
    def __init__(self, seed):
        self.random = random.Random(seed)

    def some(self, pool):
        return self.random.choice(pool)

    def address(self):
        r, n = self.random, self.random.randrange
        four = lambda: f"{n(256)}.{n(256)}.{n(256)}.{n(256)}"
        six = lambda: str(ipaddress.IPv6Address(r.getrandbits(128) >> n(60) << n(60)  & (1 << 128) - 1))
        exploded = lambda: ipaddress.IPv6Address(r.getrandbits(128)).exploded.upper()
        odd = ["0.0.0.0", "::", "::1", "127.0.0.1", "192.0.2.1", "192.0.2.0", "::ffff:1.2.3.4", "::ffff:102:304", "::1.2.3.4", "1.2.3",
               "01.2.3.4", "1.2.3.4.5", "256.1.1.1", "1::2::3", "12345::", "fe80::1%25eth0", "0x7f.1.1.1", "2001:db8::/32", "::ffff:0:0"]
        return self.some([four, four, four, six, exploded, lambda: self.some(odd)])()

    def mask(self, address):
        if self.random.random() < 0.6:
            return ""
        return self.some(MASKS) if self.random.random() < 0.4 else f"/{self.random.randrange(9, 33 if '.' in address else 129)}"

    def case(self, word):
        return self.some([word, word, word.upper(), word.capitalize(), "".join(self.some([c, c.upper()]) for c in word)])

    def face(self):
        return self.some(FACES[:11]) if self.random.random() < 0.9 else self.some(FACES)

    def one(self):
        """-> method and target."""
        chance = self.random.random
        chain = self.some(["input", "output", "forward"])
        address = self.address()
        path = f"/{self.case(self.some(['drop', 'accept', 'reject']))}/{self.case(chain)}/{self.face()}/{address}{self.mask(address)}"
        if chain == "forward" and chance() < 0.6 or chance() < 0.02:
            path += "/" + self.face()
            if chance() < 0.6:
                address = self.address()
                path += "/" + address + self.mask(address)
        path += "/" if chance() < 0.05 else ""
        if chance() < 0.3:
            number = self.some(["0", "60", "3600", "90s", "10m", "25h", "1d", "24d", "25d", "315360000", "315360001", "3650d", "3651d", "999999999d", "1000000000", "", "-1", "1w", "1.5h", "+1", "1h2m", "7%64"])
            path += self.some(["?expire=", "?expire=", "?expire=", "?wait=true&expire=", "?Expire=", "?x=1&expire="]) + number
            path += self.some(["", "", "", "", "&wait=true", "&wait=no", "&expire=5", "&modify=insert", "&"])
        if chance() < 0.3:
            path += ("&" if "?" in path else "?") + "tag=" + self.some(TAGS)
        target = path.encode()
        if chance() < 0.1:  # the same, written with escapes: it means the same
            at = self.random.randrange(1, len(target))
            target = target[:at] + b"%%%02x" % target[at] + target[at + 1:]
        while chance() < 0.25:
            at, evil = self.random.randrange(1, len(target) + 1), self.some(EVIL)
            target = self.some([target[:at] + evil + target[at:], target[:at] + evil + target[at + 1:],
                                target[:at] + target[at + 1:], target[:at] + bytes([self.random.randrange(256)]) + target[at:]])
        method = self.some(["PUT"] * 12 + ["DELETE", "GET", "POST", "put", "PATCH"])
        return method, target


# --- The run ---------------------------------------------------------------------------------------

class Wire:
    """One connection, opened again whenever rfw closes it."""

    def __init__(self):
        self.conn = connect()

    def ask(self, method, target):
        """-> the status; None if rfw closed the connection."""
        self.send(method, target)
        return self.status()

    def send(self, method, target):
        try:
            self.conn.sendall(b"%b %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % (method.encode(), target))
        except OSError:
            pass

    def status(self):
        try:
            said = answer(self.conn)
        except OSError:
            said = b""
        if not said or b"\r\nConnection: close" in said:
            self.conn.close()
            self.conn = connect()
        return int(said[9:12]) if said else None


def expected(m, sets, first):
    """The changes that a request must make, as sorted texts."""
    program = "ip6tables" if m.version == 6 else "iptables"
    if not (sets and in_set(m)):
        return [" ".join([program, *rule(m, "-I" if first else "-D")])]
    name, net = set_name(m), plain(m.source or m.destination)
    return [" ".join(["ipset", "add" if first else "del", name, net, *(["timeout", str(m.expire)] if first else [])])]


FRAME = (  # what sets are made, looked at and taken away with
    r"ipset create rfw[46]:\S+ hash:net family inet6? hashsize 1024 maxelem 1048576 timeout 0 counters|ipset (destroy|flush) rfw[46]:\S+"
    r"|ip6?tables -[ID] (INPUT|OUTPUT|FORWARD)( \d+)?( -i \S+)?( -o \S+)? -m set --match-set rfw[46]:\S+ (src|dst)"
    r" -m comment --comment (COMMENT|rfw(@\S+)?) -j (DROP|ACCEPT|REJECT)")
# Empty sets go at any moment, once there are many.
GONE = rf"(?!ipset (create|flush)|\S+ -I)({FRAME})"


def reached(recorder, m, sets, since):
    """The changes that were made, as texts."""
    made = [" ".join([name, *uncomment(words_, m, since)]) for name, words_ in changes(recorder.take())]
    made = [line for line in made if not (sets and re.fullmatch(GONE, line))]
    if not sets or not m:
        return made
    made = [re.sub(r":~[0-9a-f]{14}", ":~HASH", line) for line in made]
    # An expiry is rounded up, and so is the time until then.
    made = [re.sub(f" timeout {m.expire + 1}$", f" timeout {m.expire}", line) if m.expire else line for line in made]
    if not in_set(m):  # behind the rules of sets
        return [re.sub(r"^(\S+ -I [A-Z]+) \d+", r"\1", line) for line in made]
    # An address is removed from the sets of the other targets with the same chain and interfaces.
    rivals = [f"ipset del {set_name(m._replace(target=target))} {plain(m.source or m.destination)}"
              for target in ("DROP", "ACCEPT", "REJECT") if m.put and target != m.target]
    return [line for line in made if not re.fullmatch(FRAME, line) and line not in rivals]


def round_(wire, recorder, requests, sets, count):
    """-> how many requests had to change something."""
    wrong = meant = 0
    for _ in range(count):
        method, target = requests.one()
        try:
            m = meaning(method, target, sets)
        except Nothing:
            m = None
        since = time.time()
        status = wire.ask(method, target)
        made = reached(recorder, m, sets, since)
        want = expected(m, sets, True) if m and m.put else []
        if made != want or (status == 200) != (m is not None or (method == "GET" and status == 200)):
            wrong += 1
            print(f"{method} {target!r} -> {status}\n    reached {made}\n    meant   {want}", flush=True)
        if m and m.put:
            meant += 1
            status = wire.ask("DELETE", target.partition(b"?")[0] + m.tag.replace("@", "?tag=").encode())
            made, want = reached(recorder, m._replace(put=False), sets, since), expected(m, sets, False)
            if made != want or status != 200:
                wrong += 1
                print(f"DELETE {target!r} -> {status}\n    reached {made}\n    meant   {want}", flush=True)
        if wrong > 20:
            break
    return wrong, meant


def batches(requests, recorder, count):
    """Eight at a time, which rfw commits together, by iptables-restore: -> how many differed."""
    wires, wrong = [Wire() for _ in range(8)], 0
    for _ in range(count):
        todo = []
        while len(todo) < len(wires):
            method, target = requests.one()
            try:
                m = meaning("PUT", target, False)._replace(expire=3600, tag="")  # one comment for all
            except Nothing:
                continue
            todo.append((m, target.partition(b"?")[0] + b"?expire=3600"))
            rules = {tuple(rule(m, "")) + (m.version,) for m, _ in todo}
            if len(rules) < len(todo):  # no rule twice
                todo.pop()
        for method in "PUT", "DELETE":
            since = time.time()
            for wire, (_, target) in zip(wires, todo):
                wire.send(method, target if method == "PUT" else target.partition(b"?")[0])
            statuses = [wire.status() for wire in wires]
            made = reached(recorder, todo[0][0], False, since)
            want = [line for m, _ in todo for line in expected(m, False, method == "PUT")]
            if sorted(made) != sorted(want) or set(statuses) != {200}:
                wrong += 1
                print(f"{method} {[target for _, target in todo]} -> {statuses}\n    reached {made}\n    meant   {want}", flush=True)
    return wrong


def main(program, count=100000, seed=None):
    inside()
    seed = int(seed) if seed else random.randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    requests, recorder, wrong = Requests(seed), Recorder(), 0
    have_ipset = os.path.exists("/usr/sbin/ipset")
    for sets in [False, True][:1 + have_ipset]:
        rfw = Rfw(program, f"ipset.path = {RUN}/bin/ipset\n" if sets else "", RUN + "/bin/iptables")
        recorder.take()
        begin, part = time.monotonic(), int(count) // (4 if sets else 1)
        bad, meant = round_(Wire(), recorder, requests, sets, part)
        wrong += bad
        print(f"{part} requests with {'sets' if sets else 'rules'}: {meant} were to insert something, "
              f"{bad} did another thing; {time.monotonic() - begin:.0f} s", flush=True)
        if not sets:
            wrong += batches(requests, recorder, part // 100)
            print(f"{part // 100} batches of eight", flush=True)
        rfw.stop()
    if not have_ipset:
        print("SKIPPED: tests/argv.py with sets (no ipset)", flush=True)
    return 1 if wrong else 0


if len(sys.argv) < 2:
    sys.exit(__doc__)
sys.exit(main(os.path.abspath(sys.argv[1]), *sys.argv[2:]))

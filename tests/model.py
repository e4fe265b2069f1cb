"""model.py: what rfw has promised, and what the kernel, GET /list and the state file say of it.

For tests/chaos.py. An independent description, written from rfw's manual only.
"""

import collections, difflib, ipaddress, os, re, shlex, subprocess, time

CHAINS, TARGETS = ["INPUT", "FORWARD", "OUTPUT"], ["ACCEPT", "REJECT", "DROP"]


class Failure(Exception):
    """The contract is broken: what differs."""


# --- A rule in its four forms: path, iptables -S, GET /list, state file ----------------------------

Key = collections.namedtuple("Key", "chain target inp out src dst tag", defaults=[""])  # None: any
TAGS = ["", "a", "feed.1"]
ABSENT = "absent"  # the state of a rule, if not its expiry: None, or (earliest, latest)


def version(key):
    return 6 if ":" in (key.src or key.dst) else 4


def chain_of(key):
    return version(key), key.chain


def in_set(key):
    return (key.src is None) != (key.dst is None)


def plain(text):
    """-> a block as `1.2.3.4` or `1.2.3.0/24`; None for any address."""
    net = ipaddress.ip_network(text)
    return None if net.prefixlen == 0 else str(net.network_address if net.prefixlen == net.max_prefixlen else net)


def interface(name):
    return None if name == "any" else name if name[-1] in "0123456789+" else name + "+"


def key_of_path(path, tag=None):
    """-> the key of a path; that of the state file has the tag at its end."""
    if tag is None:
        path, _, tag = path.partition("@")
    target, chain, first, *rest = path.strip("/").split("/")

    def address():
        if not rest:
            return None
        text = rest.pop(0)
        if rest and rest[0].isdigit():
            return plain(f"{text}/{rest.pop(0)}")
        return None if text in ("0.0.0.0", "::") else plain(text)

    one, second = address(), interface(rest.pop(0)) if rest else None
    two, chain, target = address(), chain.upper(), target.upper()
    if chain == "OUTPUT":
        return Key(chain, target, None, interface(first), None, one, tag)
    return Key(chain, target, interface(first), second, one, two, tag)


def path_of(key):
    any_ip, inp, out = "0.0.0.0" if version(key) == 4 else "::", key.inp or "any", key.out or "any"
    ends = {"INPUT": [inp, key.src], "OUTPUT": [out, key.dst], "FORWARD": [inp, key.src or any_ip]}[key.chain]
    if key.chain == "FORWARD" and (key.out or key.dst):
        ends += [out] + ([key.dst] if key.dst else [])
    return "/".join(["", key.target.lower(), key.chain.lower(), *ends]) + ("@" + key.tag if key.tag else "")


OPTIONS = {*"-s -d -i -o -j -m -p --dport --sport --comment --reject-with --match-set".split()}


def options_of(line):
    """-> the options of a rule that has rfw's comment and form; None for any other."""
    words, found = shlex.split(line)[2:], {}
    while words:
        word = words.pop(0)
        if word not in OPTIONS:
            return None
        found[word] = words.pop(0)
        if word == "--match-set":
            found["side"] = words.pop(0)
    comment = found.get("--comment", "")
    guard, rule = comment == "rfw:guard", re.fullmatch(r"rfw(:\d+)?(@[a-z0-9._-]+)?", comment) and "-p" not in found
    return found if guard or rule else None


def is_foreign(line):
    return line.startswith("-A") and options_of(line) is None


def set_name(key):
    """-> the name that the manual gives to the set of a rule."""
    side = "src" if key.src else "dst"
    parts = {"INPUT": ["in", key.inp], "OUTPUT": ["out", key.out], "FORWARD": ["fwd", key.inp, key.out, side]}
    name = f"rfw{version(key)}:{key.target.lower()}:" + ":".join(part or "any" for part in parts[key.chain])
    name += "@" + key.tag if key.tag else ""
    return name if len(name) <= 31 else ":".join(name.split(":")[:3]) + ":~"


def rows_of_list(listed):
    """-> what GET /list says, row by row."""
    for row in listed:
        faces = (None if row[end] == "*" else row[end] for end in ("inp", "out"))
        key = Key(row["chain"], row["target"], *faces, plain(row["source"]), plain(row["destination"]), row["tag"] or "")
        yield Row(version(key), row["chain"], int(row["num"]), key, row["expires"])


def read_state(text, now):
    """-> the rules that a state file names and that have not expired, oldest first: [(key, expiry)]."""
    header, *lines = text.splitlines() or [""]
    if not re.fullmatch("rfw state [12]", header) or not text.endswith("\n"):
        raise Failure(f"the state file is not whole: {text[:20]!r}... {text[-80:]!r}")
    found = {}
    for line in lines:
        sign, *words = line.split(" ")
        if sign in "+-":
            key = key_of_path(words[-1])
            found.pop(key, None)
            if sign == "+":
                found[key] = int(words[0]) or None
    return [(key, expires) for key, expires in found.items() if expires is None or expires > now]


class Change(collections.namedtuple("Change", "method path expire body tag replace")):
    """`tag` may be * in a DELETE: any tag; `replace`: exactly the list. A DELETE of /list deletes all
    rules of a tag."""

    def url(self):
        query = {"expire": self.expire, "tag": self.tag, "replace": "true" if self.replace else ""}
        return self.path + "?" + "&".join(f"{name}={value}" for name, value in query.items() if value)


def keys_of(change):
    """-> the rules that a request names."""
    if change.path == "/list":
        return []
    if change.tag == "*":
        return [key for tag in TAGS for key in keys_of(change._replace(tag=tag))]
    if change.body is None:
        return [key_of_path(change.path, change.tag)]
    keys = []
    for line in change.body.split("\n")[:-1]:
        first, _, last = line.partition("#")[0].strip().partition("-")
        ends = [ipaddress.ip_address(end) for end in (first, last) if last]
        nets = ipaddress.summarize_address_range(*ends) if ends else [first]
        keys += [key_of_path(f"{change.path}/{net}", change.tag) for net in nets]
    return list(dict.fromkeys(keys))


def is_gone(change, key):
    """Whether a request deletes a rule that it does not name."""
    if change.path == "/list":
        return key.tag == change.tag
    like = key_of_path(change.path + "/192.0.2.9", change.tag) if change.replace else None
    return like is not None and in_set(key) and (key.src is None) == (like.src is None) and (
        key._replace(src=like.src, dst=like.dst) == like)


# --- What the kernel holds -------------------------------------------------------------------------

Row = collections.namedtuple("Row", "version chain num key expires")
View = collections.namedtuple("View", "rows guards foreign sets unused first wrong")


def run(*words, input=None, check=True):
    """-> standard output; retries if another program changed the same table meanwhile."""
    for _ in range(5):
        done = subprocess.run(words, capture_output=True, text=True, input=input)
        if done.returncode != 4:
            break
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
    return done.stdout if done.returncode == 0 else None


class Kernel:
    """The tables of one variant of iptables, and the sets."""

    def __init__(self, variant):
        self.variant = variant

    def tool(self, version, *words, restore="", **more):
        name = f"/usr/sbin/{'ip6tables' if version == 6 else 'iptables'}-{self.variant}{restore}"
        return run(name, *words, **more) if restore == "-save" else run(name, "-w", *words, **more)

    def ipset(self, *words, check=True):
        return run("/usr/sbin/ipset", *words, check=check) if os.path.exists("/usr/sbin/ipset") else ""

    def rules(self, version):
        return self.tool(version, "-S").splitlines()

    def foreign(self, version):
        return [line for line in self.rules(version) if not line.startswith("-A") or options_of(line) is None]

    def sets(self):
        """-> {name: {entry: seconds left, 0 if permanent}} of rfw's sets."""
        sets = {}
        for words in map(str.split, self.ipset("save").splitlines()):
            if words[1].startswith("rfw") and words[0] == "create":
                sets[words[1]] = {}
            elif words[1].startswith("rfw"):
                left = words[words.index("timeout") + 1] if "timeout" in words else 0  # a set that others made
                sets[words[1]][plain(words[2].partition(",")[0])] = int(left)
        return sets

    def view(self, with_sets):
        """The rules of rfw and of others, the position of the first foreign rule in its chain, and every
        rule without the required form or position."""
        view, now, used, borrowed = View([], {}, {4: [], 6: []}, self.sets(), [], {}, []), time.time(), set(), set()
        for v in 4, 6:
            position, last = collections.Counter(), {}
            for line in self.rules(v):
                chain = line.split(" ")[1]
                found = options_of(line) if line.startswith("-A") else None
                position[chain] += line.startswith("-A")
                rank = self.take(view, v, chain, position[chain], found, line, now, with_sets, used) if found else 9
                if not found:
                    view.foreign[v].append(line)
                    if line.startswith("-A"):
                        view.first.setdefault((v, chain), position[chain])
                        borrowed.update(re.findall(r"--match-set (\S+)", line))
                if line.startswith("-A"):
                    if rank < last.get(chain, (0, ""))[0]:
                        view.wrong.append(f"IPv{v}: out of place: {line}\n      behind        {last[chain][1]}")
                    last[chain] = rank, line
        view.unused.extend(view.sets.keys() - used - borrowed)
        return view

    def take(self, view, v, chain, num, found, line, now, with_sets, used):
        """Adds the meaning of a rule of rfw; -> its rank in its chain."""
        if found["--comment"] == "rfw:guard":
            port = found.get("--dport" if chain == "INPUT" else "--sport")
            address = found.get("-s" if chain == "INPUT" else "-d")
            view.guards.setdefault((v, chain), []).append((address and plain(address), port, found["-j"]))
            return 0
        ends = [plain(found[o]) if o in found else None for o in ("-s", "-d")]
        tag = found["--comment"].partition("@")[2]
        key = Key(chain, found["-j"], found.get("-i"), found.get("-o"), *ends, tag)
        name = found.get("--match-set")
        if name is None:
            time_ = re.match(r"rfw:(\d+)", found["--comment"])
            view.rows.append(Row(v, chain, num, key, int(time_[1]) if time_ else None))
            if with_sets and in_set(key):
                view.wrong.append(f"a rule that should be in a set: {line}")
            return 4
        if name in used:
            view.wrong.append(f"a second rule of the same set: {line}")
        used.add(name)
        for entry, left in view.sets.get(name, {}).items():
            member = key._replace(**{found["side"]: entry})
            view.rows.append(Row(v, chain, num, member, round(now + left) if left else None))
            if not name.startswith(set_name(member)):
                view.wrong.append(f"{path_of(member)} is in {name}")
        if not with_sets:
            view.wrong.append(f"a set, although there is no ipset.path: {line}")
        return 1 + TARGETS.index(key.target)


# --- The model -------------------------------------------------------------------------------------

class Entry:
    """A rule of the model. It is one of `options`; only a kill leaves more than one.

    Its age is between the stamps `since` and `until`. The last PUT was sent at `sent` and answered
    at `answered`: no rule that it overlaps may come before it, unless put later."""

    def __init__(self, options, since=0, until=0, sent=0, answered=0):
        self.options, self.since, self.until, self.sent, self.answered = options, since, until, sent, answered


def overlaps(a, b):
    """Whether a packet can match both, with different targets."""
    def nets(x, y):
        return x is None or y is None or ipaddress.ip_network(x).overlaps(ipaddress.ip_network(y))

    def faces(x, y):
        prefix = lambda a, b: a.endswith("+") and b.startswith(a[:-1])
        return x is None or y is None or x == y or prefix(x, y) or prefix(y, x)
    return (a.chain == b.chain and version(a) == version(b) and a.target != b.target and nets(a.src, b.src)
            and nets(a.dst, b.dst) and faces(a.inp, b.inp) and faces(a.out, b.out))


class Model:
    """What rfw has promised.

    `doubts` is what rules may be instead if rfw is killed before it has repaired what happened to
    the kernel: without a state file, the kernel is all that the next rfw knows."""

    def __init__(self):
        self.entries, self.doubts, self.groups, self.stamp, self.disordered = {}, {}, [], 0, False

    def tick(self):
        self.stamp += 1
        return self.stamp

    def options(self, key):
        return self.entries[key].options if key in self.entries else [ABSENT]

    def certain(self):
        return all(len(entry.options) == 1 for entry in self.entries.values())

    def keys(self):
        return [key for key, entry in self.entries.items() if entry.options != [ABSENT]]

    def doubt(self, keys, option=ABSENT):
        for key in keys:
            self.doubts.setdefault(key, []).append(option)

    def done(self, effects, sent, result, with_sets):
        """A request was answered with 200."""
        now = self.tick()
        for key, option in effects.items():
            old = self.entries.get(key)
            self.doubts.pop(key, None)
            if option == ABSENT:
                self.entries.pop(key, None)
                continue
            fresh = old is None or old.options == [ABSENT]
            since = old.since if not fresh and result in ("exists", "applied") else sent
            until = old.until if not fresh and result == "exists" else now
            if since < sent and with_sets and in_set(key):
                sent = old.sent  # between sets the order does not decide
            self.entries[key] = Entry([option], since, until, sent, now)

    def refused(self, effects):
        """A request was answered with an error: nothing changes, but the kernel may hold it for a while."""
        for key, option in effects.items():
            self.doubt([key], option)
            self.disordered = True

    def unanswered(self, effects, sent, whole):
        """rfw was killed; `whole`: all of it has happened, or nothing."""
        if whole:
            self.groups.append({key: (self.options(key), [option]) for key, option in effects.items()})
        for key, option in effects.items():
            old = self.entries.get(key) or Entry([ABSENT], sent)
            self.entries[key] = Entry(old.options + [option], old.since, self.stamp + 1, old.sent, self.stamp + 1)
        self.tick()

    def killed(self, has_file):
        if not has_file:
            for key, options in self.doubts.items():
                entry = self.entries.setdefault(key, Entry([ABSENT]))
                entry.options = entry.options + options
            if self.disordered:
                self.forget_order(self.entries)
        self.settled()

    def forget_order(self, keys):
        for key in keys:
            entry = self.entries[key]
            self.entries[key] = Entry(entry.options, 0, self.stamp, 0, self.stamp)

    def lost(self, keys, surely):
        """What only the kernel knew is lost, or may be."""
        for key in keys:
            entry = self.entries[key]
            entry.options = [ABSENT] if surely else entry.options + [ABSENT]

    def settled(self):
        self.doubts, self.disordered = {}, False

    def to_sets(self):
        """Of the same address with different targets, the newest is kept."""
        for key in self.keys():
            rivals = [key._replace(target=target) for target in TARGETS if target != key.target]
            newer = [r for r in rivals if r in self.entries and self.entries[r].options != [ABSENT]
                     and self.entries[r].since > self.entries[key].until]
            unsure = [r for r in rivals if r in self.entries and self.entries[r].until >= self.entries[key].since]
            if in_set(key) and newer and any(ABSENT not in self.entries[r].options for r in newer):
                self.entries[key].options = [ABSENT]
            elif in_set(key) and unsure:
                self.entries[key].options = self.entries[key].options + [ABSENT]

    def agrees(self, key, option, found, now, drift):
        """Whether what is `found` is this option, at a time between the two of `now`."""
        drift = drift if in_set(key) else 0
        if found == ABSENT or option == ABSENT or option is None or found is None:
            due = option not in (ABSENT, None) and option[0] - drift <= now[1]
            return found == option or found == ABSENT and due
        return option[0] - drift <= found <= option[1] + drift

    def differences(self, found, now, drift):
        """`found`: [(key, expiry)]; -> lines of a diff against the model."""
        want, have = [], []
        times = dict(found)
        for key in {**self.entries, **times}:
            state, options = times.get(key, ABSENT), self.options(key)
            if any(self.agrees(key, option, state, now, drift) for option in options):
                continue
            want += [f"{path_of(key)} {' or '.join(map(str, options))}"] if options != [ABSENT] else []
            have += [f"{path_of(key)} {state}"] if state != ABSENT else []
        count = collections.Counter(key for key, _ in found)
        have += [f"{path_of(key)} {n} TIMES" for key, n in count.items() if n > 1]
        for group in self.groups:
            if not any(all(any(self.agrees(key, o, times.get(key, ABSENT), now, drift) for o in sides[side])
                           for key, sides in group.items()) for side in (0, 1)):
                part = ", ".join(f"{path_of(key)} {times.get(key, ABSENT)}" for key in group)
                have.append(f"a part of an unanswered request: {part}")
        return [line for line in difflib.ndiff(sorted(want), sorted(set(have))) if line[0] in "+-"]

    def misordered(self, keys):
        """`keys`: newest first, as the kernel holds them; -> sentences."""
        wrong, chains = [], {}
        for second in keys:
            older = chains.setdefault(chain_of(second), [])
            b = self.entries.get(second)
            for first, a in older if b else []:
                if b.since > a.until or b.sent > a.answered and overlaps(first, second):
                    wrong.append(f"{path_of(first)} comes before the newer {path_of(second)}")
            older += [(second, b)] if b else []
        return wrong

    def resolve(self, found, drift, widen):
        """What was found is now what is expected. `widen`: a time was rounded once more, permanently."""
        times = dict(found)
        for key, entry in list(self.entries.items()):
            state = times.get(key, ABSENT)
            if state == ABSENT:
                del self.entries[key]
                continue
            option = next(option for option in entry.options if self.agrees(key, option, state, (0, 0), drift))
            if option and widen:
                option = min(option[0], state), max(option[1], state)
            entry.options = [option if drift and in_set(key) or not option else (state, state)]
        self.groups = []
        self.settled()

    def expiring(self):
        """-> the latest expiry within a minute; 0 if there is none."""
        times = [o[1] for entry in self.entries.values() for o in entry.options if o not in (ABSENT, None)]
        return max([t for t in times if t < time.time() + 60], default=0)


def diff(a, b):
    return "\n".join(line for line in difflib.unified_diff(a, b, "expected", "found", lineterm="", n=1))

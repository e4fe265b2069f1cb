#!/usr/bin/env python3
"""chaos.py: whatever happens to rfw, its tools and its rules, the kernel matches the responses.

    tests/chaos.py target/release/rfw [COUNT [SEED]] [--without CLASS,CLASS] [--only CLASS,CLASS]
                   [--from ROUND] [--keep-going]

COUNT (200) rounds of random requests, kills, restarts, flushes, foreign rules and faults, against a
model of what must hold. Each round ends with a comparison: the kernel, GET /list, the state file
and the model are equal, no rule occurs twice, rfw's rules come first, and the rules of others are
unchanged. The rounds go through {nft, legacy} x {rules, sets} x {without, with a state file}, two
for each: a new rfw, and the same one continued. SEED decides what a round does; --from repeats a
round of a failed run. CLASSES below are what --without and --only name. In namespaces of its own,
with the real iptables and ipset behind scripts that fail on demand. Exit status 1 if a round fails.
"""

import argparse, collections, contextlib, http.client, itertools, json, os, random, re, shlex, subprocess, sys, threading, time
import traceback
from faults import *
from lab import *
from model import *

CLASSES = {
    "list": "lists in a body",
    "tag": "many sources: tags, lists that replace, DELETE whatever the tag or of a whole tag",
    "expire": "rules that expire within seconds",
    "load": "concurrent requests",
    "outward": "the outward server, with its guard rules",
    "kill": "kill -9, and a restart",
    "switch": "a restart with ipset.path switched on or off",
    "flush": "others flush chains or delete rules of rfw",
    "now": "what is answered with 200 is enforced at once, whatever happened to the kernel before",
    "copy": "others add a rule of rfw a second time",
    "reload": "others load an old save of the tables",
    "sets": "others flush or destroy sets, or delete an entry",
    "foreign": "others add rules behind rfw's, and delete them",
    "front": "others insert rules in front of or between rfw's",
    "twice": "tools that do their work twice",
    "order": "restores that insert in another order",
    "swap": "others swap sets of rfw",
    "timeout": "others add entries to sets, with timeouts of their own, or change those of rfw's",
    "kind": "others replace a set by one of another kind",
    "comment": "others change the comment of a rule of rfw",
    "double": "others load a save of the tables on top of them",
    "policy": "others change policies, and chains with names of sets",
    "user": "a foreign rule uses a set of rfw",
    "fail": "tools that fail before they do anything",
    "commit": "tools that do their work, then fail or die",
    "half": "tools that die after a part of their input",
    "unread": "listings that fail, or that show at once that they are incomplete",
    "lie": "incomplete listings that look complete, each followed by a true one",
    "hang": "tools that hang: 10 s each",
    "start": "faults while rfw starts",
    "disk": "the disk of the state file is full",
}
SLACK = 4  # seconds that a busy machine may add
RECOVERY = 45  # seconds until all is repaired, once nothing fails any more; all addresses in sets are compared every 30 s
ANSWER = 75  # seconds until a request is answered, whatever hangs
LONG = 3600  # an expiry beyond the end of any round
FRONT_MOST = 8  # rfw fights for the first position ten times in ten minutes, then once a minute
WHITE = {4: ["127.0.0.0/8", "192.0.2.1"], 6: ["::1"]}


# --- Requests --------------------------------------------------------------------------------------

PLACES = [  # what follows the target in a path; T is the number of a client
    "input/any/10.T.0.1", "input/any/10.T.0.2", "input/any/10.T.0.0/24", "input/any/10.T.0.2/31",
    "input/eth0/10.T.0.1", "input/eth0/10.T.0.0/24", "input/ppp/10.T.0.2",
    "input/any/2001:db8:T::1", "input/any/2001:db8:T::/48", "input/any/2001:db8:T::/64", "input/eth0/2001:db8:T::1",
    "output/any/10.T.0.1", "output/any/10.T.0.0/24", "output/any/2001:db8:T::/48", "output/eth1/2001:db8:T::1",
    "forward/any/10.T.0.1", "forward/any/2001:db8:T::/48", "forward/eth0/10.T.0.1/eth1",
    "forward/abcdefghijklmn7/10.T.0.1/abcdefghijklmn8", "forward/any/0.0.0.0/eth1/10.T.0.9",
    "forward/any/10.T.0.1/any/10.T.1.9", "forward/any/10.T.0.0/24/any/10.T.1.0/24",
    "forward/eth0/2001:db8:T::1/any/2001:db8:T:1::/64", "forward/eth0/2001:db8:T::1/any/2001:db8:T:1::/80",
]
LIST_PLACES = ["input/any", "input/eth0", "output/any", "forward/any"]
LIST_LINES = ["10.T.0.1", "10.T.0.2 # a comment", "10.T.0.0/24", "10.T.2.0-10.T.2.3", "2001:db8:T::1", "2001:db8:T::/48"]
REFUSED = [
    ("PUT", "/drop/input/any/192.0.2.1", "", 409), ("DELETE", "/drop/input/any/::1", "", 409),
    ("PUT", "/drop/input/any/10.0.0.0/8", "", 400), ("PUT", "/drop/input/any/10.0.0.1?expire=x", "", 400),
    ("PUT", "/drop/input/any", "10.0.0.1\n10.0.0.300\n", 400),
]


def some_change(r, classes, client=0, size=12):
    put, target = r.random() < 0.7, r.choice(["drop", "drop", "accept", "reject"])
    expire = r.choice([0, 0, 0, LONG, 2 * LONG, 24 * LONG]) if put else 0
    if put and "expire" in classes and r.random() < 0.15:
        expire = r.randrange(2, 5)
    tag, replace = r.choice(TAGS) if "tag" in classes else "", False
    if tag and not put and r.random() < 0.3:
        tag = "*"
    # Requests that affect rules beyond those that they name are for a single client.
    alone = tag not in ("", "*") and client == 0
    if alone and not put and r.random() < 0.1:
        return Change("DELETE", "/list", 0, None, tag, False)
    if "list" not in classes or r.random() < 0.7:
        path, body = r.choice(PLACES), None
    else:
        hosts = [f"10.{client}.3.{r.randrange(40)}" for _ in range(r.randrange(size))]
        hosts += [f"2001:db8:{client}:3::{r.randrange(20):x}" for _ in range(r.randrange(size))]
        lines = hosts + r.sample(LIST_LINES, r.randrange(1, 5))
        path, body = r.choice(LIST_PLACES), "".join(line.replace("T", str(client)) + "\n" for line in lines)
        replace = alone and put and r.random() < 0.5
    path = f"/{target}/{path.replace('T', str(client))}"
    return Change("PUT" if put else "DELETE", path, expire, body, tag, replace)


# --- A round ---------------------------------------------------------------------------------------

Mode = collections.namedtuple("Mode", "variant sets file")
FOREIGN = [
    "-s 198.51.100.{n} -j DROP", "-p tcp -m tcp --dport {n} -j ACCEPT", "-i docker{n} -j HERS",
    "-s 10.0.0.0/16 -m comment --comment hers{n} -j ACCEPT",
    "-p udp -m udp --dport {n} -m comment --comment rfw -j DROP",  # rfw could not have made it
]


class Round:
    """rfw and the kernel, what is expected of them, and everything done to them."""

    def __init__(self, options, tools, mode):
        self.program, self.classes, self.tools, self.mode = options.program, options.classes, tools, mode
        self.kernel, self.model, self.lock = Kernel(mode.variant), Model(), threading.Lock()
        self.log, self.begin, self.rfw, self.sets = [], time.monotonic(), None, mode.sets
        self.faulty = self.damaged = self.full = False  # since all was equal
        self.failed = False  # since rfw was started
        self.front = self.serial = self.slowest = 0
        self.saved, self.outward = {}, False
        self.copied = []  # since all was equal
        self.drift = 0  # seconds by which an expiry may be rounded: sets know what is left

    def note(self, *words):
        self.log.append(f"{time.monotonic() - self.begin:8.3f} {' '.join(map(str, words))}")

    def play(self, r, fresh):
        """A number of random operations, then the comparison."""
        self.r = r
        self.timed = self.classes if r.random() < 0.2 else self.classes - {"expire"}
        if fresh:
            self.clean()
            self.outward = "outward" in self.classes and r.random() < 0.3
        if fresh or self.sets != self.mode.sets:
            self.restart("ipset.path as configured" if self.rfw else "start", sets=self.mode.sets)
        weights = [weight if self.may(needs) else 0 for _, weight, needs in STEPS]
        for step, *_ in r.choices(STEPS, weights, k=r.randrange(10, 41)):
            step(self)
        self.settle("the end of the round")
        self.await_look()
        self.settle("after a check by rfw")

    def may(self, needs):
        has = self.classes - ({"sets"} if not self.mode.sets else set()) - ({"disk"} if not self.mode.file else set())
        return has.issuperset(needs)

    def clean(self):
        """As after a boot, except for the rules of others."""
        self.stop()
        run("/bin/sh", "-c", f"rm -f {RUN}/disk/* {RUN}/rfw.log")
        for variant in "nft", "legacy":
            kernel = Kernel(variant)
            for v in 4, 6:
                kernel.tool(v, "-F")
                kernel.tool(v, "-X")
                for chain in CHAINS:
                    kernel.tool(v, "-P", chain, "ACCEPT")
        self.kernel.ipset("destroy")
        for v in 4, 6:
            self.kernel.tool(v, "-N", "HERS")
            self.kernel.tool(v, "-A", "HERS", "-j", "RETURN")
            self.kernel.tool(v, "-A", "INPUT", "-p", "icmp", "-j", "ACCEPT")
            self.kernel.tool(v, "-A", "FORWARD", "-m", "comment", "--comment", "hers", "-j", "HERS")
        self.foreign = {v: self.kernel.foreign(v) for v in (4, 6)}

    # Requests

    def effects(self, change, since, until):
        """-> what a change makes of each rule: {key: ABSENT or its expiry}."""
        keys = keys_of(change)
        effects = {key: ABSENT for key in self.model.entries if is_gone(change, key)}
        if change.method == "DELETE":
            return {**effects, **dict.fromkeys(keys, ABSENT)}
        for key in keys:
            if self.sets and in_set(key):  # it moves out of the sets of the other targets
                effects.update({key._replace(target=target): ABSENT for target in TARGETS})
        times = (int(since) + change.expire, int(until) + change.expire + 1) if change.expire else None
        return {**effects, **dict.fromkeys(keys, times)}

    def ask(self, method, path, body=None):
        """-> status and result; None if there is no response."""
        conn = http.client.HTTPConnection("127.0.0.1", LOCAL, timeout=ANSWER)
        try:
            conn.request(method, path, body)
            with conn.getresponse() as said:
                return said.status, json.load(said)
        except TimeoutError:
            raise Failure(f"{method} {path}: no answer within {ANSWER} s") from None
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            return None  # closed before all of it was there
        finally:
            conn.close()

    def change(self, change, killed=lambda: False):
        with self.lock:
            calm, sent, since = self.calm(), self.model.tick(), time.time()
            before = {key: self.model.options(key) for key in self.effects(change, 0, 0)}
        said = self.ask(change.method, change.url(), change.body)
        with self.lock:
            effects = self.effects(change, since, time.time())
            status, answer_ = said or (None, {})
            words = answer_.get("result") or answer_.get("message", "")
            lines = (change.body or "").splitlines()
            self.note(change.method, change.url(), "->", status, words, lines or "")
            if status == 200:
                self.check_answer(change, answer_, effects, before if calm else {})
                self.model.done(effects, sent, answer_["result"], self.sets)
            elif status is None and killed():
                self.model.unanswered(effects, sent, self.mode.file)
            elif status == 507 and self.full or status in (500, 503) and self.faulty:
                self.model.refused(effects)
            else:
                raise Failure(f"{change.method} {change.path}: {said}, although nothing fails")
        return status, answer_.get("result")

    def check_answer(self, change, answer_, effects, before):
        """Whether a 200 reports what happened, as far as that is known."""
        result = answer_["result"]
        keys = keys_of(change)
        if change.body is None and change.method == "PUT":
            expires, want = answer_["expires"], effects[keys[0]]
            if (expires is None) != (want is None) or want and not want[0] - 1 <= expires <= want[1] + 1:
                raise Failure(f"PUT {change.path}: expires {expires}, not {want}")
            effects[keys[0]] = expires and (expires, expires)
        times = [option for key in before for option in before.get(key, []) if option not in (ABSENT, None)]
        if not before or change.tag == "*" or any(earliest < time.time() + 60 for earliest, _ in times):
            return
        new = sum(before[key] == [ABSENT] for key in keys)
        found = {"inserted": result == "inserted", "absent": result == "absent"} if change.body is None else answer_
        if found.get("inserted" if change.method == "PUT" else "absent") != new:
            raise Failure(f"{change.method} {change.path}: {answer_}, but {new} of {len(keys)} were not there")

    def calm(self):
        return not (self.faulty or self.damaged or self.full) and self.model.certain()

    def single(self):
        """One change; if the response is 200, the kernel has it now."""
        change, calm = some_change(self.r, self.timed), self.calm()
        status, result = self.change(change)
        if change.method == "DELETE" and not calm:
            return  # others may have added it a moment ago, also a second time: the next check removes it
        if status != 200 or change.expire and change.expire < 60 or not calm and "now" not in self.classes:
            return
        for _ in range(2):  # iptables-nft may list wrongly while rfw changes other rules
            view = self.kernel.view(self.sets)
            rows = {row.key: row for row in view.rows}
            wrong = [key for key in keys_of(change) if (key in rows) != (change.method == "PUT")]
            what = "not so in the kernel"
            if not wrong and result == "exists" and "front" in self.classes:
                wrong = [key for key in keys_of(change) if rows[key].num > view.first.get(chain_of(key), rows[key].num)]
                what = "behind a rule of others"
            if not wrong:
                return
        raise Failure(f"{change.method} answered with 200 {result}, but {what}: " + ", ".join(map(path_of, wrong)))

    def refused(self):
        method, path, body, status = self.r.choice(REFUSED)
        said = self.ask(method, path, body or None)
        self.note(method, path, "->", said and said[0])
        if not said or said[0] != status:
            raise Failure(f"{method} {path}: {said}, not {status}")

    def list(self):
        calm = self.calm() and not self.model.expiring()
        said = self.ask("GET", "/list")
        self.note("GET /list ->", said and said[0])
        if not said or said[0] != 200 and not (self.faulty and said[0] in (500, 503)):
            raise Failure(f"GET /list: {said}")
        wrong = calm and said[0] == 200 and self.compare_list(said[1], self.kernel.view(self.sets), [time.time()] * 2)
        if wrong:
            raise Failure("\n".join(wrong))

    def load(self, kill=False):
        """Concurrent clients, each with its own addresses; perhaps with a kill meanwhile."""
        stop, errors, seeds = threading.Event(), [], [self.r.random() for _ in range(self.r.randrange(2, 9))]

        def client(number, seed):
            r = random.Random(seed)
            try:
                for _ in range(200 if kill else r.randrange(2, 8)):
                    if stop.is_set() or self.change(some_change(r, self.timed, number, 6), stop.is_set)[0] is None:
                        return
            except Exception as error:
                errors.append(error)
        self.note(f"{len(seeds)} clients at once", "until a kill" if kill else "")
        clients = [threading.Thread(target=client, args=[n + 1, seed], daemon=True) for n, seed in enumerate(seeds)]
        for thread in clients:
            thread.start()
        if kill:
            time.sleep(self.r.random() * 0.15)  # the random moment
            stop.set()
            self.rfw.kill()
        for thread in clients:
            thread.join(2 * ANSWER)
        if errors or any(thread.is_alive() for thread in clients):
            raise errors[0] if errors else Failure("a client waits for an answer")

    # rfw

    def stop(self):
        """kill -9; waits for the programs that it has started."""
        if self.rfw:
            self.rfw.kill()
            self.rfw.wait()
        self.rfw = None
        await_true("the programs that rfw left behind end", 20, lambda: self.tools.end_hung() or not children())

    def launch(self):
        lines = "ipset.path = " + RUN + "/bin/ipset\n" if self.sets else ""
        lines += "state.file = disk/state\n" if self.mode.file else ""
        lines += OUTWARD_CONF if self.outward else ""
        fixed = f"local.server\nwhitelist.file = white.list\niptables.path = {RUN}/bin/iptables\n"
        words = [self.program, "-f", write("rfw.conf", f"[config]\n{fixed}{lines}"), "--logfile", RUN + "/rfw.log"]
        with open(RUN + "/stderr", "w") as stderr:
            self.rfw = subprocess.Popen(words, stderr=stderr, preexec_fn=die_with_parent)

    def start(self):
        """Failing tools may prevent rfw from starting; then it is started again."""
        self.failed, self.front = self.faulty, 0
        for last in [False] * 3 + [True]:
            if last:
                self.lift()
            self.launch()
            await_true("rfw answers or ends", 60, lambda: self.answers() or self.rfw.poll() is not None)
            if self.rfw.poll() is None:
                return
            if last or not (self.faulty or self.full):
                with open(RUN + "/stderr") as f:
                    raise Failure(f"rfw does not start: {f.read()}")
            self.note("it does not start, which it may while tools fail")

    def answers(self):
        with contextlib.suppress(OSError):
            return exchange(connect(timeout=ANSWER), request("GET", "/"))

    def restart(self, why="restart", sets=None, load=False):
        """kill -9, another rfw, and the comparison, after which nothing is in doubt."""
        if load:
            self.load(kill=True)
        self.stop()
        self.doubt_rows(self.copied)  # a DELETE before the next check by rfw leaves the copy to the next rfw
        self.model.killed(self.mode.file)
        self.note(f"rfw is killed: {why}")
        if not self.mode.file and self.sets:
            self.model.forget_order(self.model.entries)
        if "flush" in self.classes and why == "restart" and self.r.random() < 0.3:
            self.damage_while_down()
        rounded = not self.mode.file and (self.sets or bool(sets))  # a set knows the seconds that are left
        self.drift = 4 if rounded else 2 if self.sets or sets else 0
        if sets is not None and sets != self.sets:
            self.switch_to(sets)
        if "start" not in self.classes:
            self.lift()
        elif self.r.random() < 0.4:
            self.fault(wait=False)
        if "kill" in self.classes and self.r.random() < 0.2:
            self.note("killed again at start")
            self.launch()
            time.sleep(self.r.random() * 0.1)
            self.stop()
        self.tools.lift("hang")  # a start waits for a minute
        self.start()
        self.settle("the start", restarted=True)

    def switch_to(self, sets):
        self.note("sets on" if sets else "sets off")
        self.sets = sets
        if sets:
            self.model.to_sets()

    def damage_while_down(self):
        """With a state file, none of it may last."""
        boot = self.r.random() < 0.5
        self.note("while it is down:", "a reboot" if boot else "iptables -F, ip6tables -F")
        for v in 4, 6:
            self.kernel.tool(v, "-F")
            self.foreign[v] = [line for line in self.foreign[v] if not line.startswith("-A")]
        if boot:
            for name in self.kernel.sets():
                self.kernel.ipset("destroy", name)
        if not self.mode.file:
            self.model.lost([key for key in self.model.entries], surely=boot or not self.sets)

    def kill(self):
        self.restart(load="load" in self.classes and self.r.random() < 0.6)

    def switch(self):
        self.restart("ipset.path switched", sets=not self.sets)

    # What others do

    def flush(self):
        v, chain = self.r.choice([4, 6]), self.r.choice([*CHAINS, None])
        self.note(f"IPv{v}: iptables -F", chain or "")
        self.kernel.tool(v, "-F", *([chain] if chain else []))
        self.foreign[v] = [line for line in self.foreign[v] if not line.startswith(f"-A {chain}" if chain else "-A")]
        self.damage([key for key in self.model.entries if version(key) == v and chain in (key.chain, None)])

    def damage(self, keys):
        self.damaged = True
        self.model.doubt(keys)

    def ours(self, v):
        return [line for line in self.kernel.rules(v) if line.startswith("-A") and options_of(line)]

    def own_sets(self, v):
        return {name: entries for name, entries in self.kernel.sets().items() if name.startswith(f"rfw{v}:")}

    def remove(self):
        """Deletes a rule of rfw, as another program would."""
        v = self.r.choice([4, 6])
        lines = self.ours(v)
        if lines:
            line = self.r.choice(lines)
            self.note(f"IPv{v}: deleted by another program: {line}")
            self.kernel.tool(v, "-D", *shlex.split(line)[1:], check=False)
            self.damage([key for key in self.model.entries if version(key) == v])
            self.model.disordered = True  # rfw inserts after a number of rules, and one of them may be this

    def copy(self):
        v = self.r.choice([4, 6])
        lines = self.ours(v)
        if lines:
            line = self.r.choice(lines)
            self.note(f"IPv{v}: a second time: {line}")
            self.kernel.tool(v, *shlex.split(line), check=False)
            self.damaged = True
            rows = [row for row in self.kernel.view(self.sets).rows if not (self.sets and in_set(row.key))]
            count = collections.Counter(row.key for row in rows)
            self.copied += [row for row in rows if count[row.key] > 1]

    def save(self):
        v = self.r.choice([4, 6])
        self.note(f"IPv{v}: iptables-save")
        text, view = self.kernel.tool(v, "-t", "filter", restore="-save"), self.kernel.view(self.sets)
        if list(filter(is_foreign, text.splitlines())) == list(filter(is_foreign, self.foreign[v])):
            self.saved[v] = text, list(self.foreign[v]), [row for row in view.rows if row.version == v]

    def reload(self):
        if not self.saved or self.front >= FRONT_MOST:
            return
        v = self.r.choice(list(self.saved))
        text, foreign, rows = self.saved[v]
        loaded = self.kernel.tool(v, restore="-restore", input=text, check=False) is not None
        self.note(f"IPv{v}: iptables-restore of an old save", "" if loaded else "fails")
        if loaded:
            self.foreign[v] = list(foreign)
            self.front += 1
            self.damage([key for key in self.model.entries if version(key) == v])
            self.model.disordered = True
            self.doubt_rows(rows)

    def doubt_rows(self, rows):
        """The kernel may hold these rules until the next check by rfw, whatever is answered meanwhile."""
        for row in rows:
            self.model.doubt([row.key], row.expires and (row.expires, row.expires))

    def disturb_sets(self):
        names = [name for name in self.kernel.sets()]
        if not names:
            return
        name, what = self.r.choice(names), self.r.choice(["flush", "flush all", "destroy", "destroy all", "entry"])
        self.note(f"others: {what} {name}")
        if what == "flush":
            self.kernel.ipset("flush", name)
        elif what == "flush all":
            self.kernel.ipset("flush")
        elif what == "entry":
            entries = list(self.kernel.sets().get(name, {}))
            if entries:
                self.kernel.ipset("del", name, self.r.choice(entries), check=False)
        else:
            for v in 4, 6:
                for line in self.ours(v):
                    if f"--match-set {name} " in line or what == "destroy all" and "--match-set" in line:
                        self.kernel.tool(v, "-D", *shlex.split(line)[1:], check=False)
            self.model.disordered = True
            for doomed in names if what == "destroy all" else [name]:
                self.kernel.ipset("destroy", doomed, check=False)  # rfw may have been faster
        self.damage([key for key in self.model.entries if in_set(key)])

    def add_foreign(self, where="end"):
        """A foreign rule: at the front, in the middle, or at the end."""
        if where != "end" and self.front >= FRONT_MOST:
            return
        self.front += where != "end"
        v, chain = self.r.choice([4, 6]), self.r.choice(CHAINS)
        self.serial += 1
        text = self.r.choice(FOREIGN).format(n=self.serial)
        if v == 6:
            text = text.replace("198.51.100.", "2001:db8:f::").replace("10.0.0.0/16", "2001:db8::/32")
        used = list(self.own_sets(v))
        if "user" in self.classes and used and self.r.random() < 0.2:
            text = f"-m set --match-set {self.r.choice(used)} src -m comment --comment hers{self.serial} -j RETURN"
        if chain == "OUTPUT":
            text = text.replace("-i ", "-o ")
        length = sum(line.startswith(f"-A {chain} ") for line in self.kernel.rules(v))
        at = {"front": 1, "middle": self.r.randrange(1, length + 2), "end": None}[where]
        self.note(f"IPv{v}: others: -{'I' if at else 'A'} {chain} {at or ''} {text}")
        command = ["-I", chain, str(at)] if at else ["-A", chain]
        if self.kernel.tool(v, *command, *text.split(" "), check=False) is not None:
            self.adopt(v, chain, where)

    def adopt(self, v, chain, where):
        """The new rule is where it was inserted among the foreign rules."""
        before = self.foreign[v]
        for _ in range(3):  # iptables-nft may list wrongly while rfw changes other rules
            after = self.kernel.foreign(v)
            new = [line for line in after if line not in before]
            if len(new) == 1 and [line for line in after if line not in new] == before:
                break
        else:
            raise Failure("rules of others changed:\n" + diff(before, after))
        mine = [line for line in after if line.startswith(f"-A {chain} ")]
        if where != "middle" and mine.index(new[0]) != (0 if where == "front" else len(mine) - 1):
            raise Failure(f"a rule that was put at the {where} is not there:\n" + "\n".join(mine))
        self.foreign[v] = after
        self.damaged |= where != "end"

    def insert_foreign(self):
        self.add_foreign(self.r.choice(["front", "front", "middle"]))

    def delete_foreign(self):
        v = self.r.choice([4, 6])
        lines = [line for line in self.foreign[v] if line.startswith("-A") and not line.startswith("-A HERS")]
        if lines:
            line = self.r.choice(lines)
            self.note(f"IPv{v}: others delete {line}")
            self.kernel.tool(v, "-D", *shlex.split(line)[1:])
            self.foreign[v].remove(line)

    # What others do, each followed by requests and a repair

    def disturb(self, what):
        self.settle("before " + what)
        if self.front >= FRONT_MOST:
            return
        self.front += 1
        self.damaged = True
        getattr(self, "do_" + what)(self.r.choice([4, 6]))
        for _ in range(self.r.randrange(3)):
            self.single()
        self.settle("after " + what)

    def do_swap(self, v):
        names = list(self.own_sets(v))
        if len(names) > 1:
            pair = self.r.sample(names, 2)
            self.note("others: swap", *pair)
            self.kernel.ipset("swap", *pair)

    def do_timeout(self, v):
        names = list(self.own_sets(v))
        for _ in range(self.r.randrange(1, 4) if names else 0):
            name = self.r.choice(names)
            entries = list(self.kernel.sets().get(name, {})) + ["10.7.7.7" if v == 4 else "2001:db8:77::7"]
            words = [name, self.r.choice(entries), "timeout", str(self.r.choice([0, 1, 2, 5, 4000]))]
            words += ["nomatch"] if self.r.random() < 0.2 else []
            self.note("others: add", *words)
            self.kernel.ipset("-exist", "add", *words)

    def do_kind(self, v):
        sets = self.own_sets(v)
        if not sets:
            return
        name, family = self.r.choice(list(sets)), {4: "inet", 6: "inet6"}[v]
        kind = self.r.choice([
            "hash:net timeout 0", "hash:net counters", "hash:net timeout 0 counters maxelem 4", "hash:net timeout 0 counters skbinfo",
            "hash:net timeout 0 counters comment", "hash:net timeout 5 counters", "hash:ip timeout 0 counters",
            "hash:ip timeout 0 counters netmask 24", "hash:net,iface timeout 0 counters", "hash:net timeout 0 counters forceadd",
            "hash:net timeout 0 counters maxelem 65536 bucketsize 2", "hash:net timeout 0 counters comment skbinfo maxelem 65536"])
        how = self.r.choice(["swap", "swap", "remake", "early"])
        self.note("others:", how, name, kind)
        create = [*kind.split()[:1], "family", family, *kind.split()[1:]]
        if how == "swap":
            self.kernel.ipset("create", "other", *create)
            if self.r.random() < 0.5 and "net,iface" not in kind:
                for entry in list(sets[name])[:4]:
                    more = ["comment", "x timeout 7 nomatch"] if "comment" in kind else []
                    more += ["packets", "3", "bytes", "7"] if "counters" in kind else []
                    self.kernel.ipset("add", "other", entry, *more, check=False)
            self.kernel.ipset("swap", "other", name, check=False)
            self.kernel.ipset("destroy", "other")
        else:
            rows = [line for line in self.ours(v) if f"--match-set {name} " in line]
            for line in rows:
                self.kernel.tool(v, "-D", *shlex.split(line)[1:], check=False)
            self.kernel.ipset("destroy", name, check=False)
            self.kernel.ipset("create", name, *create, check=False)
            for line in rows if how == "early" else []:
                self.kernel.tool(v, "-I", *shlex.split(line)[1:], check=False)

    def do_comment(self, v):
        lines = [line for line in self.ours(v) if "--match-set" not in line]  # its name contains the tag
        if not lines:
            return
        line = self.r.choice(lines)
        chain = line.split(" ")[1]
        numbers = [other for other in self.kernel.rules(v) if other.startswith(f"-A {chain} ")]
        if line not in numbers:
            return
        comment = self.r.choice(["rfw", "rfw@a", "rfw@zzz", "rfw:1", "rfw:0", "rfw:18446744073709551615", f"rfw:{int(time.time()) + 5000}@feed.1", "rfw:guard", "rfw:9@a"])
        changed = re.sub(r"--comment \S+", "--comment " + comment, line)
        self.note("others: ", chain, numbers.index(line) + 1, changed)
        if options_of(changed) and ("guard" in comment) == ("-p tcp" in line):
            self.kernel.tool(v, "-R", chain, str(numbers.index(line) + 1), *shlex.split(changed)[2:], check=False)

    def do_double(self, v):
        self.note(f"IPv{v}: others: iptables-save | iptables-restore --noflush")
        text = self.kernel.tool(v, "-t", "filter", restore="-save")
        before = self.foreign[v]
        if self.kernel.tool(v, "--noflush", restore="-restore", input=text, check=False) is None:
            self.note("it fails")
            return
        rules = [line for line in before if line.startswith("-A")]
        chains = list(dict.fromkeys(line.split(" ")[1] for line in rules))
        again = [line for line in before if not line.startswith("-A")]
        # To load a chain that is not built in empties it first.
        for chain in chains:
            mine = [line for line in rules if line.split(" ")[1] == chain]
            again += mine * (1 if chain not in CHAINS else 2)
        self.foreign[v] = again

    def do_policy(self, v):
        chain, policy = self.r.choice(["FORWARD", "OUTPUT"] if v == 6 else ["FORWARD"]), self.r.choice(["ACCEPT", "DROP"])
        self.note(f"IPv{v}: others: -P {chain} {policy}")
        self.kernel.tool(v, "-P", chain, policy)
        name = f"rfw{v}:drop:in:any"
        if f"-N {name}" not in self.foreign[v]:
            self.kernel.tool(v, "-N", name)
            self.kernel.tool(v, "-A", name, "-m", "comment", "--comment", "hers", "-j", "RETURN")
        else:
            self.kernel.tool(v, "-F", name)
            self.kernel.tool(v, "-X", name)
        self.foreign[v] = self.kernel.foreign(v)

    # Faults

    def fault(self, wait=True):
        kinds = [kind for kind in FAULT if kind in self.classes and (kind != "hang" or wait and self.r.random() < 0.08)]
        for _ in range(self.r.randrange(1, 4)):
            if not kinds:
                return
            kind = self.r.choice(kinds)
            fault = self.r.choice(FAULT[kind])
            program, k = self.r.choice(fault.programs), self.r.randrange(1, 10)
            always = fault.repeatable and self.r.random() < 0.3
            self.note(f"{program} will, {'from here on' if always else 'once'}: {fault.script.replace('K', str(k))}")
            path = self.tools.add(kind, fault, program, k, always)
            self.faulty = self.failed = True
            if wait and fault.kind == "read" and not always and self.r.random() < 0.5:
                deadline = time.monotonic() + 1.5  # rfw lists when it answers GET /list and, by itself, once a second
                while os.path.exists(path) and time.monotonic() < deadline:
                    time.sleep(0.02)

    def lift(self):
        if self.faulty or self.full:
            self.note("nothing fails any more")
        self.tools.lift()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(RUN + "/disk/full")

    def fill(self):
        """The state file's disk has no free page: a long list cannot be written, but perhaps a line."""
        self.note("the disk is full")
        self.full = True
        with contextlib.suppress(OSError), open(RUN + "/disk/full", "wb", 0) as f:
            while True:
                f.write(bytes(4096))
        long = Change("PUT", "/drop/input/any", 0, "".join(f"10.9.{n // 200}.{n % 200}\n" for n in range(300)), "", False)
        if self.change(long)[0] == 200:
            raise Failure("a list of 300 lines is answered with 200 on a full disk")

    def pause(self):
        time.sleep(self.r.random() * 0.7)

    # The comparison

    def settle(self, what="settle", restarted=False):
        """Ends all faults and waits for rfw to repair everything; then all must be equal, once nothing is about to expire."""
        self.lift()
        begin, recovered, took = time.monotonic(), None, 0
        while True:
            wrong, lingering = self.compare()
            if wrong and time.monotonic() > begin + RECOVERY:
                raise Failure(f"{what}: not repaired within {RECOVERY} s\n" + "\n".join(wrong))
            if not wrong:
                if recovered is None:
                    recovered, took = time.time(), time.monotonic() - begin
                for key, expires in lingering:
                    if time.time() > max(expires, recovered) + 2 + SLACK:
                        raise Failure(f"{what}: expired at {expires}, but still there: {path_of(key)}")
                if not lingering and (restarted or time.time() > self.model.expiring()):
                    break
            time.sleep(0.05)
        self.slowest = max(self.slowest, took)
        self.model.resolve(self.found, self.drift, restarted and self.drift > 2)
        self.drift = 2 if self.sets else 0
        self.faulty = self.damaged = self.full = False
        self.copied = []
        self.note(f"all is equal: {what}, {len(self.found)} rules, {took:.2f} s")

    def compare(self):
        """-> what is wrong, and what has expired but is still there."""
        if self.rfw.poll() is not None:
            raise Failure(f"rfw ended: {self.rfw.returncode}")
        begin = time.time()
        view = self.kernel.view(self.sets)
        now = begin, time.time()
        self.found = [(row.key, row.expires) for row in view.rows]
        wrong = self.differences("the kernel", self.found, now) + view.wrong + self.wrong_guards(view)
        wrong += self.model.misordered([row.key for row in view.rows if not (self.sets and in_set(row.key))])
        if not self.failed:  # what could not be destroyed may stay until the next start: without a rule it does nothing
            wrong += [f"a set without a rule: {name} {list(view.sets[name])}" for name in view.unused]
        for v in 4, 6:
            if view.foreign[v] != self.foreign[v]:
                wrong.append(f"rules of others, IPv{v}:\n" + diff(self.foreign[v], view.foreign[v]))
        said = self.ask("GET", "/list")
        if not said or said[0] != 200:
            wrong.append(f"GET /list: {said}")
        elif not wrong:
            wrong += self.compare_list(said[1], view, now)
        if self.mode.file and not wrong:
            wrong += self.compare_file(now[0])
        return wrong, [(key, expires) for key, expires in self.found if expires and expires < now[0]]

    def differences(self, where, found, now):
        lines = self.model.differences(found, now, self.drift)
        return [f"{where} (+) and the model (-):", *lines] if lines else []

    def wrong_guards(self, view):
        port, wrong = str(OUTWARD), []
        for v, chain in itertools.product((4, 6), CHAINS):
            guarded = self.outward and chain != "FORWARD"
            want = [*((net, port, "ACCEPT") for net in WHITE[v]), (None, port, "DROP")] if guarded else []
            found = view.guards.get((v, chain), [])
            if sorted(map(str, found)) != sorted(map(str, want)) or found[-1:] != want[-1:]:
                wrong.append(f"guards of IPv{v} {chain}: {found}, not {want}")
        return wrong

    def compare_list(self, said, view, now):
        rows = list(rows_of_list(said))
        order = [(row.version, CHAINS.index(row.chain), row.num) for row in rows]
        if order != sorted(order):
            return ["GET /list is not in kernel order"]
        here, there = (sorted(str(row._replace(expires=None)) for row in some) for some in (view.rows, rows))
        if here != there:
            return ["GET /list, where the kernel is expected:\n" + diff(here, there)]
        return self.differences("GET /list", [(row.key, row.expires) for row in rows], now)

    def compare_file(self, now):
        with open(RUN + "/disk/state") as f:
            kept = read_state(f.read(), now)
        wrong = self.model.misordered([key for key, _ in reversed(kept)])
        return self.differences("the state file", kept, (now, now)) + ["in the state file, " + line for line in wrong]

    def await_look(self):
        """Waits until rfw has read the kernel once more."""
        seen = len(self.tools.calls())
        looks = lambda: sum("-S" in call for call in self.tools.calls()[seen:])
        await_true("rfw looks at the kernel", RECOVERY, lambda: looks() >= 2)  # one for each family


STEPS = [  # operation, weight, classes that it needs
    (Round.single, 40, []), (Round.load, 5, ["load"]), (Round.list, 6, []), (Round.refused, 3, []),
    (Round.pause, 4, []), (Round.settle, 2, []), (Round.kill, 3, ["kill"]), (Round.switch, 1, ["switch", "kill"]),
    (Round.flush, 4, ["flush"]), (Round.remove, 4, ["flush"]), (Round.copy, 3, ["copy"]),
    (Round.save, 3, ["reload"]), (Round.reload, 3, ["reload"]), (Round.disturb_sets, 8, ["sets"]),
    (Round.add_foreign, 3, ["foreign"]), (Round.delete_foreign, 2, ["foreign"]), (Round.insert_foreign, 4, ["front"]),
    (lambda self: self.disturb("swap"), 3, ["sets", "swap"]), (lambda self: self.disturb("timeout"), 3, ["sets", "timeout"]),
    (lambda self: self.disturb("kind"), 3, ["sets", "kind"]), (lambda self: self.disturb("comment"), 3, ["comment"]),
    (lambda self: self.disturb("double"), 2, ["double"]), (lambda self: self.disturb("policy"), 2, ["policy"]),
    (Round.fault, 12, []), (Round.lift, 4, []), (Round.fill, 2, ["disk"]),
]


def children():
    """-> the other processes in this PID namespace, without those that have ended."""
    alive = []
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as f:
                alive += [pid] if f.read().rpartition(")")[2].split()[0] not in "ZX" else []
    return alive


# --- The run ---------------------------------------------------------------------------------------

def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="classes: " + ", ".join(CLASSES))
    parser.add_argument("program", type=os.path.abspath)
    parser.add_argument("count", nargs="?", type=int, default=200)
    parser.add_argument("seed", nargs="?", type=int, default=random.randrange(1 << 32))
    names = lambda text: set(filter(None, text.split(",")))
    parser.add_argument("--without", type=names, default=set(), metavar="CLASS,...")
    parser.add_argument("--only", type=names, metavar="CLASS,...")
    parser.add_argument("--from", type=int, default=1, dest="first", metavar="ROUND")
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    for name in options.without | (options.only or set()):
        if name not in CLASSES:
            parser.error(f"no such class: {name}")
    options.classes = (options.only if options.only is not None else set(CLASSES)) - options.without
    return options


def report(options, number, round_, error):
    def tail(name, count):
        with contextlib.suppress(FileNotFoundError), open(f"{RUN}/{name}", errors="replace") as f:
            return "".join(f.readlines()[-count:])
        return ""
    print(f"--- round {number}: what was done\n" + "\n".join(round_.log))
    for what, name, count in ("the last calls by rfw", "faults/calls", 30), ("its log", "rfw.log", 40), \
            ("the state file", "disk/state", 30), ("standard error", "stderr", 20):
        print(f"--- {what}\n{tail(name, count)}", end="")
    print(f"--- round {number} FAILED ({', '.join(map(str, round_.mode))}): {error}")
    first, flags = number - (number - 1) % 2, ""
    for name in "without", "only":
        flags += f" --{name} {','.join(sorted(getattr(options, name)))}" if getattr(options, name) else ""
    print(f"again: tests/chaos.py {sys.argv[1]} {number} {options.seed} --from {first}{flags}", flush=True)


def main(options):
    inside()
    print(f"seed {options.seed}", flush=True)
    run("/bin/sh", "-c", f"mkdir -p {RUN}/disk && mount -t tmpfs -o size=256k disk {RUN}/disk")
    write("white.list", "192.0.2.1\n")
    if "outward" in options.classes:
        keys()
    modes = [Mode(*mode) for mode in itertools.product(("nft", "legacy"), (False, True), (False, True))]
    if not os.path.exists("/usr/sbin/ipset"):
        print("SKIPPED: rounds with sets (no ipset)", flush=True)
        modes = [mode for mode in modes if not mode.sets]
        options.classes -= {"sets", "switch"}
    tools, failed, round_, slowest, steps, begin = Tools(), 0, None, 0, 0, time.monotonic()
    for number in range(options.first, options.count + 1):
        fresh = number % 2 == 1 or round_ is None
        if fresh:
            if round_:
                round_.stop()
            round_ = Round(options, tools, modes[(number - 1) // 2 % len(modes)])
            tools.lift()
            tools.install(round_.mode.variant)
        try:
            round_.play(random.Random(f"{options.seed} {number}"), fresh)
        except (Failure, RuntimeError, AssertionError, KeyError, ValueError) as error:
            report(options, number, round_, error if isinstance(error, Failure) else traceback.format_exc())
            failed += 1
            round_.stop()
            round_ = None
            if not options.keep_going:
                return 1
            continue
        steps, slowest = steps + len(round_.log), max(slowest, round_.slowest)
        if options.verbose:
            print("\n".join(round_.log))
        if number % 20 == 0:
            print(f"{number} rounds, {time.monotonic() - begin:.0f} s", flush=True)
    tools.count()
    print("faults met: " + (", ".join(f"{count} {kind}" for kind, count in tools.met.most_common()) or "none"))
    print(f"{options.count - options.first + 1} rounds, {failed} failed; {steps} steps; "
          f"the slowest recovery took {slowest:.1f} s; {time.monotonic() - begin:.0f} s in all", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(arguments()))

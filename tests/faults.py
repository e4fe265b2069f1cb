"""faults.py: stand-ins for iptables and ipset that run the real program, or fail on demand.

For tests/chaos.py. A fault is a file whose name says which program it affects, whether a listing
(read) or a change (write), and whether once or always; its content is run by the shell.
"""

import collections, contextlib, os, re, signal
from lab import RUN, write

PROGRAMS = ["iptables", "iptables-restore", "ip6tables", "ip6tables-restore", "ipset"]
FAULTS = RUN + "/faults"
STAND_IN = """#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin me={me} real={real} kind=write
case " $* " in
*" -S "*|*" -L "*|*" list "*|*" save "*) kind=read;;
*" -V "*|*" --version "*|*" version "*) exec $real "$@";;
esac
cd {faults}
call="$me $*"
echo "$call" >>calls
if [ $kind = read ] && [ -e "honest/$call" ]; then rm "honest/$call"; exec $real "$@"; fi
for fault in $me.$kind.*; do
    case $fault in
    *.once.*) [ -e "$fault" ] && mv "$fault" taken/$$ 2>/dev/null || continue; fault=taken/$$;;
    *'*') break;;
    esac
    script=$(cat $fault 2>/dev/null) || continue  # no longer there
    echo "***" $script >>calls
    eval "$script"
done
exec $real "$@"
"""
Fault = collections.namedtuple("Fault", "kind programs repeatable script")
RESTORES = ["iptables-restore", "ip6tables-restore", "ipset"]
TABLES = ["iptables", "ip6tables"]
HALF = "cat >in.$$; head -n $(($(wc -l <in.$$) * K / 10)) in.$$ "
HANG = "echo $$ >>hung; exec sleep 99"
TRUE_NEXT = ': >"honest/$call"; '  # no program can see through the same lie told twice
FAULT = {  # class: what a tool does; K is a small random number
    "fail": [
        Fault("write", PROGRAMS, True, 'echo "$me: refused, says the test" >&2; exit 1'),
        Fault("write", PROGRAMS, True, 'echo "$me: RULE_INSERT failed, says the test" >&2; exit 4'),
        Fault("write", PROGRAMS[:4], True, 'echo "Another app is currently holding the xtables lock." >&2; exit 4'),
        Fault("write", PROGRAMS, True, "kill -9 $$"),
    ],
    "commit": [
        Fault("write", PROGRAMS, False, '$real "$@"; echo "$me: done, but failed, says the test" >&2; exit 1'),
        Fault("write", PROGRAMS, False, '$real "$@"; kill -9 $$'),
        Fault("write", PROGRAMS[:4], False, '$real "$@"; exit 4'),
    ],
    "twice": [
        Fault("write", TABLES + ["ipset"], False, '[ $# -gt 2 ] || exec $real "$@"; $real "$@"; $real "$@"; exit 0'),
        Fault("write", RESTORES, False, 'cat >in.$$; $real "$@" <in.$$; exec $real "$@" <in.$$'),
    ],
    "order": [
        Fault("write", RESTORES[:2], False, '(echo "*filter"; cat >in.$$; grep ^-D in.$$; grep ^-I in.$$ | tac; echo COMMIT) | $real "$@"; exit $?'),
        Fault("write", RESTORES[:2], False, '(echo "*filter"; cat >in.$$; grep ^-D in.$$; grep ^-I in.$$ | sed "s/^\\(-I [A-Z]*\\) [0-9]* /\\1 /"; echo COMMIT) | $real "$@"; exit $?'),
    ],
    "half": [
        Fault("write", RESTORES, False, HALF + '| $real "$@"; kill -9 $$'),
        Fault("write", RESTORES, False, 'head -n K | $real "$@"; exit 1'),
    ],
    "unread": [
        Fault("read", PROGRAMS, True, 'echo "$me: cannot list, says the test" >&2; exit 1'),
        Fault("read", PROGRAMS, True, '$real "$@" | head -n K; kill -9 $$'),
        Fault("read", TABLES, True, "exit 0"),
        Fault("read", TABLES, True, '$real "$@" | sed "/^-P OUTPUT/,\\$d"; exit 0'),
        Fault("read", TABLES, True, '$real "$@" | grep -v "^-P INPUT"; exit 0'),
    ],
    "lie": [
        Fault("read", TABLES, False, TRUE_NEXT + '$real "$@" | grep "^-P"; exit 0'),
        Fault("read", TABLES, False, TRUE_NEXT + '$real "$@" | head -n $((3 + K)); exit 0'),
        Fault("read", TABLES, False, TRUE_NEXT + '$real "$@" | sed $((3 + K))d; exit 0'),
        Fault("read", TABLES, False, TRUE_NEXT + '$real "$@" | sed $((3 + K))p; exit 0'),
        Fault("read", ["ipset"], False, TRUE_NEXT + "exit 0"),
        Fault("read", ["ipset"], False, TRUE_NEXT + '$real "$@" | head -n K; exit 0'),
        Fault("read", ["ipset"], False, TRUE_NEXT + '$real "$@" | sed Kd; exit 0'),
    ],
    "hang": [
        Fault("write", PROGRAMS, False, HANG),
        Fault("write", PROGRAMS, False, f'$real "$@"; {HANG}'),
        Fault("read", TABLES + ["ipset"], False, HANG),
    ],
}


class Tools:
    """The stand-ins for iptables and ipset, and their pending faults."""

    def __init__(self):
        for directory in RUN + "/bin", FAULTS, FAULTS + "/taken", FAULTS + "/honest":
            os.makedirs(directory, exist_ok=True)
        self.number, self.met = 0, collections.Counter()
        write("faults/calls", "")

    def install(self, variant):
        for me in PROGRAMS:
            real = "/usr/sbin/" + re.sub("tables", f"tables-{variant}", me)
            os.chmod(write("bin/" + me, STAND_IN.format(me=me, real=real, faults=FAULTS)), 0o755)
        self.count()

    def count(self):
        """Adds up the faults that occurred, by class, and starts again from zero."""
        self.met.update(line.split()[2] for line in self.calls() if line.startswith("***"))
        write("faults/calls", "")

    def add(self, kind, fault, program, k, always):
        self.number += 1
        mode = "always" if always else "once"
        name = f"{program}.{fault.kind}.{mode}.{self.number:06}"
        os.rename(write("faults/new", f"# {kind}\n{fault.script.replace('K', str(k))}\n"), f"{FAULTS}/{name}")
        return f"{FAULTS}/{name}"

    def lift(self, kind=""):
        """Ends these faults, or all; hanging tools are ended."""
        for directory in FAULTS, FAULTS + "/honest":
            for entry in os.scandir(directory):
                if entry.is_file() and entry.name not in ("calls", "hung"):
                    with open(entry.path) as f:
                        if f.readline().endswith(kind + "\n") or not kind:
                            os.unlink(entry.path)
        self.end_hung()

    def end_hung(self):
        with contextlib.suppress(FileNotFoundError):
            with open(FAULTS + "/hung") as f:
                for pid in f:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            os.unlink(FAULTS + "/hung")

    def calls(self):
        with open(FAULTS + "/calls") as f:
            return f.read().splitlines()

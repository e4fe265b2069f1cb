#!/usr/bin/env python3
"""fail2ban.py: the real fail2ban bans through rfw, and the lines of contrib/feeds.cron work.

    tests/fail2ban.py target/release/rfw FAIL2BAN

FAIL2BAN is Debian's package, unpacked by `make fail2ban`, not installed. fail2ban's own jail.conf with
contrib/fail2ban/rfw.conf as its action, a log that this test writes, real iptables in its own namespace.
Exit status 1 at the first failure.
"""

import fcntl, http.server, re, shutil, signal, threading, zlib
from lab import *

HTTPS = f"--cacert {RUN}/client/ca.crt --credentials"
AGAIN = "again-host-and-many-"  # the tag of the jail Again@host-and-many-more
LOG, F2B_LOG = RUN + "/service.log", RUN + "/fail2ban.log"

SETTINGS = f"""[Definition]
loglevel = DEBUG
allowipv6 = yes
logtarget = {F2B_LOG}
syslogsocket = none
socket = {RUN}/f2b.sock
pidfile = {RUN}/f2b.pid
dbfile = {RUN}/f2b.sqlite3
"""

# All read the same log, each line of which names its jail.
JAILS = f"""[DEFAULT]
banaction = iptables-multiport
banaction_allports = iptables-allports
backend = polling
logpath = {LOG}
usedns = no
ignoreself = false
maxretry = 1
bantime = 10m
filter = lab[tag=%(__name__)s]
[web]
[Again@host-and-many-more]
[ever]
bantime = -1
[long]
bantime = 30d
[grow]
bantime = 3s
bantime.increment = true
bantime.factor = 100
[edge]
banaction = rfw[server="https://127.0.0.1:{OUTWARD}", target=reject, place="forward/any", options="{HTTPS} {RUN}/right"]
[wrong]
banaction = rfw[server="https://127.0.0.1:{OUTWARD}", options="{HTTPS} {RUN}/wrong"]
[fleet]
banaction = rfw[servers="--servers {RUN}/servers", options="{HTTPS} {RUN}/right", prefix6=64]
[soon]
banaction = rfw[server="http://127.0.0.1:1", options="--timeout 1"]
[junk]
filter = junk
"""
FILTER = r"""[Definition]
failregex = ^\s*<tag>: failed from <ADDR>$
"""
# The worst possible filter: whatever a client sends is the "address".
JUNK = r"""[Definition]
failregex = ^\s*junk: <F-ID>.+</F-ID>$
"""
HOSTILE = [
    "$(touch /run/lab/hacked)", "`touch /run/lab/hacked`", "198.51.100.60;touch /run/lab/hacked",
    "198.51.100.61' || touch /run/lab/hacked '", '198.51.100.62" ; touch /run/lab/hacked "',
    "0.0.0.0/0", "::/0", "198.51.100.63/any", "../../../accept/input/any/198.51.100.64",
    "{198.51.100.65,198.51.100.66}", "198.51.100.[1-9]", "198.51.100.67?expire=1h", "198.51.100.68 ", "127.0.0.1",
]


def seen(what, probe, seconds=30):
    begun = time.monotonic()
    await_true(what, seconds, probe)
    print(f"ok  {what} ({time.monotonic() - begun:.1f} s)", flush=True)


def check(what, truth):
    if not truth:
        raise RuntimeError(f"not so: {what}")
    print(f"ok  {what}", flush=True)


def rules(program="iptables"):
    return subprocess.run([f"/usr/sbin/{program}-nft", "-S"], capture_output=True, text=True, check=True).stdout


def rule(address, words="-A INPUT", end="-j DROP", tag=""):
    """-> the seconds until that rule, with any tag or this one, expires; 0: never; None: no such rule."""
    for line in rules("ip6tables" if ":" in address else "iptables").splitlines():
        comment = re.search(r'--comment "?rfw:?(\d*)@([^" ]*)', line)
        if line.startswith(words) and f"-s {address}/" in line and end in line and comment.group(2).startswith(tag):
            return int(comment.group(1)) - time.time() if comment.group(1) else 0
    return None


def lasts(seconds, address, *words, tag=""):
    """Whether the rule exists with that expiry."""
    left = rule(address, *words, tag=tag)
    return left is not None and (seconds - 30 < left < seconds + 5 if seconds else left == 0)


def fails(jail, address):
    with open(LOG, "a") as f:
        f.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {jail}: failed from {address}\n")


def logged(*words):
    with open(F2B_LOG) as f:
        return any(all(word in line for word in words) for line in f)


class Fail2ban:
    def __init__(self, package):
        self.package = os.path.abspath(package)
        self.python = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
        shutil.copytree(self.package + "/etc/fail2ban", RUN + "/etc", ignore=shutil.ignore_patterns("jail.d"))
        shutil.copy(ROOT + "/contrib/fail2ban/rfw.conf", RUN + "/etc/action.d/rfw.conf")
        shutil.copytree(ROOT + "/contrib/fail2ban/jail.d", RUN + "/etc/jail.d")
        for name, text in [("fail2ban.local", SETTINGS), ("jail.local", re.sub(r"(\n\[.*\])", r"\1\nenabled = true", JAILS)),
                           ("filter.d/lab.conf", FILTER), ("filter.d/junk.conf", JUNK)]:
            write("etc/" + name, text)
        write("right", f"{USER}:{PASSWORD}\n")
        write("wrong", f"{USER}:guess\n")
        write("servers", f"https://127.0.0.1:{OUTWARD}\nhttp://127.0.0.1:{LOCAL}\n")
        self.env = {"PATH": RUN + "/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE": "1",
                    "PYTHONPATH": self.package + "/usr/lib/python3/dist-packages"}

    def start(self):
        self.server = subprocess.Popen(
            [self.python, self.package + "/usr/bin/fail2ban-server", "-c", RUN + "/etc", "-f", "start"],
            env=self.env, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent)
        await_true("fail2ban runs", 30, lambda: logged("Jail 'junk' started"))

    def client(self, *words):
        command = [self.python, self.package + "/usr/bin/fail2ban-client", "-c", RUN + "/etc", *words]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=True).stdout

    def stop(self):
        self.client("stop")
        self.server.wait(30)
        open(F2B_LOG, "w").close()


def bans(fail2ban):
    fails("web", "203.0.113.7")
    seen("a line in a log is a rule in the kernel, with its expiry", lambda: lasts(600, "203.0.113.7"))
    fails("web", "2001:db8::7")
    seen("IPv6 too", lambda: lasts(600, "2001:db8::7"))
    fail2ban.client("set", "web", "unbanip", "203.0.113.7", "2001:db8::7")
    seen("unbanip: both are gone", lambda: rule("203.0.113.7") is rule("2001:db8::7") is None)

    fails("web", "203.0.113.8")
    fails("Again@host-and-many-more", "203.0.113.8")
    seen("two jails ban one address, each by a rule of its own",
         lambda: lasts(600, "203.0.113.8", tag="web") and lasts(600, "203.0.113.8", tag=AGAIN))
    fail2ban.client("set", "web", "unbanip", "203.0.113.8")
    seen("what one unbans the other holds", lambda: rule("203.0.113.8", tag="web") is None)
    check("(the other's rule)", lasts(600, "203.0.113.8", tag=AGAIN))

    fails("ever", "203.0.113.9")
    seen("bantime -1: no expiry", lambda: lasts(0, "203.0.113.9"))
    fails("long", "203.0.113.10")
    seen("bantime 30d, longer than a set keeps: no expiry, fail2ban unbans", lambda: lasts(0, "203.0.113.10"))

    fails("grow", "203.0.113.11")
    seen("bantime.increment: the first ban of 3 s", lambda: rule("203.0.113.11") is not None)
    seen("(its end)", lambda: rule("203.0.113.11") is None)
    fails("grow", "203.0.113.11")
    seen("the second one is longer: actionprolong", lambda: lasts(600, "203.0.113.11"))


def refusals():
    fails("web", "192.0.2.1")
    seen("a whitelisted address: an error in fail2ban's log, with rfw's sentence",
         lambda: logged("ERROR", "stdout", "409 whitelisted: ") and logged("ERROR", "Failed to execute ban", "'web'"))
    check("(no rule)", rule("192.0.2.1") is None)
    before = rules() + rules("ip6tables")
    with open(LOG, "a") as f:
        for junk in HOSTILE:
            f.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} junk: {junk}\n")
            f.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} web: failed from {junk}\n")
    fails("web", "203.0.113.12")
    seen("(a good line after hostile ones)", lambda: rule("203.0.113.12") is not None, 60)
    seen("hostile lines: each ban that is tried fails", lambda: errors("'junk'") >= 7, 20)
    after = "".join(line for line in (rules() + rules("ip6tables")).splitlines(True) if "203.0.113.12/" not in line)
    check("no rule has come or gone, nothing ran", after == before and not os.path.exists(RUN + "/hacked"))


def tried(jail):
    with open(F2B_LOG) as f:
        return sum(f"[{jail}] Ban " in line for line in f)


def errors(jail):
    with open(F2B_LOG) as f:
        return sum("ERROR" in line and "Failed to execute ban" in line and jail in line for line in f)


def edge(fail2ban):
    fails("edge", "0.0.0.0")
    seen("0.0.0.0 is not banned: in forward it is any address", lambda: errors("'edge'") == 1)
    fails("edge", "198.51.100.7")
    fails("edge", "2001:db8::8")
    seen("over HTTPS, by CA and password: reject in FORWARD",
         lambda: lasts(600, "198.51.100.7", "-A FORWARD", "-j REJECT") and lasts(600, "2001:db8::8", "-A FORWARD", "-j REJECT"))
    check("(nothing else there)", sum("-A FORWARD" in line for line in (rules() + rules("ip6tables")).splitlines()) == 2)
    fails("wrong", "198.51.100.8")
    seen("a wrong password: an error in fail2ban's log, with rfw's sentence",
         lambda: logged("ERROR", "stdout", "401 unauthorized: ") and errors("'wrong'"))
    check("(no rule)", rule("198.51.100.8") is None)
    fails("fleet", "203.0.113.30")
    seen("two servers at once", lambda: lasts(600, "203.0.113.30", tag="fleet"))
    def came():
        with open(RUN + "/rfw.log") as f:
            return [line for line in f if "PUT /drop/input/any/203.0.113.30?" in line]
    seen("(each has got it)", lambda: len(came()) == 2 and any(f" {USER} " in line for line in came()))
    fails("fleet", "2001:db8:1:2::9")
    seen("prefix6=64: the whole /64", lambda: "-s 2001:db8:1:2::/64 " in rules("ip6tables"))
    fail2ban.client("set", "fleet", "unbanip", "2001:db8:1:2::9")
    seen("(and unbanip)", lambda: "2001:db8:1:2::/64" not in rules("ip6tables"))
    fails("soon", "203.0.113.31")
    seen("a --timeout in options replaces the action's 20 s", lambda: errors("'soon'"), 15)
    check("no password in fail2ban's log of commands", logged("/right") and not logged(PASSWORD))


def outages(fail2ban, start):
    rfw = start()
    rfw.stop()
    fails("web", "203.0.113.13")
    await_true("the ban is tried", 30, lambda: logged("[web] Ban 203.0.113.13"))
    time.sleep(2)
    rfw = start()
    seen("rfw is away for two seconds: the ban is made when it is back", lambda: lasts(600, "203.0.113.13"))
    kept = ["203.0.113.12", "203.0.113.13"]
    fail2ban.stop()
    check("fail2ban stops: its bans are gone", not any(rule(address) is not None for address in kept))
    fail2ban.start()
    seen("it starts: they are back", lambda: all(lasts(600, address) for address in kept))
    check("(permanent ones too)", lasts(0, "203.0.113.9"))
    write("etc/action.d/rfw.local", "[Definition]\nactionflush = true\n")
    fail2ban.client("reload")
    fail2ban.stop()
    check("with actionflush = true they stay while it is stopped", all(lasts(600, address) for address in kept))
    return rfw


# The content of the feeds in their own formats, with unassigned addresses.
FEEDS = {
    "levels/3.txt": "198.18.0.1\n198.18.0.2\n",
    "firehol_level1.netset": "#\n# firehol_level1\n#\n# ipv4 hash:net ipset\n#\n"
        "# Entries         : 4493 subnets, 612071688 unique IPs\n#\n"
        "0.0.0.0/8\n198.18.1.0/24\n10.0.0.0/8\n100.64.0.0/10\n127.0.0.0/8\n169.254.0.0/16\n172.16.0.0/12\n"
        "172.32.0.9\n192.168.0.0/16\n192.169.0.0/16\n198.18.2.7\n224.0.0.0/3\n",
    "drop_v4.json": '{"cidr":"198.18.4.0/22","sblid":"SBL256894","rir":"apnic"}\n'
        '{"cidr":"198.18.8.0/24","sblid":"SBL434604","rir":"ripencc"}\n'
        '{"type":"metadata","timestamp":1795431795,"size":104461,"records":2,"copyright":"(c) 2026 The Spamhaus '
        'Project SLU","terms":"https://www.spamhaus.org/drop/terms/"}\n',
    "drop_v6.json": '{"cidr":"2001:db8:6::/48","sblid":"SBL641930","rir":"ripencc"}\n'
        '{"type":"metadata","timestamp":1795431795,"size":4926,"records":1,"copyright":"(c) 2026"}\n',
}
WANTED = {
    "levels/3.txt": ["198.18.0.1/32", "198.18.0.2/32"],
    "firehol_level1.netset": ["172.32.0.9/32", "192.169.0.0/16", "198.18.1.0/24", "198.18.2.7/32"],
    "drop_v4.json": ["198.18.4.0/22", "198.18.8.0/24"],
    "drop_v6.json": ["2001:db8:6::/48"],
}
# The real curl; the server below replaces every other host.
CURL = """#!/bin/sh
for word; do
    shift
    case $word in https://*) word=http://127.0.0.1:8000/$(echo "$word" | tr / _) ;; esac
    set -- "$@" "$word"
done
exec /usr/bin/curl "$@"
"""


class Feeds(http.server.BaseHTTPRequestHandler):
    """Serves FEEDS with entity tags, or fails in the way of `mode`."""
    mode, answers = "", []

    def do_GET(self):
        body = next(text for name, text in FEEDS.items() if self.path.endswith(name.replace("/", "_"))).encode()
        etag = '"%d"' % zlib.crc32(body)
        same = self.headers["If-None-Match"] == etag and not self.mode
        status = 304 if same else 500 if self.mode == "error" else 200
        self.answers.append(status)
        self.send_response(status)
        self.send_header("ETag", '"broken"' if self.mode else etag)
        if not same:
            body = b"" if self.mode in ("empty", "error") else b"# none\n" if self.mode == "comment" else body
            body = body.replace(b"198.18.0.1", b"<html>") if self.mode == "html" else body
            if self.mode != "endless":
                self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not same:
            self.wfile.write(body[:-14] if self.mode == "cut" else body)
        for _ in range(70 if self.mode == "endless" else 0):
            self.wfile.write(b"# more to come\n" * (1 << 20 >> 4))

    def log_message(self, *_):
        pass


def sources(tag):
    lines = (rules() + rules("ip6tables")).splitlines()
    return sorted(re.search(r" -s (\S+)", line).group(1) for line in lines if re.search(rf' -s .*"?rfw@{tag}\b', line))


def feeds():
    """Each line of feeds.cron, as cron runs it, except that it downloads from this host."""
    subprocess.run(["mount", "-t", "tmpfs", "cache", "/var/cache"], check=True)
    write("bin/curl", CURL)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Feeds)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with open(ROOT + "/contrib/feeds.cron") as f:
        crontab = [line.split(None, 6)[5:] for line in f if line[0].isdigit()]
    check("as many lines as feeds, no % in any", len(crontab) == len(FEEDS) and not any("%" in line for _, line in crontab))
    path = f"{RUN}/bin:{ROOT}/contrib:/usr/bin:/bin"
    cron = lambda command: subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, env={"PATH": path})
    for user, command in crontab:
        tag = command.split()[1]
        feed = next(name for name in FEEDS if name in command)
        done = cron(command)
        check(f"{feed}: {' '.join(sources(tag))}", user == "root" and done.returncode == 0 and not done.stderr
              and "200 applied" in done.stdout and sources(tag) == WANTED[feed])
    ipsum = next(command for _, command in crontab if " ipsum " in command)
    others = sources("spamhaus4")
    check("a feed that has not changed is not sent again, and put again",
          cron(ipsum).returncode == 0 and Feeds.answers[-1] == 304 and sources("ipsum") == WANTED["levels/3.txt"])
    original = FEEDS["levels/3.txt"]
    for Feeds.mode in "error", "empty", "comment", "html", "cut", "endless":
        FEEDS["levels/3.txt"] = "198.18.0.9\n198.18.0.1\n198.18.0.2\n"
        done = cron(ipsum)
        check(f"a failed download unblocks no address: {Feeds.mode}", sources("ipsum") == WANTED["levels/3.txt"]
              and done.returncode != 0 and done.stdout == "" and done.stderr != ""
              and ("bad_list" in done.stderr) == (Feeds.mode == "html"))
    largest = max(os.stat(f"/var/cache/rfw-feed/{name}").st_size for name in os.listdir("/var/cache/rfw-feed"))
    check("an endless download does not fill the disk", largest <= 64 << 20)
    Feeds.mode, FEEDS["levels/3.txt"] = "", original
    check("a version from before the failures is downloaded again", cron(ipsum).returncode == 0 and Feeds.answers[-1] == 200)
    plain = {name for name in os.listdir("/var/cache/rfw-feed") if ":" not in name}
    check("no two tags share a file", plain == {command.split()[1] for _, command in crontab})
    asked = len(Feeds.answers)
    with open("/var/cache/rfw-feed/ipsum:lock", "w") as lock:  # as another run for this tag does
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = cron(ipsum)
    check("two runs for a tag do not share a download",
          done.returncode == 1 and "still running" in done.stderr and len(Feeds.answers) == asked)
    os.unlink("/var/cache/rfw-feed/ipsum")
    check("a kept file that was removed is downloaded again", cron(ipsum).returncode == 0 and Feeds.answers[-1] == 200)
    begun = time.monotonic()
    done = cron("RFWC_OPTIONS='--server http://127.0.0.1:1 --timeout 1' rfw-feed soon https://levels/3.txt")
    check("a --timeout in RFWC_OPTIONS replaces rfw-feed's 120 s", done.returncode == 1 and time.monotonic() - begun < 60)
    cron("RFW_PLACE=forward/any rfw-feed docker https://levels/3.txt")
    blocked = [line for line in rules().splitlines() if "rfw@docker" in line]
    check("RFW_PLACE=forward/any", len(blocked) == 2 and all(line.startswith("-A FORWARD -s 198.18.0.") for line in blocked))
    check("a tag that is none is refused", cron("rfw-feed ../x https://levels/3.txt").returncode == 2)
    Feeds.mode, FEEDS["levels/3.txt"] = "", "198.18.0.2\n198.18.0.3\n"
    check("what has left the feed is unblocked, what is new is blocked",
          cron(ipsum).returncode == 0 and sources("ipsum") == ["198.18.0.2/32", "198.18.0.3/32"])
    check("(the other feeds)", sources("spamhaus4") == others)
    for what, text, filter_ in [
            ("drop.txt, as it is", "; Spamhaus DROP List 2026/11/24 - (c) 2026 The Spamhaus Project SLU\n"
             "; Expires: Wed, 25 Nov 2026 11:43:35 GMT\n198.18.20.0/24 ; SBL100001\n198.18.22.0/23 ; SBL100002\n", "cat"),
            ("ipsum.txt, cut -f1", "# IPsum Threat Intelligence Feed\n# (https://github.com/stamparm/ipsum)\n#\n"
             "198.18.24.1\t10\n198.18.24.2\t3\n", "cut -f1")]:
        subprocess.run(f"{filter_} '{write('sample', text)}' | curl -sS --fail-with-body -T - "
                       "'http://127.0.0.1:7390/drop/input/any?tag=sample&replace=true'", shell=True, check=True, stdout=subprocess.DEVNULL)
        check(f"{what}: {' '.join(sources('sample'))}", len(sources("sample")) == 2)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    inside()
    keys()
    os.mkdir(RUN + "/bin")
    os.symlink(os.path.abspath(sys.argv[1]), RUN + "/bin/rfwc")
    write("service.log", "")
    write("fail2ban.log", "")
    start = lambda: Rfw(sys.argv[1], OUTWARD_CONF)
    rfw = start()
    fail2ban = Fail2ban(sys.argv[2])
    try:
        fail2ban.start()
        bans(fail2ban)
        refusals()
        edge(fail2ban)
        rfw.stop()
        rfw = outages(fail2ban, start)
        feeds()
    except RuntimeError:
        with open(F2B_LOG) as f:
            sys.stderr.writelines(line for line in f.readlines()[-400:] if "DEBUG" not in line and "INFO" not in line)
        raise
    finally:
        fail2ban.server.send_signal(signal.SIGKILL)
        rfw.stop()


main()

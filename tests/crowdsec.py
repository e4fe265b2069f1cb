#!/usr/bin/env python3
"""crowdsec.py: the real CrowdSec's real custom bouncer carries out its decisions through rfw.

    tests/crowdsec.py target/release/rfw CROWDSEC

CROWDSEC is Debian's crowdsec and crowdsec-custom-bouncer, unpacked by `make crowdsec`, not installed.
CrowdSec's local API without agent and Central API, contrib/crowdsec/ unchanged except for paths and the
interval, real iptables in its own namespace. Exit status 1 at the first failure.
"""

import json, re
from lab import *

API = "http://127.0.0.1:8080/"
CONFIG = f"""common: {{daemonize: false, log_media: stdout, log_level: info, working_dir: .}}
config_paths:
  config_dir: {RUN}/etc/
  data_dir: {RUN}/
  simulation_path: {RUN}/etc/simulation.yaml
  hub_dir: {RUN}/
  index_path: {RUN}/index.json
  notification_dir: {RUN}/
  plugin_dir: {RUN}/
crowdsec_service: {{acquisition_path: {RUN}/etc/acquis.yaml, parser_routines: 1}}
db_config: {{log_level: info, type: sqlite, db_path: {RUN}/crowdsec.db, use_wal: true}}
plugin_config: {{user: nobody, group: nogroup}}
api:
  client: {{credentials_path: {RUN}/machine.yaml}}
  server: {{log_level: info, listen_uri: "127.0.0.1:8080", profiles_path: {RUN}/etc/profiles.yaml}}
prometheus: {{enabled: false}}
"""


class Crowdsec:
    def __init__(self, package):
        self.package = os.path.abspath(package)
        subprocess.run(["cp", "-r", self.package + "/etc/crowdsec", RUN + "/etc"], check=True)
        write("config.yaml", CONFIG)
        write("index.json", "{}")
        write("machine.yaml", "")
        self.cscli("machines", "add", "lab", "--password", "lab", "-f", RUN + "/machine.yaml", "-u", API)
        self.cscli("bouncers", "add", "rfw", "-k", "key")
        self.server = self.run("crowdsec", "-c", RUN + "/config.yaml", "-no-cs", "-no-capi")
        await_true("CrowdSec answers", 30, lambda: not subprocess.run(["curl", "-so", "/dev/null", API]).returncode)

    def run(self, program, *words):
        log = open(f"{RUN}/{program}.log", "ab")
        env = {"PATH": RUN + "/bin:/usr/bin:/bin"}
        return subprocess.Popen([f"{self.package}/usr/bin/{program}", *words], stdout=log, stderr=log, env=env,
                                preexec_fn=die_with_parent)

    def cscli(self, *words):
        subprocess.run([self.package + "/usr/bin/cscli", "-c", RUN + "/config.yaml", *words], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ban(self, *words):
        self.cscli("decisions", "add", "--reason", 'x "value":"198.51.100.1" \\ y', *words)

    def bouncer(self):
        with open(ROOT + "/contrib/crowdsec/crowdsec-custom-bouncer.yaml") as f:
            text = f.read()
        for old, new in [("/usr/local/sbin/rfw-crowdsec", ROOT + "/contrib/crowdsec/rfw-crowdsec"), ("${API_KEY}", "key"),
                         ("10s", "1s"), ("/var/run/", RUN + "/"), ("daemonize: true", "daemonize: false"),
                         ("log_mode: file", "log_mode: stdout")]:
            if old not in text:
                raise RuntimeError(f"the example has no {old}")
            text = text.replace(old, new)
        return self.run("crowdsec-custom-bouncer", "-c", write("bouncer.yaml", text))


def blocked():
    """-> {address: (tag, seconds left; 0: permanent)}"""
    found = {}
    for program in "iptables", "ip6tables":
        out = subprocess.run([f"/usr/sbin/{program}-nft", "-S"], capture_output=True, text=True, check=True).stdout
        for address, expiry, tag in re.findall(r'-A INPUT -s (\S+) -m comment --comment "?rfw:?(\d*)@?([^" ]*)"? -j DROP', out):
            found[address] = tag, round(int(expiry) - time.time()) if expiry else 0
    return found


def seen(what, tag, seconds, address):
    def there():
        row = blocked().get(address)
        return row is not None and row[0] == tag and (seconds - 30 < row[1] <= seconds + 5 if seconds else row[1] == 0)
    begun = time.monotonic()
    await_true(what, 20, there)
    print(f"ok  {what} ({time.monotonic() - begun:.1f} s)", flush=True)


def gone(what, *addresses):
    await_true(what, 20, lambda: not blocked().keys() & set(addresses))
    print(f"ok  {what}", flush=True)


def odd_decisions():
    """Decisions that need the Central API, passed directly to the script."""
    rows = [
        # type, scope, value, origin, duration, action; tag and seconds
        ("ban", "Ip", "198.51.100.10", "CAPI", "23h59m59.9s", "add", ("capi", 86400)),
        ("ban", "Ip", "198.51.100.11", "Lists: a/b, and many more", "15.5s", "add", ("lists--a-b--and-many", 16)),
        ("ban", "Ip", "198.51.100.12", "-", "1m0s", "add", ("0", 61)),
        ("ban", "Ip", "198.51.100.13", "crowdsec", "350.2ms", "add", None),  # gone within two seconds
        ("ban", "Ip", "198.51.100.14", "crowdsec", "-1s", "add", None),
        ("ban", "Ip", "198.51.100.15", "crowdsec", "x[$(touch hacked)]s", "add", None),
        ("ban", "Ip", "198.51.100.19", "crowdsec", "1h08m", "add", None),
        ("ban", "Ip", "198.51.100.20", "crowdsec", "1h", "add", ("crowdsec", 3601)),
        ("ban", "Country", "198.51.100.16", "crowdsec", "1h0m0s", "add", None),
        ("ban", "Ip", "198.51.100.17?tag=x&expire=0", "crowdsec", "1h0m0s", "add", None),
        ("ban", "Ip", "198.51.100.18 /list", "crowdsec", "1h0m0s", "add", None),
        ("ban", "Ip", "0.0.0.0", "crowdsec", "1h0m0s", "add", None),
        ("ban", "Ip", "198.51.100.10", "cscli", "1h0m0s", "del", ("capi", 86400)),
    ]
    names = ["type", "scope", "value", "origin", "duration", "action"]
    lines = "".join(json.dumps(dict(zip(names, row)), separators=(",", ":")) + "\n" for row in rows)
    subprocess.run([ROOT + "/contrib/crowdsec/rfw-crowdsec"], input=lines, text=True, check=True,
                   env={"PATH": RUN + "/bin:/usr/bin:/bin"}, cwd=RUN)
    await_true("the shortest has expired", 10, lambda: "198.51.100.13/32" not in blocked())
    found = blocked()
    for *_, address, _, _, _, want in (row[1:] for row in rows):
        got = found.get(address + "/32")
        if (got is None) != (want is None) or want and (got[0] != want[0] or not want[1] - 10 <= got[1] <= want[1]):
            raise RuntimeError(f"{address}: {got}, not {want}")
    if any(address.startswith("198.51.100.17") or address == "0.0.0.0/0" for address in found) or os.path.exists(RUN + "/hacked"):
        raise RuntimeError(f"hostile decisions: {found}")
    print("ok  odd decisions, each with its tag or left out", flush=True)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    inside()
    os.mkdir(RUN + "/bin")
    os.symlink(os.path.abspath(sys.argv[1]), RUN + "/bin/rfwc")
    write("bin/logger", f'#!/bin/sh\nexec cat >>{RUN}/syslog\n')
    rfw = Rfw(sys.argv[1], "")
    crowdsec = Crowdsec(sys.argv[2])
    with logs("syslog", "crowdsec-custom-bouncer.log", "crowdsec.log", "rfw.log"):
        crowdsec.ban("--ip", "203.0.113.1", "--duration", "4h30m")
        bouncer = crowdsec.bouncer()
        seen("a decision from before the bouncer's start", "cscli", 16200, "203.0.113.1/32")
        crowdsec.ban("--ip", "203.0.113.2", "--duration", "90s")
        seen("a new one", "cscli", 90, "203.0.113.2/32")
        crowdsec.ban("--ip", "2001:db8::2", "--duration", "240h")
        seen("IPv6", "cscli", 864000, "2001:db8::2/128")
        crowdsec.ban("--range", "198.18.7.0/24", "--duration", "1h")
        seen("a range", "cscli", 3600, "198.18.7.0/24")
        crowdsec.ban("--ip", "203.0.113.3", "--duration", "8760h")
        seen("a year, longer than a set keeps: no expiry, CrowdSec ends it", "cscli", 0, "203.0.113.3/32")
        write("import.csv", "duration,scope,value\n1h,ip,203.0.113.4\n1h,ip,203.0.113.5\n")
        crowdsec.cscli("decisions", "import", "-i", RUN + "/import.csv")
        for address in "203.0.113.4/32", "203.0.113.5/32":
            seen("an imported decision", "cscli-import", 3600, address)
        crowdsec.ban("--ip", "203.0.113.6", "--type", "captcha")
        crowdsec.ban("--ip", "192.0.2.1")
        crowdsec.ban("--ip", "203.0.113.7")
        seen("(the next one)", "cscli", 14400, "203.0.113.7/32")
        await_true("a whitelisted address: rfw's sentence in the log", 10, lambda: "409 whitelisted" in open(RUN + "/syslog").read())
        if {"203.0.113.6/32", "192.0.2.1/32", "198.51.100.1/32"} & blocked().keys():
            raise RuntimeError(f"blocked: {blocked()}")
        print("ok  no block for a captcha, a whitelisted address, an address in a reason", flush=True)
        crowdsec.cscli("decisions", "delete", "--ip", "203.0.113.1")
        crowdsec.cscli("decisions", "delete", "--range", "198.18.7.0/24")
        gone("deleted decisions", "203.0.113.1/32", "198.18.7.0/24")
        subprocess.run(["curl", "-sfo", "/dev/null", "-X", "PUT", "http://127.0.0.1:7390/drop/input/any/203.0.113.2?tag=person"], check=True)
        crowdsec.cscli("decisions", "delete", "--ip", "203.0.113.2")
        seen("an address also blocked by another source stays blocked", "person", 0, "203.0.113.2/32")
        rfw.stop()
        handed_on = lambda: open(RUN + "/crowdsec-custom-bouncer.log").read().count("adding '1' decisions")
        before = handed_on()
        crowdsec.ban("--ip", "203.0.113.8", "--duration", "1h")
        await_true("the bouncer has the decision", 20, lambda: handed_on() > before)
        Rfw(sys.argv[1], "")
        seen("rfw was away meanwhile", "cscli", 3600, "203.0.113.8/32")
        bouncer.kill()
        bouncer.wait()
        odd_decisions()
        if "203.0.113.8/32" not in blocked():
            raise RuntimeError("the bouncer's end has unblocked")


main()

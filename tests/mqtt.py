#!/usr/bin/env python3
"""mqtt.py: the rfw of each host of a fleet carries out what a peer publishes through a real mosquitto.

    tests/mqtt.py target/release/rfw MOSQUITTO

MOSQUITTO is Debian's mosquitto and mosquitto-clients with their libraries, unpacked by `make mqtt`, not
installed. The unchanged command of contrib/mqtt/rfw-mqtt@.service, real iptables in its own namespace.
Exit status 1 at the first failure.
"""

import glob, re, shlex, signal
from lab import *

BROKER = f"""listener 1883 127.0.0.1
allow_anonymous false
password_file {RUN}/passwords
acl_file {RUN}/acl
persistence true
persistence_location {RUN}/
autosave_interval 1
max_inflight_messages 20
max_queued_messages 10000
user root
"""
ACL = """user alice
topic write rfw/alice/#
user bob
topic write rfw/bob/#
user host
topic read rfw/#
"""


class Mosquitto:
    def __init__(self, package):
        self.bin = os.path.abspath(package) + "/usr"
        libraries = glob.glob(os.path.abspath(package) + "/usr/lib/*-linux-*") + glob.glob(os.path.abspath(package) + "/lib/*-linux-*")
        self.env = {"PATH": f"{RUN}/bin:{self.bin}/bin:/usr/bin:/bin", "CREDENTIALS_DIRECTORY": RUN + "/credentials",
                    "LD_LIBRARY_PATH": ":".join(libraries)}
        write("mosquitto.conf", BROKER)
        write("acl", ACL)
        write("passwords", "".join(f"{name}:secret\n" for name in ("alice", "bob", "host")))
        subprocess.run([self.bin + "/bin/mosquitto_passwd", "-U", RUN + "/passwords"], env=self.env, check=True)
        os.mkdir(RUN + "/credentials")
        write("credentials/mosquitto_sub", "-h 127.0.0.1\n-p 1883\n-u host\n-P secret\n")
        self.start()

    def start(self):
        log = open(RUN + "/mosquitto.log", "ab")
        self.broker = subprocess.Popen([self.bin + "/sbin/mosquitto", "-c", RUN + "/mosquitto.conf"], stdout=log, stderr=log,
                                       env=self.env, preexec_fn=die_with_parent)
        await_true("the broker listens", 20, lambda: self.publish("host", "x", "", check=False) == 0)

    def publish(self, user, topic, message, *more, check=True):
        words = ["-h", "127.0.0.1", "-u", user, "-P", "secret", "-V", "mqttv5", "-q", "1", "-t", topic, *more]
        words += ["-m", message] if message else ["-n"]
        return subprocess.run([self.bin + "/bin/mosquitto_pub", *words], env=self.env, check=check, stderr=subprocess.DEVNULL).returncode

    def subscribe(self, peer, host="host1"):
        """The unit's ExecStart; killed with all its processes, as by systemd."""
        with open(ROOT + "/contrib/mqtt/rfw-mqtt@.service") as f:
            command = re.search(r"(?m)^ExecStart=(.*)", f.read()).group(1)
        for old, new in ("%H", host), ("%i", peer), ("%%", "%"):
            command = command.replace(old, new)
        log = open(RUN + "/rfwc.log", "ab")
        return subprocess.Popen(shlex.split(command), stdout=log, stderr=log, env=self.env, start_new_session=True,
                                preexec_fn=die_with_parent)


def end(subscriber):
    os.killpg(subscriber.pid, signal.SIGTERM)
    subscriber.wait()


def blocked(tag):
    out = subprocess.run(["/usr/sbin/iptables-nft", "-S", "INPUT"], capture_output=True, text=True, check=True).stdout
    return {address: bool(expiry) for address, expiry in re.findall(rf'-s (\S+)/32 .*"?rfw:?(\d*)@{tag}"? -j DROP', out)}


def seen(what, probe, seconds=20):
    begun = time.monotonic()
    await_true(what, seconds, probe)
    print(f"ok  {what} ({time.monotonic() - begun:.1f} s)", flush=True)


def block(mqtt, address, peer="alice", query="?expire=1h", *more):
    mqtt.publish(peer, f"rfw/{peer}/{address}", f"put /drop/input/any/{address}{query}", "-r", *more)


def unblock(mqtt, address, peer="alice"):
    """Withdraws it for new hosts, and on all that listen."""
    mqtt.publish(peer, f"rfw/{peer}/{address}", "", "-r")
    mqtt.publish(peer, f"rfw/{peer}/{address}", f"delete /drop/input/any/{address}")


def messages(mqtt):
    alice = mqtt.subscribe("alice")
    seen("retained messages bring a new host up to date", lambda: set(blocked("alice")) == {"203.0.113.1", "203.0.113.2"})
    block(mqtt, "203.0.113.3")
    seen("a message is a rule in the kernel, with its expiry", lambda: blocked("alice").get("203.0.113.3"))
    unblock(mqtt, "203.0.113.1")
    seen("a peer withdraws a block", lambda: "203.0.113.1" not in blocked("alice"))
    bob = mqtt.subscribe("bob")
    block(mqtt, "203.0.113.3", "bob")
    seen("another peer, the same address, a rule of its own", lambda: "203.0.113.3" in blocked("bob"))
    unblock(mqtt, "203.0.113.3")
    seen("(withdrawn by one)", lambda: "203.0.113.3" not in blocked("alice"))
    if "203.0.113.3" not in blocked("bob"):
        raise RuntimeError("what one peer withdraws the other holds")
    block(mqtt, "203.0.113.4", "alice", "?tag=bob")
    mqtt.publish("alice", "rfw/bob/x", "put /drop/input/any/203.0.113.5", check=False)
    mqtt.publish("alice", "rfw/alice/x", "put /drop/input/any/192.0.2.1")
    mqtt.publish("alice", "rfw/alice/x", "\x1b[2J nonsense")
    block(mqtt, "203.0.113.6")
    block(mqtt, "203.0.113.7", "bob")
    seen("(good ones behind)", lambda: "203.0.113.6" in blocked("alice") and "203.0.113.7" in blocked("bob"))
    log = lambda: open(RUN + "/rfwc.log").read()
    seen("what is wrong or refused is in the log", lambda: "409 whitelisted" in log() and "# line " in log() and "400 " in log())
    if blocked("bob").keys() | blocked("alice").keys() != {f"203.0.113.{n}" for n in (2, 3, 6, 7)} or "\x1b" in log():
        raise RuntimeError(f"peers under each other's tags: {blocked('alice')} {blocked('bob')}")
    print("ok  no peer gets at another's tag", flush=True)
    return alice, bob


def outages(mqtt, rfw, start, alice):
    mqtt.broker.kill()
    mqtt.broker.wait()
    mqtt.start()
    block(mqtt, "203.0.113.8")
    seen("the broker was killed and started", lambda: "203.0.113.8" in blocked("alice"), 60)
    rfw.stop()
    block(mqtt, "203.0.113.9")
    start()
    seen("rfw was killed and started", lambda: "203.0.113.9" in blocked("alice"))
    end(alice)
    unblock(mqtt, "203.0.113.8")
    mqtt.publish("alice", "rfw/alice/once", "put /drop/input/any/203.0.113.10")
    alice = mqtt.subscribe("alice")
    seen("the broker has kept what came while the host was away",
         lambda: "203.0.113.10" in blocked("alice") and "203.0.113.8" not in blocked("alice"))
    lines = "".join(f"put /drop/input/any/198.18.{n // 256}.{n % 256}\n" for n in range(2000))
    begun = time.monotonic()
    with open(write("lines", lines)) as f:
        words = ["-h", "127.0.0.1", "-u", "alice", "-P", "secret", "-q", "1", "-t", "rfw/alice/many", "-l"]
        subprocess.run([mqtt.bin + "/bin/mosquitto_pub", *words], env=mqtt.env, stdin=f, check=True)
    seen("2,000 messages", lambda: len(blocked("alice")) >= 2000, 120)
    print(f"    ({2000 / (time.monotonic() - begun):.0f} a second)", flush=True)
    return alice


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    inside()
    os.mkdir(RUN + "/bin")
    os.symlink(os.path.abspath(sys.argv[1]), RUN + "/bin/rfwc")
    start = lambda: Rfw(sys.argv[1], "")
    rfw, mqtt = start(), Mosquitto(sys.argv[2])
    with logs("rfwc.log", "mosquitto.log", "rfw.log"):
        block(mqtt, "203.0.113.1")
        block(mqtt, "203.0.113.2", "alice", "", "-D", "publish", "message-expiry-interval", "3600")
        alice, bob = messages(mqtt)
        end(outages(mqtt, rfw, start, alice))
        end(bob)


main()

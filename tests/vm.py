#!/usr/bin/env python3
"""vm.py: a Debian with its own kernel and systemd boots with rfw, loses power while clients change rules, and
boots again.

    tests/vm.py FILE.deb FOLDER [RELEASE [BOOTS]]

In a virtual machine (qemu, no hardware support needed), with each form of rules: iptables-nft, sets,
iptables-legacy. The kernel loads its modules on demand, and a power cut loses what was not synced. After
each boot: rfw started at the first attempt and before network-pre.target, and holds what was answered with
200, a list as a whole. FOLDER keeps the RELEASE (that of this host) between runs. As root, for debootstrap;
nothing on this host is changed. Exit status 1 at the first failure.
"""

import glob, os, platform, random, shutil, subprocess, sys, time
from lab import die_with_parent

PACKAGES = "systemd,systemd-sysv,udev,kmod,dbus,iproute2,iptables,ipset,initramfs-tools,linux-image-cloud-amd64,python3"
RAW = "CapabilityBoundingSet=CAP_NET_RAW\nAmbientCapabilities=CAP_NET_RAW\n"
MODPROBE = "modprobe@ip_tables.service modprobe@ip6_tables.service"
FORMS = {  # what contrib/rfw.service says about each: rfw.conf, drop-in
    "nft": ("", ""),
    "sets": ("ipset.path = /sbin/ipset", f"[Service]\n{RAW}"),
    "legacy": ("", f"[Service]\n{RAW}DynamicUser=no\nProcSubset=all\nReadWritePaths=/run\n"
                   f"[Unit]\nWants={MODPROBE}\nAfter={MODPROBE}\n"),
}
CONF = """[config]
local.server
whitelist.file = white.list
state.file = /var/lib/rfw/state
iptables.path = iptables-{}
{}
"""
UNIT = """[Unit]
After=rfw.service
[Service]
ExecStart=/usr/bin/python3 -u /root/guest.py
StandardOutput=tty
TTYPath=/dev/ttyS0
[Install]
WantedBy=multi-user.target
"""
CREDENTIALS = "[Service]\nLoadCredential=\nLoadCredential=rfw.conf:/etc/rfw/rfw.conf\nLoadCredential=white.list:/etc/rfw/white.list\n"
# Prints what rfw holds after the boot, then what it changes, before and after each response.
GUEST = r"""
import http.client, random, re, subprocess, termios
def run(*words):
    return subprocess.run(words, capture_output=True, text=True).stdout
def since(unit, what):
    return int(run("systemctl", "show", "-P", what, unit))
while since("rfw", "ActiveEnterTimestampMonotonic") == 0:
    pass
before = since("rfw", "ActiveEnterTimestampMonotonic") <= since("network-pre.target", "ActiveEnterTimestampMonotonic")
print()  # after what the console prints first
print("START", run("uname", "-r").strip(), "before" if before else "after", since("rfw", "NRestarts"))
print("HELD", *re.findall(r"198\.1[89]\.\d+\.\d+", run("iptables-TABLES", "-S") + run("ipset", "list")))
def some(second):
    return f"198.{second}.{random.randrange(4)}.{random.randrange(256)}"
client = http.client.HTTPConnection("127.0.0.1", 7390)
while True:
    verb = random.choice(["PUT", "PUT", "DELETE"])
    nets = {some(19) for _ in range(150)} if random.random() < 0.2 else {some(18)}
    path, body = "/drop/input/any", "\n".join(nets)
    if len(nets) == 1:
        path, body = f"{path}/{body}", None
    print("SENT", verb, *nets)
    termios.tcdrain(1)
    client.request(verb, path, body)
    response = client.getresponse()
    text = response.read().decode().strip()
    print("ANSWER", response.status, "" if response.status == 200 else text)
"""


def machine(release, root, deb):
    """The files of the machine, with rfw installed."""
    if not os.path.exists(f"{root}/ready"):
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", release, root],
                       check=True, stdout=subprocess.DEVNULL)
        open(f"{root}/ready", "w").close()
    shutil.copy(deb, f"{root}/root/rfw.deb")
    # The last run has changed rfw.conf; nobody could answer what to do with it.
    install = "dpkg --force-confnew -i /root/rfw.deb && systemctl --quiet enable rfw"
    subprocess.run(["chroot", root, "sh", "-ec", install], check=True, stdout=subprocess.DEVNULL)


def write(root, path, text, mode=0o644):
    os.makedirs(os.path.dirname(root + path), exist_ok=True)
    with open(root + path, "w") as file:
        file.write(text)
    os.chmod(root + path, mode)


def configure(root, form):
    lines, dropin = FORMS[form]
    tables = "legacy" if form == "legacy" else "nft"
    write(root, "/etc/rfw/rfw.conf", CONF.format(tables, lines), 0o600)
    write(root, "/etc/rfw/white.list", "127.0.0.1\n", 0o600)
    write(root, "/etc/systemd/system/rfw.service.d/vm.conf", CREDENTIALS + dropin)
    write(root, "/root/guest.py", GUEST.replace("TABLES", tables))
    write(root, "/etc/systemd/system/guest.service", UNIT)
    write(root, "/etc/fstab", "/dev/vda / ext4 defaults 0 1\n")
    subprocess.run(["chroot", root, "systemctl", "--quiet", "enable", "guest"], check=True)
    subprocess.run(["chroot", root, "systemctl", "--quiet", "mask", "serial-getty@ttyS0"], check=True)
    disk = root + ".disk"
    with open(disk, "w") as file:
        file.truncate(3 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", root, disk], check=True)
    return disk


def boot(root, disk):
    """Boots the machine, cuts its power while clients change rules -> the whole lines it has printed."""
    kernel, initrd = (max(glob.glob(f"{root}/boot/{name}-*")) for name in ("vmlinuz", "initrd.img"))
    log = disk + ".log"
    with open(log, "wb") as out:
        qemu = subprocess.Popen(
            ["qemu-system-x86_64", "-cpu", "max", "-m", "512", "-nographic", "-no-reboot", "-nic", "none",
             "-drive", f"file={disk},format=raw,if=virtio", "-kernel", kernel, "-initrd", initrd,
             "-append", "root=/dev/vda rw console=ttyS0 quiet systemd.show_status=0"],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
        try:
            deadline, changes = time.monotonic() + 300, random.randint(20, 60)
            while (text := read(log)).count("\nANSWER") < changes:
                if time.monotonic() > deadline or "Traceback" in text or qemu.poll() is not None:
                    sys.exit(f"rfw does not answer:\n{text[-3000:]}")
                time.sleep(0.05)
        finally:
            qemu.kill()
            qemu.wait()
    return read(log).split("\n")[:-1]


def read(log):
    with open(log, errors="replace", newline="") as file:
        return file.read().replace("\r", "")


def check(what, lines, held, doubtful):
    """Compares a boot with what was answered before -> what is held at its end, and what may be."""
    if not any(line.startswith("START ") for line in lines):
        sys.exit(f"{what}: no line says when rfw started")
    for line in lines:
        word, *rest = line.split(" ")
        if word == "START":
            if rest[1:] != ["before", "0"]:
                sys.exit(f"{what}: rfw was active {rest[1]} network-pre.target, after {rest[2]} restarts")
            print(f"{what}: Linux {rest[0]}", end="", flush=True)
        elif word == "HELD":
            found = set(rest)
            lost, back, part = held - found - doubtful, found - held - doubtful, doubtful & (held ^ found)
            if lost or back or part and part != doubtful - held and part != doubtful & held:
                sys.exit(f"{what}: lost {lost}, came back {back}, in part {part}")
            print(f", holds {len(found)}", end="")
            held, doubtful, changes = found, set(), 0
        elif word == "SENT":
            verb, doubtful = rest[0], set(rest[1:])
        elif word == "ANSWER":
            if rest[0] != "200":
                sys.exit(f"{what}: {line}")
            held = held | doubtful if verb == "PUT" else held - doubtful
            doubtful, changes = set(), changes + 1
    print(f", then {changes} changes")
    return held, doubtful


def main(deb, folder, release=platform.freedesktop_os_release()["VERSION_CODENAME"], boots=3):
    root = os.path.join(os.path.abspath(folder), release)
    os.makedirs(root, exist_ok=True)
    machine(release, root, deb)
    for form in FORMS:
        disk, held, doubtful = configure(root, form), set(), set()
        for number in range(int(boots)):
            held, doubtful = check(f"{release}, {form}, boot {number + 1}", boot(root, disk), held, doubtful)
        os.remove(disk)


main(*sys.argv[1:])

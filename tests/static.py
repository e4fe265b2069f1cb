#!/usr/bin/env python3
"""static.py: the static binaries are static, small, reproducible, and work.

    tests/static.py [TARGET...]

Builds each TARGET (all five) with contrib/static.sh, here and again in another folder; then starts it,
foreign ones under qemu-user, in network namespaces with real iptables-nft.
Exit status 1 if a goal is missed.
"""

import filecmp, os, re, shutil, subprocess, sys, tempfile, time
from lab import OUTWARD, OUTWARD_CONF, PASSWORD, ROOT, RUN, USER, Rfw, Table, inside, keys, write

MOST = {"x86_64": 1600000, "aarch64": 1350000, "armv7": 1150000, "mips": 1600000, "mipsel": 1600000}
QEMU = {"aarch64": "aarch64", "armv7": "arm", "mips": "mips", "mipsel": "mipsel"}
BUILT = os.path.join(ROOT, os.environ.get("CARGO_TARGET_DIR", "target"), "static")
RULE = "/drop/input/any/203.0.113.7"
TAGGED = "-A INPUT -s 203.0.113.7/32 -m comment --comment rfw -j DROP"


def build(targets):
    """Leaves rfw-TARGET and again-TARGET, which is from another folder, in BUILT."""
    environment = {name: value for name, value in os.environ.items() if name != "CARGO_TARGET_DIR"}
    with tempfile.TemporaryDirectory() as folder:
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        for name in files.decode().split("\0")[:-1]:
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            shutil.copy2(os.path.join(ROOT, name), os.path.join(folder, name))
        for target in targets:
            subprocess.run([ROOT + "/contrib/static.sh", target], check=True)
            subprocess.run([folder + "/contrib/static.sh", target], env=environment, check=True)
            shutil.copy2(f"{folder}/target/static/rfw-{target}", f"{BUILT}/again-{target}")


def said(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout.strip()


def https(method, path):
    return said("curl", "-sS", "--cacert", RUN + "/client/ca.crt", "-u", f"{USER}:{PASSWORD}", "-X", method,
                f"https://127.0.0.1:{OUTWARD}{path}")


def in_kernel():
    return TAGGED in said("/usr/sbin/iptables-nft", "-S").splitlines()


def judge(table, target):
    binary = f"{BUILT}/rfw-{target}"
    size = os.path.getsize(binary)
    table.row(f"{target}: bytes", f"at most {MOST[target]:,}", f"{size:,}", size <= MOST[target])
    needs = [line for option in ("-lW", "-dW") for line in said("readelf", option, binary).splitlines()
             if "INTERP" in line or "NEEDED" in line]
    table.row(f"{target}: INTERP and NEEDED in readelf", "none", len(needs), not needs)
    same = filecmp.cmp(binary, f"{BUILT}/again-{target}", shallow=False)
    table.row(f"{target}: built in another folder", "the same bytes", "the same" if same else "others", same)

    emulator = f"qemu-{QEMU[target]}-static " if target in QEMU else ""
    program = write("rfw", f'#!/bin/sh\nexec {emulator}{binary} "$@"\n')
    version = said(program, "-V")
    table.row(f"{target}: -V", "rfw and a version", version, bool(re.fullmatch(r"rfw \d+\.\d+\.\d+", version)))

    rfw = Rfw(program, OUTWARD_CONF)
    checked = said(program, "-t", "-f", RUN + "/rfw.conf")
    table.row(f"{target}: -t", "FILE: OK", checked.partition("\n")[0], checked.startswith(RUN + "/rfw.conf: OK\n"))
    before, put, during = in_kernel(), https("PUT", RULE), in_kernel()
    deleted, after = https("DELETE", RULE), in_kernel()
    right = '"inserted"' in put and '"deleted"' in deleted
    table.row(f"{target}: PUT and DELETE over HTTPS", "inserted, deleted", "so" if right else put + deleted, right)
    seen = (before, during, after)
    table.row(f"{target}: the rule in iptables -S before, between, after", "no, yes, no",
              ", ".join("yes" if here else "no" for here in seen), seen == (False, True, False))
    if target == "x86_64":
        time.sleep(11)  # an idle connection is closed within 10 s
        idle = rfw.memory()
        table.row(f"{target}: idle memory with both servers", "at most 2,000,000", f"{idle:,}", idle <= 2000000)
    rfw.stop()


def main():
    targets = sys.argv[1:] or list(MOST)
    if unknown := [target for target in targets if target not in MOST]:
        sys.exit(f"not {' '.join(unknown)}; one of {' '.join(MOST)}")
    if "RFW_LAB_OUTSIDE" not in os.environ:
        build(targets)
    inside()
    keys()
    table = Table([])
    for target in targets:
        judge(table, target)
    sys.exit(table.missed > 0)


main()

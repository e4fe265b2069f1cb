#!/usr/bin/env python3
"""conformance.py: contrib/openapi.yaml and the running rfw agree.

    VENV/bin/python tests/conformance.py target/release/rfw promtool [EXAMPLES]

schemathesis generates EXAMPLES (100) valid and invalid requests for each operation of the description,
and every example, limit and undeclared method, and sends them to a real rfw with the real iptables-nft,
in its own namespaces: with rules, with sets, and to the outward server without credentials. Every
status, field, content type and body must be as declared, valid requests must be accepted and invalid
ones refused. A read-only user gets 403 for each change. Conversely, of a hundred times as many random
requests, the description must allow exactly those that rfw accepts. Prometheus' own promtool reads the
metrics. Exit status 1 if they differ.
"""

import collections, ipaddress, os, random, re, subprocess, sys, urllib.parse
import jsonschema_rs, schemathesis, yaml
from hypothesis import strategies as st
from schemathesis.openapi.checks import RejectedPositiveData
from lab import *

DESCRIPTION = ROOT + "/contrib/openapi.yaml"


# --- What the description states only in prose -----------------------------------------------------

def block(segments):
    """Takes an address and its mask from the front; -> the IP version, and whether it is any address.
    ValueError: they do not match."""
    ip = ipaddress.ip_address(segments.pop(0))
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if not segments or not segments[0].isdigit():
        return ip.version, int(ip) == 0
    mask = int(segments.pop(0))
    if (mask > 32 if ip.version == 4 else mask < 17) or (int(ip), mask) == (0, ip.max_prefixlen):
        raise ValueError
    return ip.version, False


def is_address(segment):
    try:
        return bool(ipaddress.ip_address(segment))
    except ValueError:
        return False


def fit(method, segments):
    """Whether the segments after the chain, each of which is valid, are valid together."""
    faces = [segments.pop(0)]
    try:
        version, is_any = block(segments)
        faces += segments[:1]
        if segments[1:]:
            other, other_is_any = block(segments := segments[1:])
            if other != version or segments:
                return False
            is_any &= other_is_any
        if any(":" in face or method == "PUT" and is_address(face) for face in faces):  # no interface
            return False
        return method == "DELETE" or not is_any
    except ValueError:
        return False


# --- What schemathesis loads -----------------------------------------------------------------------

four, six = st.ip_addresses(v=4, network="1.0.0.0/8"), st.ip_addresses(v=6, network="2000::/3")
schemathesis.openapi.format("address-list", st.lists(max_size=5, elements=st.one_of(
    four.map(str), six.map(str), st.just(""),
    st.builds("{}/{}".format, four, st.integers(9, 32)), st.builds("{}/{}".format, six, st.integers(17, 128)),
    st.builds(lambda first, more: f"{first} - {first + more}", four, st.integers(0, 64)),
    st.builds(lambda ip, text: f"{ip} # {text}", four, st.text().map(lambda text: re.sub("[\r\n]", " ", text))),
)).map("\n".join))
schemathesis.openapi.format("tag", st.sampled_from(["feed", "a", "0.9_z-", "a-tag-of-20-letters."]))  # more than 64 get 507
schemathesis.openapi.format("address-or-block", st.one_of(
    four.map(str), six.map(str), st.builds("{}/{}".format, four, st.integers(0, 32)), st.builds("{}/{}".format, six, st.integers(0, 128))))


@schemathesis.hook
def filter_failure(context, failure, case, response):
    """A refusal is right if the segments do not match, a list is empty, `replace` lacks a tag, or sets cannot
    keep an address for that long."""
    if not isinstance(failure, RejectedPositiveData):
        return True
    values = [urllib.parse.unquote(str(case.path_parameters[name])) for name in re.findall("{(.*?)}", case.path)]
    right = any(words in response.content for words in (b"(24 days)", b'"empty_list"', b"requires a tag"))
    return ("{ip}" not in case.path or fit(case.method.upper(), values[1:])) and not right


@schemathesis.hook
def after_call(context, case, response):
    declared = response.request.method == case.operation.method.upper()
    with open(RUN + "/answers", "a") as f:
        f.write(f"{case.operation.label if declared else 'methods that are not declared'}\t{response.status_code}\n")


def run(name, url, statuses, *options):
    """One run of schemathesis; -> whether it passes. Every response must have one of these statuses, and every
    operation must have had the first of them. Prints the statuses of each operation."""
    write("schemathesis.toml", f"[checks.not_a_server_error]\nexpected-statuses = {statuses}\n")
    write("answers", "")
    command = [os.path.dirname(sys.executable) + "/schemathesis", "--no-color", "run", DESCRIPTION,
               "--url", url, "--checks", "all", "--warnings", "off", "--generation-deterministic", *options]
    print(f"\n=== {name}\n{' '.join(command)}", flush=True)
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "conformance", "PYTHONPATH": ROOT + "/tests"}
    met = subprocess.run(command, cwd=RUN, env=environment).returncode == 0
    answers = collections.defaultdict(collections.Counter)
    with open(RUN + "/answers") as f:
        for operation, status in (line.rstrip("\n").split("\t") for line in f):
            answers[operation][status] += 1
    for operation, counts in answers.items():
        first = counts[statuses[0]] > 0 or " /" not in operation
        met &= first
        counted = "  ".join(f"{status}: {counts[status]}" for status in sorted(counts))
        print(f"{operation:88}{counted}{'' if first else '   NEVER ' + statuses[0]}", flush=True)
    return met


# --- The converse ----------------------------------------------------------------------------------

class Description:
    """Which changes of a single rule it allows."""

    def __init__(self):
        with open(DESCRIPTION) as f:
            self.all = yaml.safe_load(f)

    def parameter(self, reference):
        parameter = self.all["components"]["parameters"][reference["$ref"].rpartition("/")[2]]
        schema = {"allOf": [parameter["schema"]], "components": self.all["components"]}
        return parameter["name"], jsonschema_rs.validator_for(schema, validate_formats=True)

    def operations(self):
        """-> (method, segments of the path, each a word or a validator, {name: validator} of the query)"""
        for path, item in self.all["paths"].items():
            named = dict(map(self.parameter, item.get("parameters", [])))
            segments = [named.get(segment.strip("{}"), segment) for segment in path.split("/")[1:]]
            for method in ("put", "delete") if "{ip}" in path else ():
                yield method.upper(), segments, dict(map(self.parameter, item[method].get("parameters", [])))


def allows(validator, text):
    return validator.is_valid(text) or text == str(int("0" + re.sub("[^0-9]", "", text))) and validator.is_valid(int(text))


def allowed(operations, method, path, query):
    """Whether one of them is this request."""
    segments = path.split("/")[1:]
    segments[:2] = map(str.lower, segments[:2])
    for its_method, its_segments, its_query in operations:
        if method == its_method and len(segments) == len(its_segments) and all(
                segment == its if isinstance(its, str) else allows(its, segment) for segment, its in zip(segments, its_segments)):
            return fit(method, segments[2:]) and all(name in its_query and allows(its_query[name], value) for name, value in query)
    return False


FACES = ["any", "198.51.100.0", "all", "All", "feed.txt", "eth0", "ppp", "ppp+", "br-lan", "eth0@if3", "a" * 14 + "1", "a" * 14, "a" * 15, "a" * 14 + "+", "a" * 15 + "1", "_",
         "@", "-i", ".1", "1", "24", "+", "e+h", "eth0:1", "e h", "a.b_c@d-e", "é"]
ADDRESSES = ["203.0.113.9", "203.0.113.9", "2001:db8::9", "2001:DB8:0::9", "::ffff:203.0.113.9", "0.0.0.0", "::", "::ffff:0.0.0.0",
             "203.0.113", "203.0.113.09", "203.0.113.256", "2001:db8::9::", "fe80::1%eth0", "host", "0.0.0.9"]
MASKS = ["8", "9", "16", "17", "24", "31", "32", "33", "64", "127", "128", "129", "024", "+24", "24+", "x"]
TIMES = ["0", "90", "90s", "10m", "12h", "30d", "3650d", "3651d", "00003650d", "315360000", "315360001", "999999999d", "123456789", "12345678", "1234567890", "", "s", "1w", "-1", "1.5h", "+1"]

TAGS = ["feed", "0", "a.b_c-d", "a" * 20, "a" * 21, "Feed", "-a", ".a", "a b", "", "*", "**", "é"]


def some(seed):
    """A random request: method, path, query."""
    pick = random.Random(seed).choice
    words = [pick(["drop", "DROP", "accept", "reject", "Reject"] * 4 + ["log"]), pick(["input", "output", "forward", "Forward"] * 4 + ["nat"])]
    words += [pick(FACES), pick(ADDRESSES), *pick([[], [pick(MASKS)]])]
    if words[1].lower() == "forward":
        words += pick([[], [pick(FACES)], [pick(FACES), pick(ADDRESSES), *pick([[], [pick(MASKS)]])]])
    query = [pick([("expire", pick(TIMES)), ("wait", pick(["true", "false", ""])), ("tag", pick(TAGS)), ("x", "1"), ("replace", "true")]) for _ in range(pick([0, 0, 0, 1, 1]))]
    return pick(["PUT", "DELETE"]), "/" + "/".join(words), query


def round_trip(count):
    """-> whether the description allows exactly those of this many random requests that rfw accepts."""
    operations, conn, differing, taken = list(Description().operations()), connect(), 0, 0
    for seed in range(count):
        method, path, query = some(seed)
        target = urllib.parse.quote(path, safe="/+@:") + ("?" + urllib.parse.urlencode(query) if query else "")
        conn.sendall(request(method, target))
        status = int(answer(conn)[9:12])
        taken += status in (200, 409)
        if (status in (200, 409)) != allowed(operations, method, path, query):
            differing += 1
            print(f"{method} {target}: {status}, described otherwise", flush=True)
    print(f"\n=== random requests\n{count}, of which rfw took {taken}; described otherwise: {differing}", flush=True)
    return differing == 0


def metrics(promtool):
    """-> whether promtool accepts the metrics, once they count the rules, as they do each second."""
    text = lambda: exchange(connect(), request("GET", "/metrics")).partition(b"\r\n\r\n")[2]
    await_true("the rules are counted", 30, lambda: b'rfw_rules{chain="OUTPUT",target="REJECT",tag=""} 1\n' in text())
    said = subprocess.run([promtool, "check", "metrics"], input=text(), capture_output=True)
    print(f"\n=== promtool check metrics: {said.returncode} {(said.stdout + said.stderr).decode()}", flush=True)
    return said.returncode == 0


# --- The run ---------------------------------------------------------------------------------------

SEEDS = ["/drop/input/eth0/203.0.113.0/24?tag=feed", "/reject/output/any/2001:db8::1?expire=10m", "/accept/input/ppp/198.51.100.4",
         "/drop/forward/any/0.0.0.0/any/203.0.113.9", "/drop/forward/any/::/any/2001:db8::9"]


def started(program, lines):
    """An rfw that has something to list."""
    for iptables in "/usr/sbin/iptables-nft", "/usr/sbin/ip6tables-nft":
        subprocess.run([iptables, "-F"], check=True)
    rfw = Rfw(program, lines)
    for path in SEEDS:
        if not exchange(connect(), request("PUT", path)).startswith(b"HTTP/1.1 200 "):
            sys.exit(f"not taken: {path}")
    return rfw


def main(program, promtool, examples="100"):
    inside()
    keys()
    local, outward = f"http://127.0.0.1:{LOCAL}", f"https://127.0.0.1:{OUTWARD}"
    many, few, trust = ["--max-examples", examples], ["--phases", "examples"], ["--tls-verify", RUN + "/client/ca.crt"]
    write("users", "guard:secret read\n")
    rfw = started(program, OUTWARD_CONF + "auth.file = users\n")
    met = metrics(promtool)
    met &= run("rules", local, ["200", "4xx"], *many)
    met &= round_trip(100 * int(examples))
    met &= run("no credentials", outward, ["401"], *trust, "--phases", "examples,coverage")
    met &= run("a user who may only read", outward, ["403", "400"], *trust, "--auth", "guard:secret",
               "--include-method", "PUT", "--include-method", "DELETE", "--exclude-path-regex", "ip2_or_mask2", *few)
    for _ in range(11):
        exchange(connect(OUTWARD, context=tls()), request("GET", "/", "Authorization: Basic eDp5\r\n"))
    met &= run("too many guesses", outward, ["429"], *trust, *few)
    rfw.stop()
    rfw = started(program, "ipset.path = /usr/sbin/ipset\n")
    met &= run("sets", local, ["200", "4xx"], *many)
    rfw.stop()
    rfw = started(program, "ipset.path = /usr/sbin/ipset\nipset.maxelem = 1\n")
    met &= run("full sets", local, ["507"], "--include-name", "PUT /{target}/input/{iface}/{ip}", *few)
    rfw.stop()
    print("\nmet" if met else "\nNOT MET")
    return 0 if met else 1


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*map(os.path.abspath, sys.argv[1:3]), *sys.argv[3:]))

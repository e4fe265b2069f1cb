"""lab.py: what the tests in Python share: a private network, a running rfw, requests, a table.

A test that calls `inside` runs in its own network, mount and process namespaces with a private
/run, or not at all. None of its processes outlives it.
"""

import contextlib, ctypes, os, resource, socket, ssl, subprocess, sys, tempfile, time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOCAL, OUTWARD = 7390, 7393
USER, PASSWORD = "mu", "s3cret:pass"
BASIC = "Authorization: Basic bXU6czNjcmV0OnBhc3M=\r\n"
RUN = "/run/lab"


def inside():
    """Runs this program again in its own namespaces and exits with its status; returns in that run."""
    outer = os.environ.pop("RFW_LAB_OUTSIDE", None)
    here = os.readlink("/proc/self/ns/net")
    if outer is None:
        os.environ["RFW_LAB_OUTSIDE"] = here
        sys.exit(private([sys.executable, *sys.argv]))
    if outer == here:
        sys.exit("not in a network namespace of its own")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))


def private(command):
    """Runs a command in namespaces of its own, as their process 1; -> its exit status.

    However this process ends, even by SIGKILL, so does `unshare`, and with it process 1; the kernel then
    kills everything in the namespace. So no rfw stays behind as root, or holds `make test | tail` open."""
    kinds = "-nmp" if os.getuid() == 0 else "-rnmp"
    setup = 'mount -t tmpfs -o mode=755 lab /run && mkdir -m 700 /run/lab && ip link set lo up && exec "$@"'
    parent = os.getpid()
    return subprocess.run(["unshare", kinds, "--fork", "--kill-child", "--mount-proc", "sh", "-c", setup, "sh", *command],
                          preexec_fn=lambda: die_with_parent(parent)).returncode


def write(name, text):
    path = os.path.join(RUN, name)
    with open(path, "w") as f:
        f.write(text)
    os.chmod(path, 0o700)
    return path


@contextlib.contextmanager
def logs(*names):
    """Shows the ends of these logs if what is done within fails."""
    try:
        yield
    except Exception:
        for name in filter(os.path.exists, (f"{RUN}/{name}" for name in names)):
            with open(name, errors="replace") as f:
                sys.stderr.writelines([f"--- {name}\n", *f.readlines()[-30:]])
        raise


def keys():
    subprocess.run([ROOT + "/contrib/rfwgen", "127.0.0.1", RUN], stdout=subprocess.DEVNULL, check=True)


OUTWARD_CONF = f"""outward.server
outward.server.port = {OUTWARD}
outward.server.ip = 127.0.0.1
outward.server.certfile = server_127.0.0.1/server.crt
outward.server.keyfile = server_127.0.0.1/server.key
auth.username = {USER}
auth.password = {PASSWORD}
"""


class Rfw:
    """A running rfw, with these lines in its rfw.conf."""

    def __init__(self, program, lines, iptables="/usr/sbin/iptables-nft"):
        write("white.list", "192.0.2.1\n")
        fixed = f"local.server\nwhitelist.file = white.list\niptables.path = {iptables}\n"
        conf = write("rfw.conf", f"[config]\n{fixed}{lines}\n")
        soft = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))  # what a service has
        self.process = subprocess.Popen([program, "-f", conf, "--logfile", RUN + "/rfw.log"], preexec_fn=soft,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.pid = self.process.pid
        await_true("rfw answers", 30, self.answers)

    def answers(self):
        if self.process.poll() is not None:
            raise RuntimeError(f"rfw ended: {self.process.returncode}")
        try:
            return b"HTTP/1.1 " in exchange(connect(), request("GET", "/"))
        except OSError:
            return False

    def stop(self):
        self.process.kill()
        self.process.wait()

    def threads(self):
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def idle(self):
        """Descriptors and threads, the fewest within 2 s: a check of the kernel has more for a moment."""
        looks = []
        for _ in range(100):
            time.sleep(0.02)
            looks.append((self.descriptors(), self.threads()))
        return min(looks)

    def memory(self, what="VmRSS"):
        """Bytes in memory: now, or with VmHWM the most so far."""
        with open(f"/proc/{self.pid}/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(what))


def await_true(what, seconds, probe):
    limit = time.monotonic() + seconds
    while not probe():
        if time.monotonic() > limit:
            raise RuntimeError(f"not within {seconds} s: {what}")
        time.sleep(0.02)


def connect(port=LOCAL, source=None, context=None, timeout=20):
    """A connection to rfw; with a context it speaks TLS."""
    conn = socket.socket()
    conn.settimeout(timeout)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if source:
        conn.bind((source, 0))
    conn.connect(("127.0.0.1", port))
    return context.wrap_socket(conn, server_hostname="127.0.0.1") if context else conn


def tls():
    return ssl.create_default_context(cafile=RUN + "/client/ca.crt")


def request(method, path, fields=""):
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{fields}\r\n".encode()


def answer(conn):
    """One whole response with a Content-Length; shorter if the peer closed the connection."""
    data, more = b"", b"x"
    while more and b"\r\n\r\n" not in data:
        more = conn.recv(65536)
        data += more
    head = data.partition(b"\r\n\r\n")[0].lower()
    if b"content-length: " in head:
        length = len(head) + 4 + int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while more and len(data) < length:
            more = conn.recv(65536)
            data += more
    return data


def exchange(conn, bytes_):
    with conn:
        conn.sendall(bytes_)
        return answer(conn)


def die_with_parent(parent=None):
    """In a new process: it ends with its parent, however that ends; with the ID `parent`, even if it already has."""
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if parent not in (None, os.getppid()):
        os._exit(1)


def fork(work, *arguments):
    """Runs `work` in a new process, which ends with this one."""
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        die_with_parent(parent)
        status = 1
        try:
            work(*arguments)
            status = 0
        finally:
            os._exit(status)
    return pid


class Table:
    """Rows of what | goal | measured; remembers whether a goal was missed."""

    def __init__(self, words):
        self.words, self.missed = words, 0
        print(f"{'what':64}{'goal':<28}measured", flush=True)

    def wants(self, what):
        return not self.words or any(word in what for word in self.words)

    def row(self, what, goal, measured, met):
        self.missed += not met
        print(f"{what:64}{goal:<28}{measured}{'' if met else '   MISSED'}", flush=True)
